// cumsum -- y[o, j, i] = sum over j' <= j of x[o, j', i]
// glu    -- y[o, h, i] = x[o, h, i] * sigmoid(x[o, half + h, i])
//
//   operand  dtype       shape                                 order in memory  align
//   x        any of ten  [n_outer, n, n_inner]                 row-major        dtype
//                        glu: float, [n_outer, 2 half, n_inner]
//   y (out)  any of ten  [n_outer, n or half, n_inner]         row-major        dtype
//
// Requires  nothing more
// Grid      cumsum: n_inner == 1: a block of 256 threads per row, 4 neighbours a thread and step;
//           else a thread per (o, i). glu: a thread per y
// Bytes     reads x and writes y once
// Numerics  cumsum in fp64, or int64 where y is of integers: one rounding at each store; glu in fp32
//           (f64: fp64)
// Source    own
#include <cuda_runtime.h>

#include <type_traits>

#include "any_dtype.cuh"
#include "block_reduce.cuh"
#include "row_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;

template <typename V>
__device__ __forceinline__ V warp_inclusive_sum(V value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const V below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) cumsum_rows_kernel(CumsumArgs p) {
  using V = typename Reader::V;
  __shared__ V warp_sums[2][kWarps];
  int parity = 0;  // a step's sums are read while the next step's are written
  for (int64_t row = blockIdx.x; row < p.n_outer; row += gridDim.x) {
    const int64_t base = row * p.n;
    V before = 0;
    for (int64_t step = 0; step < p.n; step += kThreads * kPerThread, parity ^= 1) {
      const int64_t first = step + int64_t{threadIdx.x} * kPerThread;
      V values[kPerThread];
      V sum = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (first + i < p.n) sum += Reader::at(p.x, p.dtype, base + first + i);
        values[i] = sum;
      }
      const V through = warp_inclusive_sum(sum);
      if (threadIdx.x % 32 == 31) warp_sums[parity][threadIdx.x / 32] = through;
      __syncthreads();
      // Not through - sum: an infinity in this thread must not reach its own first values.
      const V below = __shfl_up_sync(0xffffffffu, through, 1);
      V offset = before;
      for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < threadIdx.x / 32) offset += warp_sums[parity][warp];
        before += warp_sums[parity][warp];
      }
      if (threadIdx.x % 32 > 0) offset += below;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (first + i < p.n) store_as(p.y, p.out_dtype, base + first + i, offset + values[i]);
      }
    }
  }
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) cumsum_columns_kernel(CumsumArgs p) {
  using V = typename Reader::V;
  for (int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
       column < p.n_outer * p.n_inner; column += int64_t{gridDim.x} * kThreads) {
    const int64_t base = column / p.n_inner * p.n * p.n_inner + column % p.n_inner;
    V sum = 0;
    for (int64_t j = 0; j < p.n; ++j) {
      sum += Reader::at(p.x, p.dtype, base + j * p.n_inner);
      store_as(p.y, p.out_dtype, base + j * p.n_inner, sum);
    }
  }
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) glu_kernel(GluArgs p) {
  using V = typename Reader::V;
  const int64_t per_outer = p.half * p.n_inner;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.n_outer * per_outer;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t at = i / per_outer * 2 * per_outer + i % per_outer;
    const V gate = Reader::at(p.x, p.dtype, at + per_outer);
    store_as(p.y, p.dtype, i, Reader::at(p.x, p.dtype, at) / (V(1) + exp(-gate)));
  }
}

template <typename Reader>
cudaError_t launch(const CumsumArgs& args, cudaStream_t stream) {
  if (args.n_inner == 1) {
    cumsum_rows_kernel<Reader><<<row_grid(args.n_outer, 1), kThreads, 0, stream>>>(args);
  } else {
    cumsum_columns_kernel<Reader>
        <<<row_grid(args.n_outer * args.n_inner, kThreads), kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_cumsum(const CumsumArgs& args, cudaStream_t stream) {
  if (args.n_outer == 0 || args.n == 0 || args.n_inner == 0) return cudaSuccess;
  const bool to_float = args.out_dtype == DType::kFloat16 || args.out_dtype == DType::kBFloat16 ||
                        args.out_dtype == DType::kFloat32 || args.out_dtype == DType::kFloat64;
  return to_float ? launch<ReadDouble>(args, stream) : launch<ReadInt64>(args, stream);
}

cudaError_t launch_glu(const GluArgs& args, cudaStream_t stream) {
  const int64_t numel = args.n_outer * args.half * args.n_inner;
  if (numel == 0) return cudaSuccess;
  return with_reader(args.dtype, args.dtype, [&](auto reader) {
    if constexpr (std::is_same_v<decltype(reader), ReadInt64>) {
      return cudaErrorInvalidValue;
    } else {
      glu_kernel<decltype(reader)><<<row_grid(numel, kThreads), kThreads, 0, stream>>>(args);
      return cudaGetLastError();
    }
  });
}

}  // namespace cuda_int4
