// The kernel of rms_norm.cu and add_rms_norm.cu, whose contracts it keeps: one group of threads per
// row, which adds a residual to it (kAdds), norms it ahead of that (kNormsX), and norms it.
#pragma once

#include "launch_dependent.cuh"
#include "norm_weight.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "quantize_group.cuh"

namespace cuda_int4 {

struct NormRowsArgs {  // device pointers; sizes in elements
  const void* x;
  const void* residual;  // of kAdds
  const void* weight;    // nullptr: 1
  const void* x_norm;    // of kNormsX
  void* sum;             // of kAdds
  void* y;
  QuantizedRows quantized;  // y once more
  DType dtype, weight_dtype, x_norm_dtype;
  bool constant_weights;  // ExecutionContext
  int64_t n_rows, D;
  float eps;
};

namespace norm_rows {

constexpr int kHeld = 2;                     // vectors of a row that a thread keeps in registers
constexpr int kMaxThreads = 512;             // of a block; 1024 of them spill
constexpr int kWarpRowVectors = 32 * kHeld;  // up to here a warp takes a row
constexpr int kWarpRows = 4;                 // rows of such a block
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

template <typename X, int kVec>
__device__ __forceinline__ Elems<X, kVec> added(const Elems<X, kVec>& a, const Elems<X, kVec>& b) {
  Elems<X, kVec> sum;
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    // Of float32 too the product before it is rounded: no fma.
    sum.values[i] = from_float<X>(__fadd_rn(as_float(a.values[i]), as_float(b.values[i])));
  return sum;
}

template <typename X, typename W, int kVec>
__device__ __forceinline__ Elems<X, kVec> normed(const Elems<X, kVec>& x, float factor,
                                                 bool is_weighted, const NormWeight<W, kVec>& w) {
  Elems<X, kVec> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float value = as_float(x.values[i]) * factor;
    if (is_weighted) value *= w[i];
    out.values[i] = from_float<X>(value);
  }
  return out;
}

template <typename X, typename W, int kVec, bool kAdds, bool kNormsX>
__global__ void __launch_bounds__(kMaxThreads)
    norm_rows_kernel(const __grid_constant__ NormRowsArgs p) {
  using Vector = Elems<X, kVec>;
  // Wider weights than x would take 32 registers a vector.
  constexpr bool kWeightAhead = sizeof(NormWeight<W, kVec>) <= 16;
  __shared__ float warp_sums[2][32];
  griddepcontrol_launch_dependents();
  const int64_t n_vectors = p.D / kVec;
  const int64_t n_tokens = p.quantized.a == nullptr ? p.n_rows : p.quantized.n_tokens;
  const bool is_weighted = p.weight != nullptr;
  int parity = 0;  // the sums of one row are read while the next are written
  const auto row_sum = [&](float value) {
    value = warp_sum(value);
    if (blockDim.x == 32) return value;
    const int lane = threadIdx.x % 32;  // the block has one row
    if (lane == 0) warp_sums[parity][threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_sum(lane < blockDim.x / 32 ? warp_sums[parity][lane] : 0.f);
    parity ^= 1;
    return value;
  };
  const auto factor_of = [&](float squares) {
    return 1.f / sqrtf(row_sum(squares) / static_cast<float>(p.D) + p.eps);
  };
  const auto squares_of = [](const Vector& vector, float squares) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float value = as_float(vector.values[i]);
      squares = fmaf(value, value, squares);
    }
    return squares;
  };

  bool is_first = true;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < n_tokens;
       row += int64_t{gridDim.x} * blockDim.y) {
    NormWeight<W, kVec> weight[kHeld], x_norm[kHeld];
    const auto load_weights = [&] {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
        if (!kWeightAhead || v >= n_vectors) continue;
        if (is_weighted) weight[i].load(p.weight, p.weight_dtype, v);
        if (kNormsX) x_norm[i].load(p.x_norm, p.x_norm_dtype, v);
      }
    };
    const bool is_early = is_first && p.constant_weights;
    if (is_early) load_weights();
    if (is_first) griddepcontrol_wait();
    if (!is_early) load_weights();
    is_first = false;
    if (row >= p.n_rows) {  // quantised, the rows are padded
      for (int64_t j = threadIdx.x; j < p.D / kQuantizedGroup; j += blockDim.x)
        p.quantized.parameter[j * n_tokens + row] = {0.f, 0};
      continue;
    }

    const Vector* x = static_cast<const Vector*>(p.x) + row * n_vectors;
    const Vector* residual = static_cast<const Vector*>(p.residual) + row * n_vectors;
    Vector* sum = static_cast<Vector*>(p.sum) + row * n_vectors;
    Vector* y = static_cast<Vector*>(p.y) + row * n_vectors;
    const int64_t behind = threadIdx.x + int64_t{kHeld} * blockDim.x;
    Vector held[kHeld], other[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v >= n_vectors) continue;
      held[i] = x[v];
      if (kAdds) other[i] = residual[v];
    }

    float x_factor = 1.f;
    if constexpr (kNormsX) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (threadIdx.x + int64_t{i} * blockDim.x < n_vectors)
          squares = squares_of(held[i], squares);
      }
      for (int64_t v = behind; v < n_vectors; v += blockDim.x) squares = squares_of(x[v], squares);
      x_factor = factor_of(squares);
    }

    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v >= n_vectors) continue;
      if constexpr (kNormsX) {
        if (!kWeightAhead) x_norm[i].load(p.x_norm, p.x_norm_dtype, v);
        held[i] = normed<X, W, kVec>(held[i], x_factor, true, x_norm[i]);
      }
      if constexpr (kAdds) {
        held[i] = added<X, kVec>(held[i], other[i]);
        sum[v] = held[i];
      }
      squares = squares_of(held[i], squares);
    }
    for (int64_t v = behind; v < n_vectors; v += blockDim.x) {
      Vector vector = x[v];
      if constexpr (kNormsX) {
        NormWeight<W, kVec> w;
        w.load(p.x_norm, p.x_norm_dtype, v);
        vector = normed<X, W, kVec>(vector, x_factor, true, w);
      }
      if constexpr (kAdds) {
        vector = added<X, kVec>(vector, residual[v]);
        sum[v] = vector;
      }
      squares = squares_of(vector, squares);
    }
    const float factor = factor_of(squares);

    const auto write = [&](int64_t v, const Vector& vector, const NormWeight<W, kVec>& w) {
      const Vector out = normed<X, W, kVec>(vector, factor, is_weighted, w);
      y[v] = out;
      if (p.quantized.a == nullptr) return;
      float values[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = as_float(out.values[i]);
      quantize_group<kVec>(p.quantized, values, row, v * kVec);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v >= n_vectors) continue;
      if (!kWeightAhead && is_weighted) weight[i].load(p.weight, p.weight_dtype, v);
      write(v, held[i], weight[i]);
    }
    for (int64_t v = behind; v < n_vectors; v += blockDim.x) {
      NormWeight<W, kVec> w;
      if (is_weighted) w.load(p.weight, p.weight_dtype, v);
      write(v, kAdds ? sum[v] : x[v], w);
    }
  }
}

template <typename X, typename W, int kVec, bool kAdds, bool kNormsX>
cudaError_t launch(const NormRowsArgs& args, cudaStream_t stream) {
  const int64_t n_vectors = args.D / kVec;
  dim3 block(32, kWarpRows);
  if (n_vectors > kWarpRowVectors) {
    // As many turns as it takes, of threads that have as much to do.
    const int64_t turns = (n_vectors + kMaxThreads - 1) / kMaxThreads;
    const int64_t threads = (n_vectors + 32 * turns - 1) / (32 * turns) * 32;
    block = dim3(static_cast<unsigned>(threads), 1);
  }
  const int64_t n_tokens = args.quantized.a == nullptr ? args.n_rows : args.quantized.n_tokens;
  const int64_t blocks = (n_tokens + block.y - 1) / block.y;
  return launch_dependent(norm_rows_kernel<X, W, kVec, kAdds, kNormsX>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), block,
                          0, stream, args);
}

template <typename X, bool kAdds, bool kNormsX>
cudaError_t choose_weight(const NormRowsArgs& args, cudaStream_t stream) {
  constexpr int kVec = kElemsPer16Bytes<X>;
  uintptr_t pointers = 0;
  for (const void* pointer : {args.x, args.residual, args.weight, args.x_norm,
                              static_cast<const void*>(args.sum), static_cast<const void*>(args.y)})
    pointers |= reinterpret_cast<uintptr_t>(pointer);
  const auto weights_are = [&](DType dtype) {
    return (args.weight == nullptr || args.weight_dtype == dtype) &&
           (!kNormsX || args.x_norm_dtype == dtype);
  };
  if (args.D % kVec == 0 && pointers % 16 == 0) {
    if (weights_are(args.dtype)) return launch<X, X, kVec, kAdds, kNormsX>(args, stream);
    if (weights_are(DType::kFloat32)) return launch<X, float, kVec, kAdds, kNormsX>(args, stream);
  }
  return launch<X, AnyFloat, 1, kAdds, kNormsX>(args, stream);
}

template <bool kAdds, bool kNormsX>
cudaError_t choose(const NormRowsArgs& args, cudaStream_t stream) {
  if (args.n_rows == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat16:
      return choose_weight<__half, kAdds, kNormsX>(args, stream);
    case DType::kBFloat16:
      return choose_weight<__nv_bfloat16, kAdds, kNormsX>(args, stream);
    case DType::kFloat32:
      return choose_weight<float, kAdds, kNormsX>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace norm_rows

}  // namespace cuda_int4
