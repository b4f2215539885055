// gate_mul -- y[m, n] = f(gate_up[m, n]) * gate_up[m, N + n], f silu or gelu
//
//   operand  dtype             shape    order in memory  align
//   gate_up  f16 | bf16 | f32  [M, 2N]  row-major        dtype (16 B and N in whole 16 B: fast)
//   y (out)  dtype of gate_up  [M, N]   row-major        as gate_up; no part of it
//   a, parameter (out)  y as int8, where it is asked for: ../quantized_activation.h
//
// Requires  nothing more   (checked by validate_gate_mul); N % 32 == 0 for the int8 form
// Grid      one thread per 16 bytes of y, 8 where y is small, or per element where those do not fit;
//           at most 2^30 blocks of 128, the rest in strides
// Bytes     reads gate_up, writes y
// Numerics  fp32, exp, erf and tanh to 2 ulp; f is rounded to the dtype, then the product: the bits
//           of silu.cu and a multiplication. The int8 form is that of the rounded y, to the bit
//           quantize_int8's
// Source    own
#include "gate_mul.cuh"
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 128;
constexpr int64_t kFewElems = int64_t{1} << 17;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

template <GateFunction kFunction>
__device__ __forceinline__ float gated(float x) {
  if constexpr (kFunction == GateFunction::kSilu) {
    return x / (1.f + expf(-x));
  } else if constexpr (kFunction == GateFunction::kGelu) {
    return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
  } else {
    constexpr float kSqrt2OverPi = 0.79788456080286536f;
    return 0.5f * x * (1.f + tanhf(kSqrt2OverPi * (x + 0.044715f * x * x * x)));
  }
}

template <typename X, GateFunction kFunction, int kVec>
__global__ void __launch_bounds__(kThreads) gate_mul_kernel(GateMulKernelArgs p) {
  using Vector = Elems<X, kVec>;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const Vector* gate_up = static_cast<const Vector*>(p.gate_up);
  Vector* y = static_cast<Vector*>(p.y);
  const int64_t row_vectors = p.N / kVec, n_vectors = p.numel / kVec;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t v = first; v < n_vectors; v += stride) {
    const int64_t row = v / row_vectors;
    const int64_t gate_at = v + row * row_vectors;  // as many factors lie in between
    const Vector gate = gate_up[gate_at], up = gate_up[gate_at + row_vectors];
    Vector out;
    float values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const X f = from_float<X>(gated<kFunction>(as_float(gate.values[i])));
      out.values[i] = from_float<X>(as_float(f) * as_float(up.values[i]));
      values[i] = as_float(out.values[i]);
    }
    y[v] = out;
    if (p.quantized.a != nullptr)
      quantize_group<kVec>(p.quantized, values, row, (v - row * row_vectors) * kVec);
  }
  if (p.quantized.a == nullptr) return;
  const int64_t M = p.numel / p.N, n_padding = p.quantized.n_tokens - M;
  for (int64_t i = first; i < n_padding * (p.N / kQuantizedGroup); i += stride)
    p.quantized.parameter[i / n_padding * p.quantized.n_tokens + M + i % n_padding] = {0.f, 0};
}

template <typename X, GateFunction kFunction, int kVec>
cudaError_t launch(const GateMulKernelArgs& args, cudaStream_t stream) {
  const int64_t blocks = (args.numel / kVec + kThreads - 1) / kThreads;
  return launch_dependent(gate_mul_kernel<X, kFunction, kVec>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                          kThreads, 0, stream, args);
}

template <typename X, GateFunction kFunction>
cudaError_t choose(const GateMulKernelArgs& args, cudaStream_t stream) {
  constexpr int kVec = kElemsPer16Bytes<X>;
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.gate_up) | reinterpret_cast<uintptr_t>(args.y);
  // Few elements are bound by the time of one thread's exponentials.
  if (sizeof(X) == 2 && args.numel <= kFewElems && pointers % 8 == 0 && args.N % 4 == 0)
    return launch<X, kFunction, 4>(args, stream);
  return pointers % 16 == 0 && args.N % kVec == 0 ? launch<X, kFunction, kVec>(args, stream)
                                                  : launch<X, kFunction, 1>(args, stream);
}

template <typename X>
cudaError_t of_dtype(const GateMulKernelArgs& args, cudaStream_t stream) {
  switch (args.function) {
    case GateFunction::kSilu:
      return choose<X, GateFunction::kSilu>(args, stream);
    case GateFunction::kGelu:
      return choose<X, GateFunction::kGelu>(args, stream);
    case GateFunction::kGeluTanh:
      return choose<X, GateFunction::kGeluTanh>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_gate_mul(const GateMulKernelArgs& args, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat16:
      return of_dtype<__half>(args, stream);
    case DType::kBFloat16:
      return of_dtype<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return of_dtype<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
