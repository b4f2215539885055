// layer_norm -- y[r, d] = (x[r, d] - mean_r) * rstd_r * weight[d] + bias[d]
//               rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//
//   operand          dtype                   shape        order in memory  align
//   x                f16 | bf16 | f32 | f64  [n_rows, D]  row-major        dtype (16 B: fast)
//   weight, bias     any float               [D]          contiguous       likewise; or absent
//   y (out)          dtype of x              [n_rows, D]  row-major        as x; may be x itself
//   mean, rstd (out) any float               [n_rows]     contiguous       dtype
//
// Requires  nothing more; D == 0 gives mean 0 and rstd NaN
// Grid      one group of threads per row: a warp (4 to a block) or a block of up to 1024 threads
// Bytes     reads x once where 2 vectors a thread hold the row, else three times; writes y
// Numerics  fp32 (f64: fp64) in a fixed order; the mean first, then the squares about it; one
//           rounding at the store
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

constexpr int kHeld = 2;  // vectors of a row that a thread keeps in registers

// kVec > 1: weight and bias have the dtype of x or are absent.
template <typename X, typename V, int kVec>
__global__ void __launch_bounds__(1024) layer_norm_kernel(LayerNormArgs p) {
  using Vector = Elems<X, kVec>;
  __shared__ V sum_slots[32], square_slots[32];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t n_vectors = p.D / kVec;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.n_rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const Vector* x = static_cast<const Vector*>(p.x) + row * n_vectors;
    Vector* y = static_cast<Vector*>(p.y) + row * n_vectors;
    const int64_t first_unheld = threadIdx.x + int64_t{kHeld} * blockDim.x;
    Vector held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v < n_vectors) held[i] = x[v];
    }
    // f(vector, its number) for all of this thread's vectors.
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
        if (v < n_vectors) f(held[i], v);
      }
      for (int64_t v = first_unheld; v < n_vectors; v += blockDim.x) f(x[v], v);
    };

    V sum = 0;
    for_each([&](const Vector& vector, int64_t) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += static_cast<V>(vector.values[j]);
    });
    const V mean = p.D == 0 ? V(0) : row_sum(sum, sum_slots) / static_cast<V>(p.D);

    V squares = 0;
    for_each([&](const Vector& vector, int64_t) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const V delta = static_cast<V>(vector.values[j]) - mean;
        squares += delta * delta;
      }
    });
    const V variance = row_sum(squares, square_slots) / static_cast<V>(p.D);  // 0 / 0 is NaN
    const V rstd = V(1) / sqrt(variance + static_cast<V>(p.eps));
    if (threadIdx.x == 0) {
      store_as(p.mean, p.moments_dtype, row, mean);
      store_as(p.rstd, p.moments_dtype, row, rstd);
    }

    for_each([&](const Vector& vector, int64_t v) {
      Vector out, weight, bias;
      if constexpr (kVec > 1) {
        if (p.weight != nullptr) weight = static_cast<const Vector*>(p.weight)[v];
        if (p.bias != nullptr) bias = static_cast<const Vector*>(p.bias)[v];
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        V value = (static_cast<V>(vector.values[j]) - mean) * rstd;
        if constexpr (kVec > 1) {
          if (p.weight != nullptr) value *= static_cast<V>(weight.values[j]);
          if (p.bias != nullptr) value += static_cast<V>(bias.values[j]);
        } else {
          if (p.weight != nullptr) value *= load_double(p.weight, p.weight_dtype, v);
          if (p.bias != nullptr) value += load_double(p.bias, p.bias_dtype, v);
        }
        out.values[j] = static_cast<X>(value);
      }
      y[v] = out;
    });
  }
}

template <typename X, typename V, int kVec>
cudaError_t launch(const LayerNormArgs& args, cudaStream_t stream) {
  const dim3 block = row_block(args.D / kVec, kHeld);
  return launch_dependent(layer_norm_kernel<X, V, kVec>, row_grid(args.n_rows, block.y), block, 0,
                          stream, args);
}

template <typename X>
cudaError_t choose(const LayerNormArgs& args, cudaStream_t stream) {
  constexpr int kVec = kElemsPer16Bytes<X>;
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.y) |
      reinterpret_cast<uintptr_t>(args.weight) | reinterpret_cast<uintptr_t>(args.bias);
  const bool same_dtypes = (args.weight == nullptr || args.weight_dtype == args.dtype) &&
                           (args.bias == nullptr || args.bias_dtype == args.dtype);
  return same_dtypes && pointers % 16 == 0 && args.D % kVec == 0
             ? launch<X, float, kVec>(args, stream)
             : launch<X, float, 1>(args, stream);
}

}  // namespace

cudaError_t launch_layer_norm(const LayerNormArgs& args, cudaStream_t stream) {
  if (args.n_rows == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat16:
      return choose<__half>(args, stream);
    case DType::kBFloat16:
      return choose<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose<float>(args, stream);
    case DType::kFloat64:
      return launch<double, double, 1>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
