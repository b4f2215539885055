// softmax -- y[o, j, i] = exp(x[o, j, i] - max_j x) / sum_j exp(x[o, j, i] - max_j x)
//            or its logarithm, x - max - log(sum)
//
//   operand  dtype                   shape                  order in memory  align
//   x        f16 | bf16 | f32 | f64  [n_outer, n, n_inner]  row-major        dtype
//   y (out)  dtype of x, or f32      [n_outer, n, n_inner]  row-major        dtype; may be x itself
//
// Requires  nothing more
// Grid      n_inner == 1: a warp (4 to a block) or a block of up to 1024 threads per row;
//           else one thread per (o, i), which walks j: neighbours read neighbours
// Bytes     reads x once where a row is at most 8192 long (8 values a thread stay in registers), else
//           three times; writes y
// Numerics  fp32 (f64: fp64), sums in a fixed order, one rounding at the store; a row of -inf, or
//           with a NaN or inf, is NaN
// Source    own
#include <cuda_runtime.h>

#include <type_traits>

#include "any_dtype.cuh"
#include "block_reduce.cuh"
#include "launch_dependent.cuh"
#include "ptx.cuh"
#include "row_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kHeld = 8;
constexpr int kColumnThreads = 128;

template <typename X, typename Y>
__global__ void __launch_bounds__(1024) softmax_rows_kernel(SoftmaxArgs p) {
  __shared__ float max_slots[32], sum_slots[32];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.n_outer;
       row += int64_t{gridDim.x} * blockDim.y) {
    const X* x = static_cast<const X*>(p.x) + row * p.n;
    Y* y = static_cast<Y*>(p.y) + row * p.n;
    const int64_t first_unheld = threadIdx.x + int64_t{kHeld} * blockDim.x;
    float held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t j = threadIdx.x + int64_t{i} * blockDim.x;
      held[i] = j < p.n ? as_float(x[j]) : -INFINITY;
    }
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) max = fmaxf(max, held[i]);
    for (int64_t j = first_unheld; j < p.n; j += blockDim.x) max = fmaxf(max, as_float(x[j]));
    max = row_max(max, max_slots);

    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (threadIdx.x + int64_t{i} * blockDim.x >= p.n) continue;
      const float power = expf(held[i] - max);
      sum += power;
      held[i] = p.is_log ? held[i] - max : power;
    }
    for (int64_t j = first_unheld; j < p.n; j += blockDim.x) sum += expf(as_float(x[j]) - max);
    sum = row_sum(sum, sum_slots);

    // One division a row: a quotient for each value takes the time of its expf again.
    const float log_sum = p.is_log ? logf(sum) : 0.f, factor = 1.f / sum;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t j = threadIdx.x + int64_t{i} * blockDim.x;
      if (j < p.n) y[j] = from_float<Y>(p.is_log ? held[i] - log_sum : held[i] * factor);
    }
    for (int64_t j = first_unheld; j < p.n; j += blockDim.x) {
      const float value = as_float(x[j]) - max;
      y[j] = from_float<Y>(p.is_log ? value - log_sum : expf(value) * factor);
    }
  }
}

// Any dtype, any n_inner.
template <typename Reader>
__global__ void __launch_bounds__(kColumnThreads) softmax_columns_kernel(SoftmaxArgs p) {
  using V = typename Reader::V;
  const int64_t n_columns = p.n_outer * p.n_inner;
  for (int64_t column = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x; column < n_columns;
       column += int64_t{gridDim.x} * kColumnThreads) {
    const int64_t base = column / p.n_inner * p.n * p.n_inner + column % p.n_inner;
    const auto x = [&](int64_t j) { return Reader::at(p.x, p.dtype, base + j * p.n_inner); };
    V max = -INFINITY;
    for (int64_t j = 0; j < p.n; ++j) {
      const V value = x(j);
      if (value > max) max = value;
    }
    V sum = 0;
    for (int64_t j = 0; j < p.n; ++j) sum += exp(x(j) - max);
    const V log_sum = p.is_log ? log(sum) : V(0);
    for (int64_t j = 0; j < p.n; ++j) {
      const V value = x(j) - max;
      store_as(p.y, p.out_dtype, base + j * p.n_inner,
               p.is_log ? value - log_sum : exp(value) / sum);
    }
  }
}

template <typename X, typename Y>
cudaError_t launch_rows(const SoftmaxArgs& args, cudaStream_t stream) {
  const dim3 block = row_block(args.n, kHeld);
  return launch_dependent(softmax_rows_kernel<X, Y>, row_grid(args.n_outer, block.y), block, 0,
                          stream, args);
}

template <typename X>
cudaError_t choose_rows(const SoftmaxArgs& args, cudaStream_t stream) {
  return args.out_dtype == args.dtype ? launch_rows<X, X>(args, stream)
                                      : launch_rows<X, float>(args, stream);
}

}  // namespace

cudaError_t launch_softmax(const SoftmaxArgs& args, cudaStream_t stream) {
  if (args.n_outer == 0 || args.n == 0 || args.n_inner == 0) return cudaSuccess;
  if (args.n_inner == 1 && args.dtype == DType::kFloat16) return choose_rows<__half>(args, stream);
  if (args.n_inner == 1 && args.dtype == DType::kBFloat16)
    return choose_rows<__nv_bfloat16>(args, stream);
  if (args.n_inner == 1 && args.dtype == DType::kFloat32)
    return launch_rows<float, float>(args, stream);
  return with_reader(args.dtype, args.out_dtype, [&](auto reader) {
    using Reader = decltype(reader);
    if constexpr (std::is_same_v<typename Reader::V, int64_t>) {
      return cudaErrorInvalidValue;
    } else {
      softmax_columns_kernel<Reader>
          <<<row_grid(args.n_outer * args.n_inner, kColumnThreads), kColumnThreads, 0, stream>>>(
              args);
      return cudaGetLastError();
    }
  });
}

}  // namespace cuda_int4
