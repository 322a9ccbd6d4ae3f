// Work shared between threads, and each thread's scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.hpp"

namespace safr {

// Scratch memory of one thread, given out as a stack. Small stacks are kept for the next call; large ones are not.
class Workspace {
 public:
  // What is taken after a mark is given back when the mark goes out of scope.
  class Mark {
   public:
    explicit Mark(Workspace& workspace) : workspace_(workspace), chunk_(workspace.chunk_), used_(workspace.used_) {}
    ~Mark() { workspace_.rewind(chunk_, used_); }
    Mark(const Mark&) = delete;

   private:
    Workspace& workspace_;
    size_t chunk_, used_;
  };

  // The calling thread's.
  static Workspace& own();

  // Not initialised; aligned to 64 bytes.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(size_t(count) * sizeof(T)));
  }

  // Frees what is too large to keep, once everything has been given back.
  void trim();

 private:
  struct Free {
    void operator()(char* p) const;
  };
  struct Chunk {
    std::unique_ptr<char, Free> data;
    size_t size;
  };

  void* take_bytes(size_t bytes);
  void rewind(size_t chunk, size_t used) {
    chunk_ = chunk;
    used_ = used;
  }

  std::vector<Chunk> chunks_;
  size_t chunk_ = 0, used_ = 0;  // the chunk in use, and how much of it is
};

// Names the process that threads may have been started in already; in others, forked from it, they are not there.
void set_home_process(int64_t pid);

// Runs worker(context) on up to `threads` threads at once, the calling one among them, and waits for all.
void run_workers(int threads, void (*worker)(void*), void* context);

// Calls body(i) for each i < n, in that order but for the threads' racing: put long tasks first. Rethrows what a task
// threw. Kernels may be called in tasks only.
template <typename Body>
void parallel_for(const Kernels& kernels, int threads, int64_t n, const Body& body) {
  struct Region {
    const Kernels& kernels;
    const Body& body;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
  } region{kernels, body, n, {}, {}, {}};

  const auto worker = [](void* context) {
    Region& r = *static_cast<Region*>(context);
    ThreadState state;
    r.kernels.enter(&state);
    try {
      for (int64_t i; (i = r.next.fetch_add(1)) < r.n;) r.body(i);
    } catch (...) {
      r.next = r.n;
      const std::lock_guard<std::mutex> lock(r.error_lock);
      if (!r.error) r.error = std::current_exception();
    }
    Workspace::own().trim();
    r.kernels.leave(&state);
  };
  run_workers(int(n < threads ? n : threads), worker, &region);
  if (region.error) std::rethrow_exception(region.error);
}

// Who works on one sequence or head: all threads, or the calling one alone where others have sequences of their own.
class Crew {
 public:
  Crew(const Kernels& kernels, int threads) : kernels_(kernels), threads_(threads) {}

  int threads() const { return threads_; }
  bool shared() const { return threads_ > 1; }
  Crew alone() const { return Crew(kernels_, 1); }

  // As parallel_for. Alone, the tasks run in order within the region that the caller is in.
  template <typename Body>
  void each(int64_t n, const Body& body) const {
    if (shared()) return parallel_for(kernels_, threads_, n, body);
    for (int64_t i = 0; i < n; ++i) body(i);
  }

 private:
  const Kernels& kernels_;
  int threads_;
};

// Calls body(i, crew) for each task, given their costs in multiply-adds: one too long for a single thread's share gets
// all threads; the others run side by side, the longest first.
template <typename Body>
void share_out(const Kernels& kernels, int threads, const std::vector<double>& costs, const Body& body) {
  struct Trimmed {
    ~Trimmed() { Workspace::own().trim(); }
  } trimmed;  // after a task that threw, too
  std::vector<int64_t> order(costs.size());
  double left = 0;
  for (size_t i = 0; i < costs.size(); ++i) order[i] = int64_t(i), left += costs[i];
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });

  constexpr double worth_sharing = 1e6;  // waking other threads costs as much as this
  if (left < worth_sharing) threads = 1;
  size_t first = 0;
  for (; threads > 1 && first < order.size() && costs[order[first]] * threads > left; ++first) {
    left -= costs[order[first]];
    body(order[first], Crew(kernels, threads));
  }
  const Crew alone(kernels, 1);
  parallel_for(kernels, threads, int64_t(order.size() - first), [&](int64_t i) { body(order[first + i], alone); });
}

}  // namespace safr
