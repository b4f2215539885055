// silu -- y[i] = x[i] / (1 + exp(-x[i]))
//
//   operand  dtype             shape    order in memory  align
//   x        f16 | bf16 | f32  [numel]  contiguous       dtype (16 B: fast)
//   y (out)  dtype of x        [numel]  contiguous       as x; may be x itself
//
// Requires  nothing more   (checked by validate_silu)
// Grid      one thread per 16 bytes, or per element where a pointer is not aligned to 16; at most
//           2^30 blocks of 256, the rest in strides; the last vector's thread also takes the tail
// Bytes     reads x, writes y
// Numerics  fp32, exp to 2 ulp, one rounding at the store
// Source    own
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "silu.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

template <typename X>
__device__ __forceinline__ X silu_of(X x) {
  const float value = as_float(x);
  return from_float<X>(value / (1.f + expf(-value)));
}

template <typename X, int kVec>
__global__ void __launch_bounds__(kThreads) silu_kernel(SiluKernelArgs p) {
  using Vector = Elems<X, kVec>;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const X* x = static_cast<const X*>(p.x);
  X* y = static_cast<X*>(p.y);
  const int64_t n_vectors = p.numel / kVec;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t v = first; v < n_vectors; v += int64_t{gridDim.x} * kThreads) {
    Vector vector = reinterpret_cast<const Vector*>(x)[v];
#pragma unroll
    for (int i = 0; i < kVec; ++i) vector.values[i] = silu_of(vector.values[i]);
    reinterpret_cast<Vector*>(y)[v] = vector;
  }
  const int64_t tail = n_vectors * kVec + first;
  if (first < kVec && tail < p.numel) y[tail] = silu_of(x[tail]);
}

template <typename X, int kVec>
cudaError_t launch(const SiluKernelArgs& args, cudaStream_t stream) {
  const int64_t n_vectors = (args.numel + kVec - 1) / kVec;
  const int64_t blocks = (n_vectors + kThreads - 1) / kThreads;
  return launch_dependent(silu_kernel<X, kVec>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                          kThreads, 0, stream, args);
}

template <typename X>
cudaError_t choose(const SiluKernelArgs& args, cudaStream_t stream) {
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.y);
  return pointers % 16 == 0 ? launch<X, kElemsPer16Bytes<X>>(args, stream)
                            : launch<X, 1>(args, stream);
}

}  // namespace

cudaError_t launch_silu(const SiluKernelArgs& args, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
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
