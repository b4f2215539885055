// attention: the arguments that its kernels share, and their launchers.
//
// Query rows are numbered (b, hq, s); query head hq reads key head hq / (Hq / Hkv).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../ops.h"

namespace cuda_int4 {

struct AttentionKernelArgs {  // device pointers; sizes and strides in elements
  const void* q;              // [B, Hq, S, D]
  const void* k;              // [B, Hkv, T, D]
  const void* v;
  const void* mask;  // nullptr, or bool (one byte) or dtype: [B, Hq, S, T] by mask_strides
  void* y;           // [B, Hq, S, D] contiguous
  void* scratch;
  DType dtype;
  bool mask_is_bool, is_causal;
  int64_t B, Hq, Hkv, S, T, D;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of [B, H, S or T]; that of D is 1
  int64_t mask_strides[4];                           // 0 where broadcast
  float scale;
  float softcap;  // 0: none
};

constexpr int64_t kMaxCudaHeadDim = 512;

// attention.cu: the choice of a kernel, and the scratch it wants, which depends on shapes only.
uint64_t cuda_attention_scratch_bytes(const AttentionArgs& args);
Status cuda_attention(const AttentionArgs& args, const ExecutionContext& context);

// Of the current device; 0 where it does not say.
int device_attribute(cudaDeviceAttr attribute);
// float16 or bfloat16 whose rows of q, k and v are whole 16-byte pieces at multiples of 16 bytes.
bool is_tensor_core_ready(const AttentionKernelArgs& args);

// attention_split.cu: few queries on a long cache.
bool fits_attention_split(const AttentionKernelArgs& args);
uint64_t attention_split_scratch_bytes(const AttentionKernelArgs& args);
cudaError_t launch_attention_split(const AttentionKernelArgs& args, cudaStream_t stream);

// attention_tiles.cu: many queries.
bool fits_attention_tiles(const AttentionKernelArgs& args);
uint64_t attention_tiles_scratch_bytes(const AttentionKernelArgs& args);
cudaError_t launch_attention_tiles(const AttentionKernelArgs& args, cudaStream_t stream);

// attention_wgmma.cu: the same on sm_90a; scratch as attention_tiles.
bool fits_attention_wgmma(const AttentionKernelArgs& args);
cudaError_t launch_attention_wgmma(const AttentionKernelArgs& args, cudaStream_t stream);

// attention_rows.cu: everything with D <= kMaxCudaHeadDim.
cudaError_t launch_attention_rows(const AttentionKernelArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
