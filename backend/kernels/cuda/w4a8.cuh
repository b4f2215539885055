// What the w4a8 kernels of coalesced.v1 share: their arguments and one launcher per kernel.
#pragma once

#include <cuda_runtime.h>

#include "../quantized_activation.h"
#include "../tensor_view.h"
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

struct W4A8Args {  // device pointers; sizes in elements
  const int8_t* a;
  const QuantizedParameter* parameter;
  const uint8_t* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  DType dtype, scale_dtype, zero_point_dtype;  // dtype: of bias and y
  int64_t M, N, K, group_size, n_groups, n_tokens;
  bool constant_weights;  // ExecutionContext
};

// For kernels that read weights before their griddepcontrol_wait.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_w4a8(void (*kernel)(W4A8Args, Parameters...), unsigned blocks, int threads,
                        int shared_bytes, cudaStream_t stream, const W4A8Args& args,
                        const Arguments&... arguments) {
  if (args.constant_weights) {
    return launch_dependent(kernel, blocks, static_cast<unsigned>(threads), shared_bytes, stream,
                            args, arguments...);
  }
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), stream>>>(args, arguments...);
  return cudaGetLastError();
}

// Group of weights of the 32 k number j: j >> shift.
inline int w4a8_group_shift(const W4A8Args& args) {
  if (args.group_size == args.K) return 31;
  int shift = 0;
  while ((kQuantizedGroup << shift) < args.group_size) ++shift;
  return shift;
}

// Element i of a tensor whose dtype is looked at here: one kernel for every dtype of scale and y.
__device__ __forceinline__ float load_as_float(DType dtype, const void* from, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(from)[i];
  if (dtype == DType::kFloat16) return as_float(static_cast<const __half*>(from)[i]);
  return as_float(static_cast<const __nv_bfloat16*>(from)[i]);
}

__device__ __forceinline__ void store_from_float(DType dtype, void* to, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(to)[i] = value;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(to)[i] = from_float<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(value);
  }
}

// ---- codes as signed bytes, for tensor cores ----
// 4 even k or 4 odd k of a word as 16 * (q - 8): a nibble in the upper half of a byte, its top bit
// flipped. The 16 goes at the end.

constexpr float kNibbleUnit = 1.f / 16.f;

__device__ __forceinline__ uint32_t signed_low_nibbles(uint32_t word) {
  return lop3_and_xor(word << 4, 0xf0f0f0f0u, 0x80808080u);
}
__device__ __forceinline__ uint32_t signed_high_nibbles(uint32_t word) {
  return lop3_and_xor(word, 0xf0f0f0f0u, 0x80808080u);
}

cudaError_t launch_matvec_w4a8_dp4a(const W4A8Args& args, cudaStream_t stream);   // M <= 2
cudaError_t launch_matvec_w4a8_mma(const W4A8Args& args, cudaStream_t stream);    // 3 to 16
cudaError_t launch_matmul_w4a8_wgmma(const W4A8Args& args, cudaStream_t stream);  // M > 2; sm_90a
cudaError_t launch_matmul_w4a8_mma(const W4A8Args& args, cudaStream_t stream);    // M > 2
cudaError_t launch_matvec_w4a8_coalesced(const W4A8Args& args, cudaStream_t stream);
// M = 3 to 16. *is_done: it was a call that this kernel takes (its contract says which).
cudaError_t launch_matvec_w4a8_slices(const W4A8Args& args, cudaStream_t stream, bool* is_done);

}  // namespace cuda_int4
