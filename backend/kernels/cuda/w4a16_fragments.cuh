// Codes of coalesced.v1 to tensor-core fragments of fp16 or bf16, in registers.
//
// In mma.m16n8k16 and wgmma with A in registers, lane t = lane % 4 of a row holds k = 2t, 2t+1,
// 2t+8, 2t+9 of each 16. Row-major codes put 8 k in a word, so those are byte t of two neighbouring
// words: the four lanes of a row read the same words, and each takes its own byte.
//
//   w = (q - zero_point) * scale
//     = (q - whole) * scale + rest,  whole = zero_point to the nearest integer, rest =
//       -(zero_point - whole) * scale: q - whole is exact, then one rounding.
//
// fp16: a code in bits 0-3 below exponent 0x6400 is 1024 + q, in bits 4-7 below 0x5400 it is 64 + q;
// bf16: in bits 0-3 below 0x4300 it is 128 + q. Minus (1024 | 64 | 128) + whole, that is q - whole.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../tensor_view.h"
#include "numeric.cuh"

namespace cuda_int4 {

// Element `index` of a float tensor, for the few loads of scales and zero points.
__device__ __forceinline__ float load_as_float(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat16) return as_float(static_cast<const __half*>(data)[index]);
  if (dtype == DType::kBFloat16) return as_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

template <typename T>
struct HalfFormat;

template <>
struct HalfFormat<__half> {
  using Pair = __half2;
  static constexpr float kLowMagic = 1024.f, kHighMagic = 64.f;
  static constexpr float kMaxWhole = 960.f;  // 1024 + whole is exact in fp16
};

template <>
struct HalfFormat<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr float kLowMagic = 128.f, kHighMagic = 128.f;
  static constexpr float kMaxWhole = 120.f;  // 128 + whole and q - whole are exact in bf16
};

// What a group's codes are turned into weights with.
template <typename T>
struct GroupScale {
  using Pair = typename HalfFormat<T>::Pair;
  Pair minus_offset;  // -(magic + whole), low and high code
  Pair scale;
  Pair rest;

  __device__ __forceinline__ void set(float scale_value, float zero_value) {
    constexpr float kMax = HalfFormat<T>::kMaxWhole;
    const float whole = fminf(fmaxf(rintf(zero_value), -kMax), kMax);
    minus_offset.x = from_float<T>(-(HalfFormat<T>::kLowMagic + whole));
    minus_offset.y = from_float<T>(-(HalfFormat<T>::kHighMagic + whole));
    scale.x = scale.y = from_float<T>(scale_value);
    rest.x = rest.y = from_float<T>((whole - zero_value) * scale_value);
  }
};

// Selector for __byte_perm(word 0, word 1): byte t of both, twice.
__device__ __forceinline__ uint32_t fragment_selector(uint32_t t) {
  return (t | ((4 + t) << 4)) * 0x0101u;
}

template <typename Pair>
__device__ __forceinline__ Pair pair_of_bits(uint32_t bits) {
  Pair pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

template <typename Pair>
__device__ __forceinline__ uint32_t bits_of_pair(Pair pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t magic_codes, const GroupScale<T>& group) {
  using Pair = typename HalfFormat<T>::Pair;
  const Pair difference = __hadd2(pair_of_bits<Pair>(magic_codes), group.minus_offset);
  return bits_of_pair(__hfma2(difference, group.scale, group.rest));
}

// The two registers of one row and 16 k: k = 2t, 2t+1 in low, k = 2t+8, 2t+9 in high.
__device__ __forceinline__ void fragment_of_codes(uint32_t word_0, uint32_t word_1,
                                                  uint32_t selector,
                                                  const GroupScale<__half>& group, uint32_t& low,
                                                  uint32_t& high) {
  const uint32_t codes = __byte_perm(word_0, word_1, selector);
  low = scaled_pair<__half>((codes & 0x00F0000Fu) | 0x54006400u, group);
  high = scaled_pair<__half>(((codes >> 8) & 0x00F0000Fu) | 0x54006400u, group);
}

__device__ __forceinline__ void fragment_of_codes(uint32_t word_0, uint32_t word_1,
                                                  uint32_t selector,
                                                  const GroupScale<__nv_bfloat16>& group,
                                                  uint32_t& low, uint32_t& high) {
  const uint32_t bytes = __byte_perm(word_0, word_1, selector);
  const uint32_t codes = (bytes & 0x0000FFFFu) | ((bytes >> 4) & 0xFFFF0000u);
  low = scaled_pair<__nv_bfloat16>((codes & 0x000F000Fu) | 0x43004300u, group);
  high = scaled_pair<__nv_bfloat16>(((codes >> 8) & 0x000F000Fu) | 0x43004300u, group);
}

}  // namespace cuda_int4
