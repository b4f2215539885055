#include "temp_arena.h"

namespace cuda_int4 {

TempArena::~TempArena() {
  free_apart();
  device_.free(block_);
}

void* TempArena::allocate(size_t size, size_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > kDeviceAlignment)
    return nullptr;
  if (size > SIZE_MAX / 2) return nullptr;
  // Blocks start at kDeviceAlignment, so an aligned offset is an aligned address.
  const size_t at = (used_ + alignment - 1) / alignment * alignment;
  if (block_ != nullptr && at <= block_bytes_ && size <= block_bytes_ - at) {
    used_ = at + size;
    return block_ + at;
  }
  void* apart = device_.allocate(size);
  if (apart == nullptr) return nullptr;
  apart_.push_back(apart);
  apart_bytes_ += (size + kDeviceAlignment - 1) / kDeviceAlignment * kDeviceAlignment;
  return apart;
}

void TempArena::reset() {
  ++resets_;
  if (!apart_.empty()) {
    const size_t needed = used_ + kDeviceAlignment + apart_bytes_;
    free_apart();
    device_.free(block_);
    block_ = static_cast<uint8_t*>(device_.allocate(needed));
    block_bytes_ = block_ == nullptr ? 0 : needed;
    ++generation_;
  }
  used_ = 0;
  if (on_reset_) on_reset_();
}

void TempArena::free_apart() {
  for (void* pointer : apart_) device_.free(pointer);
  apart_.clear();
  apart_bytes_ = 0;
}

}  // namespace cuda_int4
