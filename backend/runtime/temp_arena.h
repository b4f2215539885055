// TempArena -- temporary memory of kernels: grows to what a method needs, then allocates no more.
#pragma once

#include <executorch/runtime/core/memory_allocator.h>

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "device.h"

namespace cuda_int4 {

/// What does not fit is allocated apart and, at the next reset, folded into one larger block: the
/// second call of a method with the same shapes allocates nothing. ExecuTorch resets it after every
/// instruction.
class TempArena final : public executorch::runtime::MemoryAllocator {
 public:
  explicit TempArena(Device& device) : MemoryAllocator(0, nullptr), device_(device) {}
  ~TempArena() override;
  TempArena(const TempArena&) = delete;
  TempArena& operator=(const TempArena&) = delete;

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override;
  void reset() override;
  /// One for each execution that began and each instruction that ran, a failed one too: the only
  /// place where ExecuTorch lets a caller see which instruction failed.
  size_t resets() const { return resets_; }
  /// Called in each of them.
  void set_on_reset(std::function<void()> on_reset) { on_reset_ = std::move(on_reset); }
  /// Counts the blocks there have been: addresses given out under another count are stale.
  size_t generation() const { return generation_; }

 private:
  void free_apart();

  Device& device_;
  uint8_t* block_ = nullptr;
  size_t block_bytes_ = 0;
  size_t used_ = 0;  // of block_
  size_t apart_bytes_ = 0;
  size_t resets_ = 0;
  size_t generation_ = 0;
  std::vector<void*> apart_;
  std::function<void()> on_reset_;
};

}  // namespace cuda_int4
