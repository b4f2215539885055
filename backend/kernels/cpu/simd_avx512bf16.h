// AVX-512 with BF16: simd_avx512.h and exact dots of bfloat16 pairs.
#pragma once

#include "simd_avx512.h"

namespace cuda_int4 {
namespace cpu {

namespace {

struct Avx512Bf16Simd : Avx512Simd {
  // Code j of each 16-bit word, minus 8 if kMinus8, as bfloat16 (exact): a table look-up by the low
  // 5 bits, of which the top one belongs to the next code; so the table stands twice.
  template <bool kMinus8>
  static I bf16_codes(I words, int j) {
    const I codes = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100,
                          0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));  // 0 .. 15
    const I centred = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        -0x3f00, -0x3f20, -0x3f40, -0x3f60, -0x3f80, -0x3fc0, -0x4000, -0x4080, 0x0000, 0x3f80,
        0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));  // -8 .. 7
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * static_cast<unsigned>(j)),
                                    kMinus8 ? centred : codes);
  }
  // sum + a.low * b.low + a.high * b.high per lane; products exact, float32 sums. Subnormal x (and
  // sums below 1e-38) count as 0.
  static F dot_pairs(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

}  // namespace cpu
}  // namespace cuda_int4
