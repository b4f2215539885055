// group_norm -- y[n, c, i] = (x[n, c, i] - mean_ng) * rstd_ng * weight[c] + bias[c], c in group g
//               rstd = 1 / sqrt(mean((x - mean)^2) + eps)
// batch_norm -- y[n, c, i] = (x[n, c, i] - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c]
//
//   operand          dtype                   shape            order in memory          align
//   x                f16 | bf16 | f32 | f64  [N, C, inner]    row-major                dtype
//   weight, bias     any float               [C]              contiguous; or absent    dtype
//   y (out)          dtype of x              [N, C, inner]    row-major                dtype
//   mean, rstd       any float               [N, n_groups]    contiguous; batch_norm:  dtype
//                                                             in, mean and variance [C]
//
// Requires  C % n_groups == 0
// Grid      group_norm: a warp (4 to a block) or a block of up to 1024 threads per (n, g);
//           batch_norm: a thread per element
// Bytes     group_norm reads x three times, mostly from the L2; batch_norm once; both write y
// Numerics  fp32 (f64: fp64) in a fixed order; the mean first, then the squares about it; one
//           rounding at the store
// Source    own
#include <cuda_runtime.h>

#include <type_traits>

#include "any_dtype.cuh"
#include "block_reduce.cuh"
#include "row_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;

template <typename V>
__device__ __forceinline__ V value_or(const void* data, DType dtype, int64_t i, V otherwise) {
  return data == nullptr ? otherwise : static_cast<V>(load_double(data, dtype, i));
}

template <typename Reader>
__global__ void __launch_bounds__(1024) group_norm_kernel(GroupNormArgs p) {
  using V = typename Reader::V;
  __shared__ V sum_slots[32], square_slots[32];
  const int64_t channels = p.C / p.n_groups, n = channels * p.inner;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.N * p.n_groups;
       row += int64_t{gridDim.x} * blockDim.y) {
    V sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
      sum += Reader::at(p.x, p.dtype, row * n + i);
    const V mean = row_sum(sum, sum_slots) / static_cast<V>(n);
    V squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const V delta = Reader::at(p.x, p.dtype, row * n + i) - mean;
      squares += delta * delta;
    }
    const V variance = row_sum(squares, square_slots) / static_cast<V>(n);
    const V rstd = V(1) / sqrt(variance + static_cast<V>(p.eps));
    if (threadIdx.x == 0) {
      store_as(p.mean, p.moments_dtype, row, mean);
      store_as(p.rstd, p.moments_dtype, row, rstd);
    }
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const int64_t c = row % p.n_groups * channels + i / p.inner;
      const V value = (Reader::at(p.x, p.dtype, row * n + i) - mean) * rstd;
      store_as(p.y, p.dtype, row * n + i,
               value * value_or(p.weight, p.weight_dtype, c, V(1)) +
                   value_or(p.bias, p.bias_dtype, c, V(0)));
    }
  }
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) batch_norm_kernel(BatchNormArgs p) {
  using V = typename Reader::V;
  const int64_t numel = p.N * p.C * p.inner;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < numel;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t c = i / p.inner % p.C;
    const V mean = value_or(p.mean, p.mean_dtype, c, V(0));
    const V variance = value_or(p.variance, p.variance_dtype, c, V(1));
    const V rstd = V(1) / sqrt(variance + static_cast<V>(p.eps));
    const V value = (Reader::at(p.x, p.dtype, i) - mean) * rstd;
    store_as(p.y, p.dtype, i,
             value * value_or(p.weight, p.weight_dtype, c, V(1)) +
                 value_or(p.bias, p.bias_dtype, c, V(0)));
  }
}

template <typename F>
cudaError_t with_float_reader(DType dtype, F f) {
  return with_reader(dtype, dtype, [&](auto reader) {
    if constexpr (std::is_same_v<decltype(reader), ReadInt64>) {
      return cudaErrorInvalidValue;
    } else {
      return f(reader);
    }
  });
}

}  // namespace

cudaError_t launch_group_norm(const GroupNormArgs& args, cudaStream_t stream) {
  const int64_t n_rows = args.N * args.n_groups;
  if (n_rows == 0) return cudaSuccess;
  return with_float_reader(args.dtype, [&](auto reader) {
    const dim3 block = row_block(args.C / args.n_groups * args.inner, 4);
    group_norm_kernel<decltype(reader)><<<row_grid(n_rows, block.y), block, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

cudaError_t launch_batch_norm(const BatchNormArgs& args, cudaStream_t stream) {
  const int64_t numel = args.N * args.C * args.inner;
  if (numel == 0) return cudaSuccess;
  return with_float_reader(args.dtype, [&](auto reader) {
    batch_norm_kernel<decltype(reader)><<<row_grid(numel, kThreads), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace cuda_int4
