// reduce -- out[o] = finish(combine over r of x[kept(o) + reduced(r)])
//
//   operand      dtype             shape                    order in memory        align
//   x            any of ten        any, up to 8 dimensions  any strides            dtype
//   out (out)    any of ten        [n_out]                  contiguous             dtype
//   index (out)  i64               [n_out]                  contiguous; or absent  8 B
//   mean (out)   dtype of out      [n_out]                  contiguous; or absent  dtype
//   partials     Op::Sum           [n_out, n_splits]        row-major scratch      16 B
//
// Requires  n_reduced >= 1 for extremes
// Grid      blocks of 256 threads: 256 / n_lanes outputs each, n_lanes threads along r for an output;
//           lanes next to each other take neighbouring r where r is innermost in x, else
//           neighbouring outputs. Few outputs of many r: gridDim.y blocks share an output, and a
//           second kernel combines their partials
// Bytes     reads x once; a [1, 128256] row is bound by latency
// Numerics  the order of combination depends on the sizes alone; sums in the reader's V (fp32 for
//           f16, bf16 and f32 into those, else fp64 or int64), one rounding at the store
// Source    own; variance by Chan's formula for merging counts, means and squares
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "any_dtype.cuh"
#include "launch_dependent.cuh"
#include "ptx.cuh"
#include "reduce.h"

namespace cuda_int4 {

constexpr int kReduceThreads = 256;
constexpr int kReduceUnroll = 4;  // loads in flight in a thread

// How the threads are laid over outputs and r: from the sizes alone, so that results do not depend
// on the device.
struct ReduceShape {
  int n_lanes;       // threads along r for one output, a power of two
  int lane_step;     // distance of an output's threads in the block
  int64_t n_blocks;  // of outputs
  int n_splits;      // blocks that share an output
  int64_t split_r;   // r of a split
};

inline ReduceShape reduce_shape(const ReduceArgs& args) {
  constexpr int64_t kBlocksWanted = 256, kLeastSplit = 1024, kMaxBlocks = int64_t{1} << 30;
  ReduceShape shape = {};
  const auto inner_stride = [](const Walk& walk) {
    return walk.ndim == 0 ? INT64_MAX : walk.strides[walk.ndim - 1];
  };
  const bool along_outputs = inner_stride(args.kept) < inner_stride(args.reduced);
  shape.n_lanes = 8;
  const int most_lanes = along_outputs ? 8 : kReduceThreads;
  while (shape.n_lanes < most_lanes && shape.n_lanes * kReduceUnroll < args.n_reduced)
    shape.n_lanes *= 2;
  const int n_outputs = kReduceThreads / shape.n_lanes;
  shape.lane_step = along_outputs ? n_outputs : 1;
  shape.n_blocks = (args.n_out + n_outputs - 1) / n_outputs;
  if (shape.n_blocks > kMaxBlocks) shape.n_blocks = kMaxBlocks;
  int64_t n_splits = 1;
  if (shape.n_blocks < kBlocksWanted / 2) {
    n_splits = kBlocksWanted / shape.n_blocks;
    const int64_t most = args.n_reduced * n_outputs / kLeastSplit;
    if (n_splits > most) n_splits = most;
    if (n_splits < 1) n_splits = 1;
  }
  shape.split_r = (args.n_reduced + n_splits - 1) / n_splits;
  if (shape.split_r < 1) shape.split_r = 1;
  shape.n_splits = static_cast<int>((args.n_reduced + shape.split_r - 1) / shape.split_r);
  if (shape.n_splits < 1) shape.n_splits = 1;
  return shape;
}

__device__ __forceinline__ int64_t offset_of(const Walk& walk, int64_t i) {
  int64_t offset = 0;
  for (int d = walk.ndim - 1; d > 0; --d) {
    offset += i % walk.sizes[d] * walk.strides[d];
    i /= walk.sizes[d];
  }
  return walk.ndim == 0 ? 0 : offset + i * walk.strides[0];
}

// `value` of the lane `offset` above, within groups of `width` lanes.
template <typename Sum>
__device__ __forceinline__ Sum shuffle_down(const Sum& value, int offset, int width) {
  static_assert(sizeof(Sum) % 4 == 0, "moved in words");
  Sum moved;
  uint32_t words[sizeof(Sum) / 4];
  memcpy(words, &value, sizeof(Sum));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(0xffffffffu, word, offset, width);
  memcpy(&moved, words, sizeof(Sum));
  return moved;
}

// The sums of an output's lanes, into lane 0; `slots` holds one a thread.
template <typename Op>
__device__ __forceinline__ void combine_lanes(const ReduceArgs& p, typename Op::Sum& sum,
                                              typename Op::Sum* slots, int lane, int n_lanes,
                                              int lane_step) {
  if (lane_step > 1) {  // each lane of an output is in a warp of its own
    slots[threadIdx.x] = sum;
    __syncthreads();
    for (int other = 1; lane == 0 && other < n_lanes; ++other)
      Op::combine(p, sum, slots[threadIdx.x + other * lane_step]);
    return;
  }
  const int width = n_lanes < 32 ? n_lanes : 32;
  for (int half = width / 2; half > 0; half /= 2)
    Op::combine(p, sum, shuffle_down(sum, half, width));
  if (n_lanes <= 32) return;
  if (lane % 32 == 0) slots[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int warp = 1; lane == 0 && warp < n_lanes / 32; ++warp)
    Op::combine(p, sum, slots[threadIdx.x / 32 + warp]);
}

template <typename Op, typename Reader>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(ReduceArgs p, ReduceShape shape, typename Op::Sum* partials) {
  using Sum = typename Op::Sum;
  __shared__ Sum slots[kReduceThreads];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int n_outputs = kReduceThreads / shape.n_lanes;
  const bool along_r = shape.lane_step == 1;
  const int lane = along_r ? threadIdx.x % shape.n_lanes : threadIdx.x / n_outputs;
  const int output = along_r ? threadIdx.x / shape.n_lanes : threadIdx.x % n_outputs;
  const int64_t r_begin = blockIdx.y * shape.split_r;
  const int64_t r_end = min(r_begin + shape.split_r, p.n_reduced);
  for (int64_t first = int64_t{blockIdx.x} * n_outputs; first < p.n_out;
       first += int64_t{gridDim.x} * n_outputs) {
    const int64_t o = first + output;
    Sum sum = Op::empty(p);
    if (o < p.n_out) {
      const int64_t base = offset_of(p.kept, o);
      for (int64_t first_r = r_begin + lane; first_r < r_end;
           first_r += int64_t{kReduceUnroll} * shape.n_lanes) {
        typename Reader::V values[kReduceUnroll];
#pragma unroll
        for (int i = 0; i < kReduceUnroll; ++i) {
          const int64_t r = first_r + int64_t{i} * shape.n_lanes;
          if (r < r_end) values[i] = Reader::at(p.x, p.dtype, base + offset_of(p.reduced, r));
        }
#pragma unroll
        for (int i = 0; i < kReduceUnroll; ++i) {
          const int64_t r = first_r + int64_t{i} * shape.n_lanes;
          if (r < r_end) Op::add(p, sum, values[i], r);
        }
      }
    }
    combine_lanes<Op>(p, sum, slots, lane, shape.n_lanes, shape.lane_step);
    if (lane == 0 && o < p.n_out) {
      if (partials == nullptr) {
        Op::finish(p, sum, o);
      } else {
        partials[o * gridDim.y + blockIdx.y] = sum;
      }
    }
    __syncthreads();  // before the next outputs overwrite slots
  }
}

// One block per output.
template <typename Op>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials_kernel(ReduceArgs p, int n_splits, const typename Op::Sum* partials) {
  __shared__ typename Op::Sum slots[kReduceThreads];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  typename Op::Sum sum = Op::empty(p);
  for (int i = threadIdx.x; i < n_splits; i += kReduceThreads)
    Op::combine(p, sum, partials[int64_t{blockIdx.x} * n_splits + i]);
  combine_lanes<Op>(p, sum, slots, threadIdx.x, kReduceThreads, 1);
  if (threadIdx.x == 0) Op::finish(p, sum, blockIdx.x);
}

template <typename Op, typename Reader>
cudaError_t launch_reduce(const ReduceArgs& args, void* scratch, cudaStream_t stream) {
  const ReduceShape shape = reduce_shape(args);
  using Sum = typename Op::Sum;
  static_assert(sizeof(Sum) <= 32, "reduce_scratch_bytes counts 32 bytes for each");
  Sum* partials = shape.n_splits > 1 ? static_cast<Sum*>(scratch) : nullptr;
  const dim3 grid(static_cast<unsigned>(shape.n_blocks), static_cast<unsigned>(shape.n_splits));
  const cudaError_t code = launch_dependent(reduce_kernel<Op, Reader>, grid, kReduceThreads, 0,
                                            stream, args, shape, partials);
  if (code != cudaSuccess || partials == nullptr) return code;
  return launch_dependent(reduce_partials_kernel<Op>, static_cast<unsigned>(args.n_out),
                          kReduceThreads, 0, stream, args, shape.n_splits, partials);
}

inline uint64_t reduce_scratch_bytes(const ReduceArgs& args) {
  if (args.n_out == 0) return 0;
  const ReduceShape shape = reduce_shape(args);
  return shape.n_splits > 1 ? uint64_t(args.n_out) * uint64_t(shape.n_splits) * 32 : 0;
}

// Each takes the reductions its file is named for.
cudaError_t launch_reduce_sums(const ReduceArgs& args, void* scratch, cudaStream_t stream);
cudaError_t launch_reduce_extremes(const ReduceArgs& args, void* scratch, cudaStream_t stream);
cudaError_t launch_reduce_moments(const ReduceArgs& args, void* scratch, cudaStream_t stream);

}  // namespace cuda_int4
