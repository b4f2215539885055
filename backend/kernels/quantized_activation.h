// The activation of a w4a8 linear in CUDA memory: x [M, K] as int8 per 32 consecutive k.
//
//   part       dtype       shape             order in memory                               align
//   a          i8          [M, 2, K/2]       row-major: row m is a[m, k] of even k, then   16 B
//                                            of odd k, each in the order of k
//   parameter  f32 s_x,    [K/32, n_tokens]  row-major, at byte M*K; pairs of 8 bytes      16 B
//              i32 sum
//
//   s_x[m, j] = max|x[m, k]| / 127,  a[m, k] = x[m, k] / s_x, ties to even,  sum[m, j] = sum of a,
//   each over k = 32j .. 32j+31.  Where an x is not finite s_x is NaN and a is 0; where s_x is 0, too.
//   n_tokens = M for M <= 2, else M rounded up to 8; the parameters beyond M are 0.
//
// Even and odd k apart because a word of coalesced.v1 holds them apart: its low nibbles are 4 even k,
// its high nibbles 4 odd k. cuda/quantize_int8.cu writes it, the w4a8 kernels read it.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace cuda_int4 {

constexpr int64_t kQuantizedGroup = 32;  // k that share s_x

struct QuantizedParameter {
  float s_x;
  int32_t sum;
};

constexpr int64_t quantized_tokens(int64_t M) { return M <= 2 ? M : (M + 7) / 8 * 8; }
constexpr int64_t quantized_parameter_offset_bytes(int64_t M, int64_t K) { return M * K; }

// Whether an op can write its y [..., K] as int8 too, where the context asks for it; y is valid.
Status check_quantized_y(const char* who, const TensorView& y, const ExecutionContext& context);

}  // namespace cuda_int4
