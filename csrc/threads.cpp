#include "threads.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <new>
#include <thread>

#if defined(__linux__)
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#endif

namespace safr {
namespace {

constexpr size_t kKept = 8 << 20;      // bytes a thread holds on to between calls
constexpr size_t kSmallest = 1 << 18;  // bytes of a chunk
constexpr size_t kHugePage = 2 << 20, kHugeChunk = 16 << 20;

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that the process has already, which is torch's own: two runtimes would fight over the cores.
GompParallel find_gomp_parallel() {
#if defined(__SANITIZE_THREAD__)
  return nullptr;  // its barriers are unknown to the sanitizer
#endif
  void* symbol = nullptr;
#if defined(__linux__)
  // Other packages bring copies of their own: the one that torch is linked to is found by torch's handle.
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* found) {
        if (!library->dlpi_name || !std::strstr(library->dlpi_name, "libtorch_cpu")) return 0;
        void* torch = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (torch) *static_cast<void**>(found) = dlsym(torch, "GOMP_parallel");
        return 1;
      },
      &symbol);
#endif
  if (!symbol) symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return reinterpret_cast<GompParallel>(symbol);
}

pid_t home_process = getpid();

}  // namespace

void Workspace::Free::operator()(char* p) const { std::free(p); }

Workspace& Workspace::own() {
  static thread_local Workspace workspace;
  return workspace;
}

void* Workspace::take_bytes(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  // A chunk that cannot hold the request is passed over until it is given back.
  while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size) ++chunk_, used_ = 0;
  if (chunk_ == chunks_.size()) {
    // A page fault costs as much as a thousand multiply-adds, and packed panels fill more small pages than a core
    // remembers. In between, huge pages would be filled to less than their size.
    const bool huge = chunks_.empty() || bytes >= kHugeChunk;
    const size_t unit = huge ? kHugePage : 64, least = bytes > kSmallest ? bytes : kSmallest;
    const size_t size = (least + unit - 1) / unit * unit;
    void* data = nullptr;
    if (posix_memalign(&data, unit, size) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(data, size, MADV_HUGEPAGE);
#endif
    chunks_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(data)), size});
  }
  void* start = chunks_[chunk_].data.get() + used_;
  used_ += bytes;
  return start;
}

void Workspace::trim() {
  if (chunk_ != 0 || used_ != 0) return;
  size_t total = 0;
  for (const Chunk& chunk : chunks_) total += chunk.size;
  if (total > kKept) chunks_.clear();
}

void set_home_process(int64_t pid) { home_process = pid_t(pid); }

void run_workers(int threads, void (*worker)(void*), void* context) {
  if (threads <= 1) {
    worker(context);
    return;
  }
  // After a fork, an OpenMP runtime waits for threads that the child does not have.
  static const GompParallel gomp_parallel = find_gomp_parallel();
  if (gomp_parallel && getpid() == home_process) {
    gomp_parallel(worker, context, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(worker, context);
  } catch (...) {
    // No thread or no memory left: those that did start, and this one, do all the work.
  }
  worker(context);
  for (std::thread& other : others) other.join();
}

}  // namespace safr
