// The int8 form of an activation (../quantized_activation.h), written by the lanes that hold it: what
// quantize_int8.cu and the kernels whose result a w4a8 linear reads have in common.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../quantized_activation.h"

namespace cuda_int4 {

struct QuantizedRows {  // device pointers; a == nullptr: nobody asks for it
  int8_t* a;
  QuantizedParameter* parameter;
  int64_t K, n_tokens;
};

// 4 codes as one word, the first in the low byte.
__device__ __forceinline__ uint32_t pack_codes(int c0, int c1, int c2, int c3) {
  const uint32_t low = __byte_perm(c0, c1, 0x0040), high = __byte_perm(c2, c3, 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Of many x the quotient by one s (0 < s < 2^122, |x| < 128 s), rounded as a division is, in 5
// instructions: a division each, with the code for its rare cases, takes gate_mul from 1.1 to 2.4 us
// for one row of 14336 on an H200. Two corrections of x * (1 / s), whose residuals are exact because
// a power of two takes s far from the ends of the range; where x is not, its quotient is below 0.25.
struct Quotients {
  float unit, s, reciprocal;

  __device__ __forceinline__ explicit Quotients(float of) {
    unit = of < 1e-25f ? 0x1p100f : of > 1e25f ? 0x1p-60f : 1.f;
    s = of * unit;
    reciprocal = __frcp_rn(s);
  }
  __device__ __forceinline__ float operator()(float x) const {
    x *= unit;
    float quotient = x * reciprocal;
    quotient = fmaf(fmaf(-quotient, s, x), reciprocal, quotient);
    return fmaf(fmaf(-quotient, s, x), reciprocal, quotient);
  }
};

// kVec values of row m from k on; the 32 / kVec lanes of a group (consecutive, the first one's k a
// multiple of 32) call it together.
template <int kVec>
__device__ __forceinline__ void quantize_group(const QuantizedRows& to, const float (&x)[kVec],
                                               int64_t m, int64_t k) {
  static_assert(kVec == 1 || kVec == 4 || kVec == 8, "whole lanes to a group");
  constexpr int kLanes = int(kQuantizedGroup) / kVec;
  const int lane = (threadIdx.x + blockDim.x * threadIdx.y) % 32;
  const uint32_t group =
      kLanes == 32 ? 0xffffffffu : ((1u << (kLanes % 32)) - 1) << (lane / kLanes * kLanes);
  float largest = 0.f, not_finite = 0.f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
    not_finite += x[i] - x[i];  // 0, or NaN
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(group, largest, offset));
    not_finite += __shfl_xor_sync(group, not_finite, offset);
  }
  const float s_x = __fdiv_rn(largest, 127.f) + not_finite;
  const bool is_usable = s_x > 0.f;  // neither 0 nor NaN

  const Quotients quotient(is_usable ? s_x : 1.f);
  int code[kVec], sum = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float ratio = fminf(127.f, fmaxf(-127.f, quotient(x[i])));
    code[i] = is_usable ? __float2int_rn(ratio) : 0;
    sum += code[i];
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(group, sum, offset);

  int8_t* even = to.a + m * to.K + k / 2;
  int8_t* odd = even + to.K / 2;
  if constexpr (kVec == 8) {
    *reinterpret_cast<uint32_t*>(even) = pack_codes(code[0], code[2], code[4], code[6]);
    *reinterpret_cast<uint32_t*>(odd) = pack_codes(code[1], code[3], code[5], code[7]);
  } else if constexpr (kVec == 4) {
    *reinterpret_cast<char2*>(even) = {static_cast<char>(code[0]), static_cast<char>(code[2])};
    *reinterpret_cast<char2*>(odd) = {static_cast<char>(code[1]), static_cast<char>(code[3])};
  } else {
    *(k % 2 == 0 ? even : odd) = static_cast<int8_t>(code[0]);
  }
  if (k % kQuantizedGroup == 0) to.parameter[k / kQuantizedGroup * to.n_tokens + m] = {s_x, sum};
}

}  // namespace cuda_int4
