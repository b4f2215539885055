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
  void* y;
  void* scratch;
  DType dtype;  // of q and y
  bool mask_is_bool, is_causal;
  int64_t B, Hq, Hkv, S, T, D;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of [B, H, S or T]; that of D is 1
  int64_t y_strides[3];                              // of [B, Hq, S]
  int64_t mask_strides[4];                           // 0 where broadcast
  float scale;
  float softcap;          // 0: none
  const void* input_pos;  // nullptr, or i32 | i64: of query s of b at b * pos_stride + s
  bool pos_is_int64;
  int64_t pos_stride, window;  // a query sees keys t <= pos and, unless window is 0, > pos - window
  const float* k_scale;        // nullptr, or [B, Hkv, T]: k and v are i8
  const float* v_scale;
};

constexpr int64_t kMaxCudaHeadDim = 512;

// attention.cu: the choice of a kernel, and the scratch it wants, which depends on shapes only.
uint64_t cuda_attention_scratch_bytes(const AttentionArgs& args);
Status cuda_attention(const AttentionArgs& args, const ExecutionContext& context);

// Of the current device; 0 where it does not say.
int device_attribute(cudaDeviceAttr attribute);
// float16 or bfloat16 whose rows of q, k and v are whole 16-byte pieces at multiples of 16 bytes.
bool is_tensor_core_ready(const AttentionKernelArgs& args);

// attention_dequantize.cu: int8 keys and values as contiguous tensors of args.dtype.
cudaError_t launch_attention_dequantize(const AttentionKernelArgs& args, void* to_k, void* to_v,
                                        cudaStream_t stream);

// attention_decode.cu: few queries on a long cache, without a mask (sm_90).
bool fits_attention_decode(const AttentionKernelArgs& args);
cudaError_t launch_attention_decode(const AttentionKernelArgs& args, cudaStream_t stream);

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
