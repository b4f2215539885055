// quantize_int8 -- x to int8 per 32 consecutive k, with scale and sum, for the w4a8 kernels
//
//   operand          dtype             shape             order in memory                      align
//   x                f16 | bf16 | f32  [M, K]            row-major                            dtype
//                                                                                             (16 B: fast)
//   a (out)          i8                [M, 2, K/2]       ../quantized_activation.h            16 B
//   parameter (out)  f32, i32          [K/32, n_tokens]  ../quantized_activation.h            8 B
//
// Requires  K % 32 == 0   (checked by validate_linear and quantize_activation)
// Grid      ceil(K / 1024) x min(n_tokens, 65535) blocks of 128 threads; 8 k a lane, 4 lanes a group,
//           rows in strides of gridDim.y
// Bytes     reads x, writes M*K + 8 * K/32 * n_tokens; at M = 1 bound by the launch
// Numerics  s_x = max|x| / 127 and x / s_x correctly rounded, then to nearest even: the bits of
//           cpu/quantize_int8.h. An x that is not finite makes s_x NaN and so its row of y
// Source    direct from the formula
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "quantize_group.cuh"
#include "quantize_int8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 128;
constexpr int kElemsPerLane = 8;
constexpr int64_t kMaxGridY = 65535;

// kVec elements of x in one load: those of a lane where x lies on 16 bytes, else 1.
template <typename X, int kVec>
__global__ void __launch_bounds__(kThreads) quantize_int8_kernel(QuantizeInt8Args p) {
  const int64_t k = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElemsPerLane;
  const bool here = k < p.K;  // the same in the 4 lanes of a group
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  for (int64_t m = blockIdx.y; m < p.n_tokens; m += gridDim.y) {
    if (!here) continue;
    if (m >= p.M) {
      if (k % kQuantizedGroup == 0) p.parameter[k / kQuantizedGroup * p.n_tokens + m] = {0.f, 0};
      continue;
    }
    float x[kElemsPerLane];
    const X* from = static_cast<const X*>(p.x) + m * p.K + k;
#pragma unroll
    for (int i = 0; i < kElemsPerLane; i += kVec) {
      const Elems<X, kVec> elems = *reinterpret_cast<const Elems<X, kVec>*>(from + i);
#pragma unroll
      for (int j = 0; j < kVec; ++j) x[i + j] = as_float(elems.values[j]);
    }
    quantize_group<kElemsPerLane>({p.a, p.parameter, p.K, p.n_tokens}, x, m, k);
  }
}

template <typename X>
cudaError_t choose(const QuantizeInt8Args& args, cudaStream_t stream) {
  const int64_t per_block = kThreads * kElemsPerLane;
  const dim3 grid(static_cast<unsigned>((args.K + per_block - 1) / per_block),
                  static_cast<unsigned>(args.n_tokens < kMaxGridY ? args.n_tokens : kMaxGridY));
  if (reinterpret_cast<uintptr_t>(args.x) % 16 == 0) {
    return launch_dependent(quantize_int8_kernel<X, kElemsPer16Bytes<X>>, grid, kThreads, 0, stream,
                            args);
  }
  return launch_dependent(quantize_int8_kernel<X, 1>, grid, kThreads, 0, stream, args);
}

}  // namespace

cudaError_t launch_quantize_int8(const QuantizeInt8Args& args, cudaStream_t stream) {
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
