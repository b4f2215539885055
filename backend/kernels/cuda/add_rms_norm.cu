// add_rms_norm -- sum[r, d] = x[r, d] + residual[r, d]
//                 y[r, d] = sum[r, d] / sqrt(mean(sum[r, :]^2) + eps) * weight[d]
//
//   operand    dtype             shape        order in memory  align
//   x          f16 | bf16 | f32  [n_rows, D]  row-major        dtype (16 B, D in whole 16 B: fast)
//   residual   dtype of x        [n_rows, D]  row-major        as x
//   weight     f16 | bf16 | f32  [D]          contiguous       dtype (likewise); absent means 1
//   sum (out)  dtype of x        [n_rows, D]  row-major        as x; may be x or residual itself
//   y (out)    dtype of x        [n_rows, D]  row-major        as x; no other operand
//
// Requires  D >= 1   (checked by validate_add_rms_norm)
// Grid      one group of threads per row: a warp (4 to a block) up to 2 vectors a lane, a block of
//           up to 1024 threads above; rows beyond the grid's limit in strides
// Bytes     reads x, residual and weight, writes sum and y; a single row is bound by latency: x,
//           residual and a weight no wider are asked for at once, the first 2 vectors of a thread stay in
//           registers; of longer rows a thread reads back what it has written itself
// Numerics  the sum is rounded once and normed as rounded; fp32 sum of squares in the order of
//           rms_norm.cu, 1 / sqrt correctly rounded, one rounding at the store: the bits of an
//           addition and that kernel
// Source    own
#include "add_rms_norm.cuh"
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kHeld = 2;                     // vectors of a row that a thread keeps in registers
constexpr int kMaxThreads = 1024;            // of a block
constexpr int kWarpRowVectors = 32 * kHeld;  // up to here a warp takes a row
constexpr int kWarpRows = 4;                 // rows of such a block
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

struct AnyFloat {};  // a weight whose dtype is looked at per element; one element at a time

// What a lane loads of the weight in one go, and the values of it.
template <typename W, int kVec>
struct Weight {
  Elems<W, kVec> loaded;
  __device__ __forceinline__ void load(const AddRmsNormKernelArgs& p, int64_t vector) {
    loaded = static_cast<const Elems<W, kVec>*>(p.weight)[vector];
  }
  __device__ __forceinline__ float operator[](int i) const { return as_float(loaded.values[i]); }
};

template <>
struct Weight<AnyFloat, 1> {
  float loaded;
  __device__ __forceinline__ void load(const AddRmsNormKernelArgs& p, int64_t d) {
    if (p.weight_dtype == DType::kFloat32) {
      loaded = static_cast<const float*>(p.weight)[d];
    } else if (p.weight_dtype == DType::kFloat16) {
      loaded = as_float(static_cast<const __half*>(p.weight)[d]);
    } else {
      loaded = as_float(static_cast<const __nv_bfloat16*>(p.weight)[d]);
    }
  }
  __device__ __forceinline__ float operator[](int) const { return loaded; }
};

template <typename X, int kVec>
__device__ __forceinline__ Elems<X, kVec> added(const Elems<X, kVec>& a, const Elems<X, kVec>& b) {
  Elems<X, kVec> sum;
#pragma unroll
  for (int j = 0; j < kVec; ++j)
    sum.values[j] = from_float<X>(as_float(a.values[j]) + as_float(b.values[j]));
  return sum;
}

template <typename X, typename W, int kVec>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(AddRmsNormKernelArgs p) {
  using Vector = Elems<X, kVec>;
  // Wider weights than x would spill: 64 registers for each of 1024 threads.
  constexpr bool kWeightAhead = sizeof(Weight<W, kVec>) <= 16;
  __shared__ float warp_sums[2][32];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t n_vectors = p.D / kVec;
  int parity = 0;  // a row's sums are read while the next row's are written
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.n_rows;
       row += int64_t{gridDim.x} * blockDim.y, parity ^= 1) {
    const Vector* x = static_cast<const Vector*>(p.x) + row * n_vectors;
    const Vector* residual = static_cast<const Vector*>(p.residual) + row * n_vectors;
    Vector* sum = static_cast<Vector*>(p.sum) + row * n_vectors;
    Vector* y = static_cast<Vector*>(p.y) + row * n_vectors;

    Vector held[kHeld], other[kHeld];
    Weight<W, kVec> weight[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v < n_vectors) {
        held[i] = x[v];
        other[i] = residual[v];
        if (kWeightAhead && p.weight != nullptr) weight[i].load(p, v);
      }
    }

    float squares = 0.f;
    const auto add_squares = [&](const Vector& vector) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float value = as_float(vector.values[j]);
        squares = fmaf(value, value, squares);
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v < n_vectors) {
        held[i] = added<X, kVec>(held[i], other[i]);
        sum[v] = held[i];
        add_squares(held[i]);
      }
    }
    for (int64_t v = threadIdx.x + int64_t{kHeld} * blockDim.x; v < n_vectors; v += blockDim.x) {
      const Vector vector = added<X, kVec>(x[v], residual[v]);
      sum[v] = vector;
      add_squares(vector);
    }

    squares = warp_sum(squares);
    if (blockDim.x > 32) {  // then the block has one row
      if (threadIdx.x % 32 == 0) warp_sums[parity][threadIdx.x / 32] = squares;
      __syncthreads();
      const int lane = threadIdx.x % 32;
      squares = warp_sum(lane < blockDim.x / 32 ? warp_sums[parity][lane] : 0.f);
    }
    const float factor = 1.f / sqrtf(squares / static_cast<float>(p.D) + p.eps);

    const auto write = [&](int64_t v, const Vector& vector, const Weight<W, kVec>& w) {
      Vector out;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        float value = as_float(vector.values[j]) * factor;
        if (p.weight != nullptr) value *= w[j];
        out.values[j] = from_float<X>(value);
      }
      y[v] = out;
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = threadIdx.x + int64_t{i} * blockDim.x;
      if (v >= n_vectors) continue;
      if (!kWeightAhead && p.weight != nullptr) weight[i].load(p, v);
      write(v, held[i], weight[i]);
    }
    for (int64_t v = threadIdx.x + int64_t{kHeld} * blockDim.x; v < n_vectors; v += blockDim.x) {
      Weight<W, kVec> w;
      if (p.weight != nullptr) w.load(p, v);
      write(v, sum[v], w);
    }
  }
}

template <typename X, typename W, int kVec>
cudaError_t launch(const AddRmsNormKernelArgs& args, cudaStream_t stream) {
  const int64_t n_vectors = args.D / kVec;
  dim3 block(32, kWarpRows);
  if (n_vectors > kWarpRowVectors) {
    const int64_t threads = (n_vectors + 32 * kHeld - 1) / (32 * kHeld) * 32;
    block = dim3(static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads), 1);
  }
  const int64_t blocks = (args.n_rows + block.y - 1) / block.y;
  return launch_dependent(add_rms_norm_kernel<X, W, kVec>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), block,
                          0, stream, args);
}

template <typename X>
cudaError_t choose(const AddRmsNormKernelArgs& args, cudaStream_t stream) {
  constexpr int kVec = kElemsPer16Bytes<X>;
  uintptr_t pointers = 0;
  for (const void* pointer : {args.x, args.residual, args.weight,
                              static_cast<const void*>(args.sum), static_cast<const void*>(args.y)})
    pointers |= reinterpret_cast<uintptr_t>(pointer);
  if (args.D % kVec == 0 && pointers % 16 == 0) {
    if (args.weight == nullptr || args.weight_dtype == args.dtype)
      return launch<X, X, kVec>(args, stream);
    if (args.weight_dtype == DType::kFloat32) return launch<X, float, kVec>(args, stream);
  }
  return launch<X, AnyFloat, 1>(args, stream);
}

}  // namespace

cudaError_t launch_add_rms_norm(const AddRmsNormKernelArgs& args, cudaStream_t stream) {
  if (args.n_rows == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat16:
      return choose<__half>(args, stream);
    case DType::kBFloat16:
      return choose<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
