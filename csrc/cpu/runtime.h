// Workspace memory and threads of a call.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <functional>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispersion.h"

namespace dk {

// ---- memory

constexpr size_t kHugePage = size_t(2) << 20;

// Advises the kernel to use huge pages in [data, data + bytes), which saves page faults and TLB misses.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = (uintptr_t)data;
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  if (bytes >= 2 * kHugePage) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Workspace memory, in huge pages where the system has them. A block of at most kRetained bytes is kept for the next
// call: faulting its pages in again would cost as much as packing into them.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    block_ = retained().exchange(nullptr);
    if (block_ && block_->bytes >= bytes) return;
    release(block_);
    block_ = allocate(bytes);
  }
  ~Workspace() {
    if (block_ && block_->bytes <= kRetained) block_ = retained().exchange(block_);
    release(block_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return block_ ? block_->data : nullptr; }

 private:
  static constexpr size_t kRetained = size_t(48) << 20;
  struct Block {
    size_t bytes;
    char* data;
  };

  static std::atomic<Block*>& retained() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  static Block* allocate(size_t bytes) {
    const size_t rounded = size_t(round_up(int64_t(bytes), int64_t(kHugePage)));
#if defined(_WIN32)
    char* data = (char*)_aligned_malloc(rounded, 4096);
#else
    void* memory = nullptr;
    char* data = posix_memalign(&memory, kHugePage, rounded) ? nullptr : (char*)memory;
#endif
    if (!data) return nullptr;
    advise_huge_pages(data, rounded);
    return new (std::nothrow) Block{rounded, data};
  }
  static void release(Block* block) {
    if (!block) return;
#if defined(_WIN32)
    _aligned_free(block->data);
#else
    free(block->data);
#endif
    delete block;
  }

  Block* block_;
};

// Allocation of exactly `bytes`, whose end is watched; defined by the driver of tests/sanitizers.
#if defined(DK_GUARDED)
extern "C" void* dk_guarded_allocate(size_t bytes);
extern "C" void dk_guarded_release(void* allocation);
#endif

// Pieces of a workspace, handed out in order; without memory (data NULL) the arena only counts bytes. With DK_GUARDED
// every piece is a separate allocation, because a sanitizer does not see the end of a piece within a larger one.
class Arena {
 public:
  explicit Arena(char* data) : data_(data) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class T>
  T* take(size_t count) {
    char* piece = data_ ? data_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
#if defined(DK_GUARDED)
    if (piece) piece = (char*)guarded_.emplace_back(dk_guarded_allocate(count * sizeof(T)));
#endif
    return (T*)piece;
  }
  size_t used() const { return used_; }
#if defined(DK_GUARDED)
  ~Arena() {
    for (void* piece : guarded_) dk_guarded_release(piece);
  }
#endif

 private:
  char* data_;
  size_t used_ = 0;
#if defined(DK_GUARDED)
  std::vector<void*> guarded_;
#endif
};

// Memory of one worker, without the members for sampled calls alone.
inline Scratch take_scratch(Arena& arena, int panel, int64_t padded_features) {
  Scratch scratch = {};
  scratch.weights = arena.take<float>(size_t(kLargestPadded) * kWeightStride);
  scratch.column_sum = arena.take<float>(kLargestPadded);
  scratch.rows = arena.take<float>(size_t(panel * spare_stride(padded_features)));
  return scratch;
}

// ---- threads

struct Threads {
  dk_parallel_for parallel_for;
  int count;

  // Calls work(worker) for each worker in [0, workers).
  void run(int64_t workers, const std::function<void(int64_t)>& work) const {
    if (workers > 1 && parallel_for) {
      const auto body = [](int64_t begin, int64_t end, void* context) {
        for (int64_t w = begin; w < end; ++w) (*(const std::function<void(int64_t)>*)context)(w);
      };
      if (parallel_for(0, workers, 1, body, (void*)&work) == 0) return;
    }
    for (int64_t w = 0; w < workers; ++w) work(w);
  }
};

inline void relax() {
#if defined(__aarch64__)
  __asm__ volatile("yield");
#else
  __builtin_ia32_pause();
#endif
}

inline void wait_for(const std::atomic<int32_t>& progress, int32_t needed) {
  for (int spins = 0; progress.load(std::memory_order_acquire) < needed; ++spins) {
    if (spins < 2000)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace dk
