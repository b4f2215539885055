// LoopNest -- up to 8 nested loops over tensors of any strides, made small on the host: what every
// generic kernel walks. The host merges dimensions that lie behind each other in all operands, so
// that a contiguous tensor is one loop; the device turns a step's number into byte offsets with a
// multiplication per dimension left over.
#pragma once

#include <cstdint>

#include "../checks.h"
#include "../tensor_view.h"

namespace cuda_int4 {

// n / divisor and n % divisor by a multiplication, for n < 2^31.
struct FastDivisor {
  uint32_t divisor, magic, shift;

  static FastDivisor of(uint32_t divisor) {
    FastDivisor d = {divisor, 0, 0};
    while ((uint64_t{1} << d.shift) < divisor) ++d.shift;
    d.magic = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << d.shift) - divisor)) / divisor + 1);
    return d;
  }
#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, magic) + n) >> shift;
  }
#endif
};

// What a kernel gets: the innermost dimension is the last one.
template <int kOperands>
struct DeviceLoop {
  uint32_t n_steps;
  int n_dims;
  FastDivisor sizes[kMaxDims];
  int64_t strides[kOperands][kMaxDims];  // in bytes, per step of that dimension

#ifdef __CUDACC__
  __device__ __forceinline__ void offsets(uint32_t step, int64_t (&offset)[kOperands]) const {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) offset[k] = 0;
    for (int d = n_dims - 1; d >= 0; --d) {
      const uint32_t outer = d > 0 ? sizes[d].divide(step) : 0;
      const int64_t at = step - outer * sizes[d].divisor;
#pragma unroll
      for (int k = 0; k < kOperands; ++k) offset[k] += at * strides[k][d];
      step = outer;
    }
  }
#endif
};

constexpr int kMaxOperands = 2 + 2 * kMaxDims;
constexpr int64_t kMaxSteps = INT32_MAX;  // of one launch; more are split on the host

struct LoopNest {
  int n_operands;
  int n_dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxOperands][kMaxDims];  // in bytes
  char* data[kMaxOperands];

  /// Operand k is `view`, broadcast to `sizes`, which must allow it.
  void set(int k, const TensorView& view) {
    data[k] = static_cast<char*>(view.data);
    const int missing = n_dims - view.ndim;
    for (int d = 0; d < n_dims; ++d) {
      const bool there = d >= missing && view.sizes[d - missing] != 1;
      strides[k][d] = there ? view.strides[d - missing] * dtype_bytes(view.dtype) : 0;
    }
  }

  int64_t n_steps() const {
    int64_t n = 1;
    for (int d = 0; d < n_dims; ++d) n *= sizes[d];
    return n;
  }

  /// The same elements in fewer dimensions, operand 0 in the order of its memory.
  void collapse() {
    drop_ones();
    sort_by_operand_0();
    for (int d = n_dims - 2; d >= 0; --d) {
      bool merges = true;
      for (int k = 0; k < n_operands; ++k)
        merges = merges && strides[k][d] == strides[k][d + 1] * sizes[d + 1];
      if (!merges) continue;
      sizes[d + 1] *= sizes[d];
      remove(d);
    }
  }

  /// Steps of `width` elements of the innermost dimension, which it divides, in place of one.
  void widen(int64_t width) {
    if (width == 1) return;
    sizes[n_dims - 1] /= width;
    for (int k = 0; k < n_operands; ++k) strides[k][n_dims - 1] *= width;
  }

  /// Whether operand k can be moved by `width` elements of `bytes` each at once: the innermost
  /// dimension has them side by side, and all addresses are multiples of `alignment`.
  bool has_vectors(int k, int64_t width, int64_t bytes, int64_t alignment) const {
    if (n_dims == 0 || sizes[n_dims - 1] % width != 0 || strides[k][n_dims - 1] != bytes ||
        reinterpret_cast<uintptr_t>(data[k]) % static_cast<uintptr_t>(alignment) != 0)
      return false;
    for (int d = 0; d < n_dims - 1; ++d)
      if (strides[k][d] % alignment != 0) return false;
    return true;
  }

  bool is_splat(int k) const { return n_dims == 0 || strides[k][n_dims - 1] == 0; }

  template <int kOperands>
  DeviceLoop<kOperands> device_loop() const {
    DeviceLoop<kOperands> loop = {};
    loop.n_steps = static_cast<uint32_t>(n_steps());
    loop.n_dims = n_dims;
    for (int d = 0; d < n_dims; ++d) {
      loop.sizes[d] = FastDivisor::of(static_cast<uint32_t>(sizes[d]));
      for (int k = 0; k < kOperands && k < n_operands; ++k) loop.strides[k][d] = strides[k][d];
    }
    return loop;
  }

  /// launch(nest) for pieces of at most kMaxSteps steps, until one fails.
  template <typename Launch>
  Status in_pieces(const Launch& launch) const {
    if (n_steps() <= kMaxSteps) return launch(*this);
    int longest = 0;
    for (int d = 1; d < n_dims; ++d)
      if (sizes[d] > sizes[longest]) longest = d;
    LoopNest first = *this, second = *this;
    first.sizes[longest] = sizes[longest] / 2;
    second.sizes[longest] = sizes[longest] - first.sizes[longest];
    for (int k = 0; k < n_operands; ++k)
      if (data[k] != nullptr) second.data[k] += first.sizes[longest] * strides[k][longest];
    const Status status = first.in_pieces(launch);
    return status.ok() ? second.in_pieces(launch) : status;
  }

 private:
  void remove(int dim) {
    --n_dims;
    for (int d = dim; d < n_dims; ++d) {
      sizes[d] = sizes[d + 1];
      for (int k = 0; k < n_operands; ++k) strides[k][d] = strides[k][d + 1];
    }
  }

  void drop_ones() {
    for (int d = n_dims - 1; d >= 0; --d)
      if (sizes[d] == 1) remove(d);
  }

  void swap(int d, int e) {
    const int64_t size = sizes[d];
    sizes[d] = sizes[e];
    sizes[e] = size;
    for (int k = 0; k < n_operands; ++k) {
      const int64_t stride = strides[k][d];
      strides[k][d] = strides[k][e];
      strides[k][e] = stride;
    }
  }

  void sort_by_operand_0() {
    const auto magnitude = [this](int d) {
      return strides[0][d] < 0 ? -strides[0][d] : strides[0][d];
    };
    for (int end = n_dims; end > 1; --end)
      for (int d = 0; d + 1 < end; ++d)
        if (magnitude(d) < magnitude(d + 1)) swap(d, d + 1);
  }
};

/// A nest over the sizes of `view`, with room for n_operands.
inline LoopNest loop_over(const TensorView& view, int n_operands) {
  LoopNest nest = {};
  nest.n_operands = n_operands;
  nest.n_dims = view.ndim;
  for (int d = 0; d < view.ndim; ++d) nest.sizes[d] = view.sizes[d];
  return nest;
}

}  // namespace cuda_int4
