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
  TensorView qdata;       // the packed codes, uint8; this and the next three: coalesced.h, marlin.h
  TensorView scale;       // float16 | bfloat16 | float32
  TensorView zero_point;  // absent: 8.0; dtype of scale or float32, shape of scale
  TensorView meta;        // absent but for 2:4 layouts
  TensorView bias;        // absent or [N], dtype of x
  TensorView y;           // [..., N], dtype of x, contiguous; written, never read
  int64_t group_size;
  const char* layout_tag;
  const char* activation;  // "none": w4a16; "int8": x is rounded to int8 per 32 values
  const char* name;        // the weight, for messages; may be nullptr
  // N; 0: not stated. Layouts that pad N need it, for others it may be left out.
  int64_t out_features;
};

// Everything the weight's parts decide by themselves; x and y are not looked at, and no data.
Status validate_linear_weight(const LinearArgs& args);
// N and K of such a weight.
void linear_weight_sizes(const LinearArgs& args, int64_t* N, int64_t* K);
// The bytes of such a weight, in host memory at any address: metadata of 2:4 layouts that names no two places, or
// the same place twice, is refused. Other layouts take every byte.
Status validate_linear_values(const LinearArgs& args);
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
// q [B, Hq, S, D]; k, v [B or more, Hkv, T, D] with Hq % Hkv == 0 (grouped queries): row b of q reads
// row b of k and v, rows behind the last are those of sequences that take no part.
// float16 | bfloat16 | float32, the last dimension contiguous, other strides free (y contiguous).
// At most one of mask, input_pos and is_causal says which keys a query sees.
struct AttentionArgs {
  TensorView q, k, v;
  TensorView mask;  // absent, or bool (true = attend) or dtype of q, broadcastable to [B, Hq, S, T]
  // Absent, or [S] or [B, S] int32 | int64, contiguous: query s sees the keys t <= input_pos[s] and,
  // with a window, t > input_pos[s] - window. Below 0 it sees none, from T on what there is.
  TensorView input_pos;
  // Absent, or float32 like k without D, contiguous: k and v are int8, of value k * k_scale[b, h, t].
  TensorView k_scale, v_scale;
  TensorView y;  // [B, Hq, S, D], or [B, S, Hq * D] with merge_heads; dtype of q
  double scale;
  bool is_causal;    // query s sees keys 0..s
  double softcap;    // 0: none
  int64_t window;    // 0: none; else with input_pos
  bool merge_heads;  // the heads of a query side by side in y
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

// sum = x + residual, rounded; y = rms_norm(sum, weight, eps), computed from the rounded sum: to the
// bit what add and rms_norm give one after the other. With x_norm, rms_norm(x, x_norm, eps), rounded,
// takes the place of x.
struct AddRmsNormArgs {
  TensorView x;         // [..., D] float16 | bfloat16 | float32, contiguous
  TensorView residual;  // like x
  TensorView weight;    // absent or [D], any of the three dtypes
  TensorView x_norm;    // likewise
  TensorView sum;       // like x; may be x or residual itself
  TensorView y;         // like x
  double eps;
};
Status validate_add_rms_norm(const AddRmsNormArgs& args);
Status add_rms_norm(const AddRmsNormArgs& args, const ExecutionContext& context);

// y[..., n] = f(gate_up[..., n]) * gate_up[..., N + n], in float32; f's value is rounded to the dtype
// before the product, as an op of its own would round it.
struct GateMulArgs {
  TensorView gate_up;      // [..., 2 * N] float16 | bfloat16 | float32, contiguous
  TensorView y;            // [..., N], dtype of gate_up, contiguous; no part of gate_up
  const char* activation;  // f: "silu", "gelu" or "gelu_tanh"
};
Status validate_gate_mul(const GateMulArgs& args);
Status gate_mul(const GateMulArgs& args, const ExecutionContext& context);

// Norms and turns the query and key heads of qkv (RoPE), writes keys and values into the caches:
//   q[b, h, s]                     = turn(norm(qkv[b, s, head h], q_norm))
//   k_cache[b, h, input_pos[s]]    = turn(norm(qkv[b, s, head n_heads + h], k_norm))
//   v_cache[b, h, input_pos[s]]    =           qkv[b, s, head n_heads + Hkv + h]
// Where qkv has n_heads + Hkv heads, the values are the keys as they are in qkv.
// norm() is rms_norm with this eps, rounded to the dtype of qkv; without a weight, nothing.
// turn() takes the pairs (a, b) = (x[i], x[i + D/2]), or (x[2i], x[2i + 1]) where interleaved:
//   a' = a * cos - b * sin;  b' = b * cos + a * sin
// with the cos and sin of the place that is written (tables of D) or of the pair (tables of D/2).
// Each product and the sum are rounded to the dtype of the tables, then the result to that of qkv.
// A position below 0 counts from the end of the cache. Row b of the batch is written to row b of the
// caches; rows behind the last are those of sequences that take no part. With scales the caches are
// int8: a head of a token becomes codes of -127 .. 127, its scale is the greatest of its |x| over 127
// (one a token and head: a new token changes none before it, and in attention the scales stay
// outside of both products). A head with an infinity or NaN gets a scale that is not finite.
struct RopeAppendArgs {
  // [B or more, Hkv, T, D] dtype of qkv, or int8 with scales, contiguous; written at input_pos
  TensorView k_cache;
  TensorView v_cache;  // like k_cache
  // [B, S, (n_heads + 2 * Hkv) * D] or [B, S, (n_heads + Hkv) * D] float16 | bfloat16 | float32,
  // contiguous
  TensorView qkv;
  TensorView cos, sin;   // [(B,) S, D] or [(B,) S, D/2], dtype of qkv or float32, contiguous
  TensorView input_pos;  // [S] or [B, S] int32 | int64, contiguous
  TensorView q_norm;     // absent or [D], any of the three dtypes
  TensorView k_norm;     // likewise
  TensorView k_scale;    // absent, or float32 like the caches without D, contiguous; written
  TensorView v_scale;    // likewise
  TensorView q;          // [B, n_heads, S, D] dtype of qkv, contiguous
  int64_t n_heads;
  bool interleaved;
  double eps;  // of the norms
};
Status validate_rope_append(const RopeAppendArgs& args);
Status rope_append(const RopeAppendArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
