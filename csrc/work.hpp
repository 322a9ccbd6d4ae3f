// What the products of this process have done so far, counted rather than timed: tests hold it against the floor of the
// algorithm that was chosen.
#pragma once

#include <atomic>
#include <cstdint>

namespace safr {

struct Work {
  std::atomic<int64_t> multiply_adds{0};  // of whole tiles, with what they waste on edges
  std::atomic<int64_t> packed_bytes{0};
  std::atomic<int64_t> turned_bytes{0};  // of packed panels, made anew for the other side at each use
};

inline Work work;

}  // namespace safr
