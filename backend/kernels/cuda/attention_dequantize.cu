// attention_dequantize -- k[b, h, t, :] = k_int8[b, h, t, :] * k_scale[b, h, t], v alike, for the
//                         attention kernels that take no int8
//
//   operand           dtype            shape           order in memory                   align
//   k, v              i8               [B, Hkv, T, D]  last dimension contiguous         1 B
//   k_scale, v_scale  f32              [B, Hkv, T]     contiguous                        4 B
//   input_pos         i32 | i64        [S] | [B, S]    contiguous                        dtype
//   to_k, to_v (out)  f16, bf16, f32   [B, Hkv, T, D]  contiguous                        dtype
//
// Grid      ((b * Hkv + h, stretch of kKeys keys), 1, k or v) blocks; a thread takes single elements.
//           Keys behind the last that a query of b sees are left out
// Bytes     reads B * Hkv * n * (D + 4), writes B * Hkv * n * D elements, twice, n keys being seen
// Numerics  one rounding of the product to the dtype
// Source    direct from the formula
#include "attention_parts.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256, kKeys = 64;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_dequantize_kernel(AttentionKernelArgs p, T* to_k, T* to_v) {
  __shared__ int seen_by_warps[kThreads / 32];
  const int64_t n_stretches = (p.T + kKeys - 1) / kKeys;
  const int64_t t0 = blockIdx.x % n_stretches * kKeys, b_h = blockIdx.x / n_stretches;
  const int64_t b = b_h / p.Hkv, h = b_h % p.Hkv;
  int end = 0;  // of the keys that some query sees
  for (int64_t s = p.input_pos == nullptr ? p.S - 1 : threadIdx.x; s < p.S; s += kThreads) {
    end = max(end, static_cast<int>(key_range(p, b, s).end));
  }
  end = __reduce_max_sync(0xffffffffu, end);
  if (threadIdx.x % 32 == 0) seen_by_warps[threadIdx.x / 32] = end;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) end = max(end, seen_by_warps[w]);

  const int64_t (&strides)[3] = blockIdx.z == 0 ? p.k_strides : p.v_strides;
  const int8_t* from =
      static_cast<const int8_t*>(blockIdx.z == 0 ? p.k : p.v) + b * strides[0] + h * strides[1];
  const float* scale = (blockIdx.z == 0 ? p.k_scale : p.v_scale) + b_h * p.T;
  T* to = (blockIdx.z == 0 ? to_k : to_v) + b_h * p.T * p.D;
  const int64_t n_keys = end - t0 < kKeys ? end - t0 : kKeys;
  for (int64_t i = threadIdx.x; i < n_keys * p.D; i += kThreads) {
    const int64_t t = t0 + i / p.D, d = i % p.D;
    to[t * p.D + d] = from_float<T>(static_cast<float>(from[t * strides[2] + d]) * scale[t]);
  }
}

template <typename T>
cudaError_t launch(const AttentionKernelArgs& args, void* to_k, void* to_v, cudaStream_t stream) {
  const int64_t n_stretches = (args.T + kKeys - 1) / kKeys;
  const dim3 grid(static_cast<unsigned>(n_stretches * args.B * args.Hkv), 1, 2);
  if (grid.x == 0) return cudaSuccess;
  attention_dequantize_kernel<T>
      <<<grid, kThreads, 0, stream>>>(args, static_cast<T*>(to_k), static_cast<T*>(to_v));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attention_dequantize(const AttentionKernelArgs& args, void* to_k, void* to_v,
                                        cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return launch<__half>(args, to_k, to_v, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(args, to_k, to_v, stream);
    case DType::kFloat32:
      return launch<float>(args, to_k, to_v, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
