// Which rows of a batch are real tokens, sequence by sequence.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace safr {

// A batch as the caller describes it: samples × tokens with an optional mask, or packed tokens with offsets.
struct Layout {
  int64_t samples, tokens;  // packed: 1 and the number of all tokens
  const bool* mask;         // (samples, tokens) or null
  int64_t mask_sample_stride, mask_token_stride;
  const int32_t* cu_seqlens;  // (sequences + 1) or null
  int64_t sequences;          // packed only

  bool real(int64_t sample, int64_t token) const {
    return !mask || mask[sample * mask_sample_stride + token * mask_token_stride];
  }
};

// The real tokens of one sequence: `count` of them from `first` on, or those that `list` names.
struct Sequence {
  int64_t sample, first, count;
  const int32_t* list;  // null where they follow one another

  // Of its i-th token in the sample.
  int64_t position(int64_t i) const { return list ? list[i] : first + i; }
};

class Sequences {
 public:
  explicit Sequences(const Layout& layout) {
    if (layout.cu_seqlens)
      from_offsets(layout);
    else
      from_mask(layout);
  }

  const std::vector<Sequence>& all() const { return all_; }

 private:
  void from_offsets(const Layout& layout) {
    const int32_t* offsets = layout.cu_seqlens;
    if (offsets[0] != 0) refuse("must start at 0, starts at " + std::to_string(offsets[0]));
    for (int64_t s = 0; s < layout.sequences; ++s) {
      if (offsets[s + 1] < offsets[s])
        refuse("must never fall, goes from " + std::to_string(offsets[s]) + " to " + std::to_string(offsets[s + 1]) +
               " at index " + std::to_string(s + 1));
      all_.push_back({0, offsets[s], offsets[s + 1] - offsets[s], nullptr});
    }
    if (offsets[layout.sequences] > layout.tokens)
      refuse("must end at or before the number of tokens, " + std::to_string(layout.tokens) + ", ends at " +
             std::to_string(offsets[layout.sequences]));
  }

  void from_mask(const Layout& layout) {
    if (layout.mask) list_.reset(new int32_t[size_t(layout.samples * layout.tokens)]);
    for (int64_t s = 0; s < layout.samples; ++s) {
      if (!layout.mask) {
        all_.push_back({s, 0, layout.tokens, nullptr});
        continue;
      }
      int32_t* list = list_.get() + s * layout.tokens;
      int64_t count = 0;
      for (int64_t t = 0; t < layout.tokens; ++t)
        if (layout.real(s, t)) list[count++] = int32_t(t);
      const bool contiguous = count == 0 || list[count - 1] - list[0] == count - 1;
      all_.push_back({s, count ? list[0] : 0, count, contiguous ? nullptr : list});
    }
  }

  [[noreturn]] static void refuse(const std::string& what) { throw std::invalid_argument("cu_seqlens " + what); }

  std::unique_ptr<int32_t[]> list_;
  std::vector<Sequence> all_;
};

}  // namespace safr
