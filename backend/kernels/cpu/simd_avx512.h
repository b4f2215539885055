// AVX-512 (F, BW, VL, DQ, VNNI) in the terms of simd_scalar.h and simd_avx2.h.
#pragma once

// GCC 12 warns of its own header's _mm512_undefined (gcc.gnu.org/PR105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

// Unnamed, so that each file compiles its own copy of this and of every template over it: code for
// a richer instruction set must not stand in for code for a poorer one at link time.
namespace {

struct Avx512Simd {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F load(const BFloat* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static void store(Half* to, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat* to, F value) {
    const I bits = _mm512_castps_si512(value);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const I chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F pow2(F n) {
    const I exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static F select_less(F a, F b, F if_less, F if_not) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), if_not, if_less);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float maximum(F a) { return _mm512_reduce_max_ps(a); }

  // ---- int4: one dword holds the codes of 8 consecutive k, the first in its low nibble ----

  static I load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }
  // The first n_words dwords, the rest 0; reads no byte past them.
  static I load_words_partial(const uint8_t* from, int64_t n_words) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n_words) - 1), from);
  }
  // Code j of each lane, minus 8 if kMinus8, as float: a table look-up by the low 4 bits.
  template <bool kMinus8>
  static F code(I words, int j) {
    const F codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const F centred = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * static_cast<unsigned>(j)),
                                 kMinus8 ? centred : codes);
  }
  static I low_codes(I words) { return _mm512_and_si512(words, _mm512_set1_epi8(15)); }
  static I high_codes(I words) {
    return _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
  }
  // sum + dot of 4 codes and 4 int8 per lane, twice.
  static I dot8(I sum, I low, I a_low, I high, I a_high) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, low, a_low), high, a_high);
  }
  static I zero_i() { return _mm512_setzero_si512(); }
  static I set1_i(int32_t value) { return _mm512_set1_epi32(value); }
  static I load_i(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store_i(int32_t* to, I value) { _mm512_storeu_si512(to, value); }
  static F to_float(I value) { return _mm512_cvtepi32_ps(value); }
  static I to_int(F value) { return _mm512_cvtps_epi32(value); }  // ties to even
  static I as_int(F value) { return _mm512_castps_si512(value); }
  static F as_float(I value) { return _mm512_castsi512_ps(value); }

  // rows[i] lane j <-> rows[j] lane i
  static void transpose(I (&rows)[kLanes]) {
    I quads[16];  // quads[4 * h + c]: columns c, c + 4, c + 8, c + 12 of rows 4h .. 4h + 3
    for (int h = 0; h < 4; ++h) {
      const I low01 = _mm512_unpacklo_epi32(rows[4 * h], rows[4 * h + 1]);
      const I high01 = _mm512_unpackhi_epi32(rows[4 * h], rows[4 * h + 1]);
      const I low23 = _mm512_unpacklo_epi32(rows[4 * h + 2], rows[4 * h + 3]);
      const I high23 = _mm512_unpackhi_epi32(rows[4 * h + 2], rows[4 * h + 3]);
      quads[4 * h] = _mm512_unpacklo_epi64(low01, low23);
      quads[4 * h + 1] = _mm512_unpackhi_epi64(low01, low23);
      quads[4 * h + 2] = _mm512_unpacklo_epi64(high01, high23);
      quads[4 * h + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    for (int c = 0; c < 4; ++c) {
      const I low_even = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
      const I low_odd = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd);
      const I high_even = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
      const I high_odd = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
      rows[c] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
      rows[c + 8] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
      rows[c + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
      rows[c + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
  }
  // Lane i gets values[i / lanes_per_group]; reads kLanes floats.
  template <int kLanesPerGroup>
  static F spread(const float* values) {
    if (kLanesPerGroup >= kLanes) return _mm512_set1_ps(*values);
    static_assert(kLanesPerGroup == 4 || kLanesPerGroup >= 8, "groups of 32, 64 or more weights");
    const I fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const I eights = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(kLanesPerGroup == 4 ? fours : eights, _mm512_loadu_ps(values));
  }
  // The same from bfloat16, of which it reads no more than the lanes need.
  static constexpr bool kSpreadsBFloat = true;
  template <int kLanesPerGroup>
  static F spread_bfloat(const BFloat* values) {
    if (kLanesPerGroup >= kLanes) return _mm512_set1_ps(cpu::to_float(*values));
    constexpr size_t kBytes = 2 * kLanes / (kLanesPerGroup < kLanes ? kLanesPerGroup : kLanes);
    int64_t bits = 0;
    memcpy(&bits, values, kBytes);
    // Bytes of a dword from low to high: 0, 0, and the two of value v, for the four quarters.
    constexpr int kSecond = kLanesPerGroup == 4 ? 1 : 0, kThird = kLanesPerGroup == 4 ? 2 : 1;
    constexpr auto kDword = [](int v) { return ((2 * v + 1) << 24) | ((2 * v) << 16) | 0x8080; };
    const I bytes = _mm512_setr_epi32(
        kDword(0), kDword(0), kDword(0), kDword(0), kDword(kSecond), kDword(kSecond),
        kDword(kSecond), kDword(kSecond), kDword(kThird), kDword(kThird), kDword(kThird),
        kDword(kThird), kDword(kThird + kSecond), kDword(kThird + kSecond),
        kDword(kThird + kSecond), kDword(kThird + kSecond));
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(bits), bytes));
  }
};

}  // namespace

}  // namespace cpu
}  // namespace cuda_int4
