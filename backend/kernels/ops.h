// The ops this project has kernels of its own for: argument structs, validation, entry points.
//
// Each op has one validator and one entry point. ExecuTorch's delegate (runtime/op_table.cpp) and
// PyTorch eager (runtime/c_api.cpp) both call these, so a check holds in both or in neither.
#pragma once

#include "tensor_view.h"

namespace cuda_int4 {

// y[..., n] = sum_k x[..., k] * (q[n, k] - zero_point[n, k / group_size]) * scale[n, k / group_size]
//             + bias[n]
// What qdata, scale, zero_point and meta look like in memory is set by layout_tag: kernels/README.md
// and backend/layouts.py.
struct LinearArgs {
  TensorView x;           // [..., K] float16 | bfloat16 | float32, contiguous
  TensorView qdata;       // coalesced.v1: uint8 [N, K/2], even k in the low nibble, 16-byte aligned
  TensorView scale;       // coalesced.v1: float16 | bfloat16 | float32 [N, K/group_size]
  TensorView zero_point;  // absent: 8.0; coalesced.v1: dtype of scale or float32, shape of scale
  TensorView meta;        // absent but for 2:4 layouts
  TensorView bias;        // absent or [N], dtype of x
  TensorView y;           // [..., N], dtype of x, contiguous; written, never read
  int64_t group_size;
  const char* layout_tag;
  const char* activation;  // "none": w4a16; "int8": x is rounded to int8 per 32 values
  const char* name;        // the weight, for messages; may be nullptr
};

// Everything the weight's parts decide by themselves; x and y are not looked at.
Status validate_linear_weight(const LinearArgs& args);
// The weight, x and y together.
Status validate_linear(const LinearArgs& args);
// Scratch that linear() needs for these arguments (0 for most); assumes they are valid.
uint64_t linear_scratch_bytes(const LinearArgs& args, DeviceKind device);
Status linear(const LinearArgs& args, const ExecutionContext& context);

// Activation "int8" on CUDA: x [..., K] as the w4a8 kernels read it (quantized_activation.h; M is the
// number of rows of x). linear() quantises x into its scratch, unless ExecutionContext.quantized_x
// has it: several linears of one x then share it. K % 32 == 0; `to` is device memory of that many
// bytes, 16-byte aligned.
uint64_t quantized_activation_bytes(int64_t M, int64_t K);
Status quantize_activation(const TensorView& x, void* to, const ExecutionContext& context);

// y = softmax(cap(q @ k.T * scale) + mask) @ v, accumulated in float32; cap(s) is s, or with a softcap
// above 0 softcap * tanh(s / softcap).
// q [B, Hq, S, D]; k, v [B, Hkv, T, D] with Hq % Hkv == 0 (grouped queries); y [B, Hq, S, D].
// float16 | bfloat16 | float32, the last dimension contiguous, other strides free (y contiguous).
struct AttentionArgs {
  TensorView q, k, v;
  TensorView mask;  // absent, or bool (true = attend) or dtype of q, broadcastable to [B, Hq, S, T]
  TensorView y;
  double scale;
  bool is_causal;  // query s sees keys 0..s
  double softcap;  // 0: none
};
Status validate_attention(const AttentionArgs& args);
uint64_t attention_scratch_bytes(const AttentionArgs& args, DeviceKind device);
Status attention(const AttentionArgs& args, const ExecutionContext& context);

// y = x / sqrt(mean(x^2 over the last dimension) + eps) * weight, in float32, one rounding.
struct RmsNormArgs {
  TensorView x;       // [..., D] float16 | bfloat16 | float32, contiguous
  TensorView weight;  // absent or [D], any of the three dtypes
  TensorView y;       // shape and dtype of x, contiguous
  double eps;
};
Status validate_rms_norm(const RmsNormArgs& args);
Status rms_norm(const RmsNormArgs& args, const ExecutionContext& context);

// y = x * sigmoid(x), in float32, one rounding; contiguous, same shape and dtype.
struct SiluArgs {
  TensorView x;
  TensorView y;
};
Status validate_silu(const SiluArgs& args);
Status silu(const SiluArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
