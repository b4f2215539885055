// A sum or a maximum over all threads of a block, or over a warp where a block has several rows.
#pragma once

#include "numeric.cuh"

namespace cuda_int4 {

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Over the blockDim.x threads of a row; every one of them gets the result. blockDim.x is a multiple
// of 32, and blockDim.y is 1 unless it is 32. `slots` holds one value a warp; calls that follow one
// another take turns with two sets of slots, which saves a barrier.
template <typename V>
__device__ __forceinline__ V row_sum(V value, V* slots) {
  value = warp_sum(value);
  if (blockDim.x == 32) return value;
  const int lane = threadIdx.x % 32;
  if (lane == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? slots[lane] : V(0));
}

__device__ __forceinline__ float row_max(float value, float* slots) {
  value = warp_max(value);
  if (blockDim.x == 32) return value;
  const int lane = threadIdx.x % 32;
  if (lane == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_max(lane < blockDim.x / 32 ? slots[lane] : -INFINITY);
}

// blockDim for rows of n loads where a thread keeps `held` of them: a warp a row, 4 to a block, while
// that holds them all; else one row a block.
inline dim3 row_block(int64_t n, int held) {
  constexpr int64_t kMostThreads = 1024;
  if (n <= 32 * held) return dim3(32, 4);
  const int64_t threads = (n + 32 * held - 1) / (32 * held) * 32;
  return dim3(static_cast<unsigned>(threads < kMostThreads ? threads : kMostThreads), 1);
}

// Blocks for n_rows, `rows` to a block; more rows than a grid holds are walked in strides.
inline unsigned row_grid(int64_t n_rows, unsigned rows) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  const int64_t n_blocks = (n_rows + rows - 1) / rows;
  return static_cast<unsigned>(n_blocks < kMostBlocks ? n_blocks : kMostBlocks);
}

}  // namespace cuda_int4
