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
  // -1032 and -72: minus (magic + 8) of low and high codes
  static constexpr uint32_t kMinusLow8 = 0xE408E408u, kMinusHigh8 = 0xD480D480u;
  static constexpr uint32_t kMinusBoth8 = 0xD480E408u;
  static constexpr float kMaxWhole = 960.f;  // 1024 + whole is exact in fp16
};

template <>
struct HalfFormat<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr float kLowMagic = 128.f, kHighMagic = 128.f;
  static constexpr uint32_t kMinusLow8 = 0xC308C308u, kMinusHigh8 = 0xC308C308u;  // -136
  static constexpr uint32_t kMinusBoth8 = 0xC308C308u;
  static constexpr float kMaxWhole = 120.f;  // 128 + whole and q - whole are exact in bf16
};

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

// What a group's codes are turned into weights with.
template <typename T>
struct GroupScale {
  using Pair = typename HalfFormat<T>::Pair;
  Pair minus_low, minus_high;  // -(magic + whole) for the two registers of a fragment
  Pair scale;
  Pair rest;
};

// is_split: one register has low codes and the other high ones; else both have a low and a high one.
// Rounded by an addition and converted by twos: those that do one value run at an eighth of the rate.
template <typename T>
__device__ __forceinline__ GroupScale<T> group_scale(float scale, float zero, bool is_split) {
  using Format = HalfFormat<T>;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: its neighbours are integers
  const float near = fminf(fmaxf(zero, -Format::kMaxWhole), Format::kMaxWhole);
  const float whole = __fadd_rn(__fadd_rn(near, kRound), -kRound);
  const float low = -(Format::kLowMagic + whole), high = -(Format::kHighMagic + whole);
  const float rest = (whole - zero) * scale;
  const auto pair = [](float first, float second) {
    return pair_of_bits<typename Format::Pair>(pack_pair<T>(first, second));
  };
  GroupScale<T> group;
  group.minus_low = pair(low, is_split ? low : high);
  group.minus_high = pair(is_split ? high : low, high);
  group.scale = pair(scale, scale);
  group.rest = pair(rest, rest);
  return group;
}

// The same where every zero point is 8.
template <typename T>
struct SymmetricScale {
  using Pair = typename HalfFormat<T>::Pair;
  Pair minus_low, minus_high;
  Pair scale;
};

// Selector for __byte_perm(word 0, word 1): byte t of both, twice.
__device__ __forceinline__ uint32_t fragment_selector(uint32_t t) {
  return (t | ((4 + t) << 4)) * 0x0101u;
}

template <typename T>
__device__ __forceinline__ SymmetricScale<T> symmetric_scale(uint32_t scale_bits, bool is_split) {
  using Format = HalfFormat<T>;
  using Pair = typename Format::Pair;
  return {pair_of_bits<Pair>(is_split ? Format::kMinusLow8 : Format::kMinusBoth8),
          pair_of_bits<Pair>(is_split ? Format::kMinusHigh8 : Format::kMinusBoth8),
          pair_of_bits<Pair>(scale_bits)};
}

template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t magic_codes,
                                                typename HalfFormat<T>::Pair minus_offset,
                                                const GroupScale<T>& group) {
  using Pair = typename HalfFormat<T>::Pair;
  const Pair difference = __hadd2(pair_of_bits<Pair>(magic_codes), minus_offset);
  return bits_of_pair(__hfma2(difference, group.scale, group.rest));
}

template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t magic_codes,
                                                typename HalfFormat<T>::Pair minus_offset,
                                                const SymmetricScale<T>& group) {
  using Pair = typename HalfFormat<T>::Pair;
  const Pair difference = __hadd2(pair_of_bits<Pair>(magic_codes), minus_offset);
  return bits_of_pair(__hmul2(difference, group.scale));
}

// (a & kMask) | kBits in one instruction.
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t and_or(uint32_t a) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "n"(kMask), "n"(kBits));
  return d;
}

// Bytes b0, b1, b0, b1 (from the low end) to codes below their magic exponents: even and odd k of b0
// in low, of b1 in high.
__device__ __forceinline__ void magic_of_bytes(uint32_t bytes, uint32_t& low, uint32_t& high,
                                               __half) {
  low = and_or<0x00F0000Fu, 0x54006400u>(bytes);
  high = and_or<0x00F0000Fu, 0x54006400u>(bytes >> 8);
}

__device__ __forceinline__ void magic_of_bytes(uint32_t bytes, uint32_t& low, uint32_t& high,
                                               __nv_bfloat16) {
  uint32_t codes;  // low half from bytes, high half from bytes >> 4
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(codes) : "r"(bytes), "r"(bytes >> 4), "n"(0xFFFF));
  low = and_or<0x000F000Fu, 0x43004300u>(codes);
  high = and_or<0x000F000Fu, 0x43004300u>(codes >> 8);
}

// Codes 0, 4 | 1, 5 | 2, 6 | 3, 7 of a word below their magic exponents.
__device__ __forceinline__ void magic_of_word(uint32_t word, uint32_t (&codes)[4], __half) {
  codes[0] = and_or<0x000F000Fu, 0x64006400u>(word);
  codes[1] = and_or<0x00F000F0u, 0x54005400u>(word);
  codes[2] = and_or<0x000F000Fu, 0x64006400u>(word >> 8);
  codes[3] = and_or<0x00F000F0u, 0x54005400u>(word >> 8);
}

__device__ __forceinline__ void magic_of_word(uint32_t word, uint32_t (&codes)[4], __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = and_or<0x000F000Fu, 0x43004300u>(word >> (4 * i));
}

// The same pairs as integers: HalfFormat::kHighMagic + code, nothing subtracted.
__device__ __forceinline__ void offset_codes_of_word(uint32_t word, uint32_t (&codes)[4], __half) {
  codes[0] = and_or<0x00F000F0u, 0x54005400u>(word << 4);
  codes[1] = and_or<0x00F000F0u, 0x54005400u>(word);
  codes[2] = and_or<0x00F000F0u, 0x54005400u>(word >> 4);
  codes[3] = and_or<0x00F000F0u, 0x54005400u>(word >> 8);
}

__device__ __forceinline__ void offset_codes_of_word(uint32_t word, uint32_t (&codes)[4],
                                                     __nv_bfloat16) {
  magic_of_word(word, codes, __nv_bfloat16());
}

// The two registers of one row and 16 k: k = 2t, 2t+1 in low, k = 2t+8, 2t+9 in high. The group is
// not split.
template <typename T, template <typename> class Group>
__device__ __forceinline__ void fragment_of_codes(uint32_t word_0, uint32_t word_1,
                                                  uint32_t selector, const Group<T>& group,
                                                  uint32_t& low, uint32_t& high) {
  magic_of_bytes(__byte_perm(word_0, word_1, selector), low, high, T());
  low = scaled_pair<T>(low, group.minus_low, group);
  high = scaled_pair<T>(high, group.minus_low, group);
}

// The registers of one row and two times 16 k from one word, where x is permuted to match:
// k = 0, 4 | 1, 5 and 2, 6 | 3, 7 of the word. The group is split.
template <typename T, template <typename> class Group>
__device__ __forceinline__ void fragments_of_word(uint32_t word, const Group<T>& group,
                                                  uint32_t& low_0, uint32_t& high_0,
                                                  uint32_t& low_1, uint32_t& high_1) {
  uint32_t codes[4];
  magic_of_word(word, codes, T());
  low_0 = scaled_pair<T>(codes[0], group.minus_low, group);
  high_0 = scaled_pair<T>(codes[1], group.minus_high, group);
  low_1 = scaled_pair<T>(codes[2], group.minus_low, group);
  high_1 = scaled_pair<T>(codes[3], group.minus_high, group);
}

}  // namespace cuda_int4
