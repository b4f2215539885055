// AVX2 with FMA and F16C in the terms of simd_scalar.h; also the int4 primitives of linear_*.h.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

// Unnamed, so that each file compiles its own copy of this and of every template over it: code for
// a richer instruction set must not stand in for code for a poorer one at link time.
namespace {

struct Avx2Simd {
  static constexpr int kLanes = 8;
  static constexpr bool kSpreadsBFloat = false;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static F load(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static F load(const BFloat* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static void store(Half* to, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat* to, F value) {
    const I bits = _mm256_castps_si256(value);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const I chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F n) {
    const I exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static F select_less(F a, F b, F if_less, F if_not) {
    return _mm256_blendv_ps(if_not, if_less, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static float sum(F a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  static float maximum(F a) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }

  // ---- int4: one dword holds the codes of 8 consecutive k, the first in its low nibble ----

  static I load_words(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(from));
  }
  // The first n_words dwords, the rest 0; reads no byte past them.
  static I load_words_partial(const uint8_t* from, int64_t n_words) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n_words)), lane);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask);
  }
  // Code j of each lane, minus 8 if kMinus8, as float.
  template <bool kMinus8>
  static F code(I words, int j) {
    // Shifted to the top and back: the arithmetic shift of code ^ 8 gives code - 8.
    const I top = _mm256_slli_epi32(words, 28 - 4 * j);
    if (kMinus8) {
      const I flipped = _mm256_xor_si256(top, _mm256_set1_epi32(INT32_MIN));
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(flipped, 28));
    }
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(top, 28));
  }
  static I low_codes(I words) { return _mm256_and_si256(words, _mm256_set1_epi8(15)); }
  static I high_codes(I words) {
    return _mm256_and_si256(_mm256_srli_epi16(words, 4), _mm256_set1_epi8(15));
  }
  // sum + dot of 4 codes and 4 int8 per lane, twice. Codes are at most 15: four products fit int16.
  static I dot8(I sum, I low, I a_low, I high, I a_high) {
    const I pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(low, a_low), _mm256_maddubs_epi16(high, a_high));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I zero_i() { return _mm256_setzero_si256(); }
  static I set1_i(int32_t value) { return _mm256_set1_epi32(value); }
  static I load_i(const int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(from));
  }
  static void store_i(int32_t* to, I value) {
    _mm256_storeu_si256(reinterpret_cast<I*>(to), value);
  }
  static F to_float(I value) { return _mm256_cvtepi32_ps(value); }
  static I to_int(F value) { return _mm256_cvtps_epi32(value); }  // ties to even
  static I as_int(F value) { return _mm256_castps_si256(value); }
  static F as_float(I value) { return _mm256_castsi256_ps(value); }

  // rows[i] lane j <-> rows[j] lane i
  static void transpose(I (&rows)[kLanes]) {
    I pairs[8];
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    I quads[8];  // quads[4 * h + c]: column c and c + 4 of rows 4h .. 4h + 3
    for (int h = 0; h < 2; ++h) {
      quads[4 * h] = _mm256_unpacklo_epi64(pairs[4 * h], pairs[4 * h + 2]);
      quads[4 * h + 1] = _mm256_unpackhi_epi64(pairs[4 * h], pairs[4 * h + 2]);
      quads[4 * h + 2] = _mm256_unpacklo_epi64(pairs[4 * h + 1], pairs[4 * h + 3]);
      quads[4 * h + 3] = _mm256_unpackhi_epi64(pairs[4 * h + 1], pairs[4 * h + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2x128_si256(quads[c], quads[c + 4], 0x20);
      rows[c + 4] = _mm256_permute2x128_si256(quads[c], quads[c + 4], 0x31);
    }
  }
  // Lane i gets values[i / lanes_per_group]; reads kLanes floats.
  template <int kLanesPerGroup>
  static F spread(const float* values) {
    if (kLanesPerGroup >= kLanes) return _mm256_broadcast_ss(values);
    static_assert(kLanesPerGroup >= 4, "a group has at least 32 weights");
    const I index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
  }
};

}  // namespace

}  // namespace cpu
}  // namespace cuda_int4
