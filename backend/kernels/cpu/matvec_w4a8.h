// matvec policy for int8 activations: exact int32 dots of 8 codes per lane, then float32.
//
// Staged block: a int8 of even k [kLanes][4], of odd k [kLanes][4], s_x f32 [kLanes], then per lane
// the sum of its 8 a: as f32 where there are zero points, else as int32 times -8 (symmetric codes
// are 0..15 about 8; the dot starts from there). k beyond K is 0.
#pragma once

#include "matvec.h"
#include "quantize_int8.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatvecW4A8 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kBlockBytes = 16 * kLanes;

  static void stage(const LinearJob& job, int64_t m, int64_t k, int64_t count, uint8_t* to) {
    int8_t* even = reinterpret_cast<int8_t*>(to);
    int8_t* odd = even + 4 * kLanes;
    float* s_x = reinterpret_cast<float*>(to + 8 * kLanes);
    uint8_t* sums = to + 12 * kLanes;
    memset(to, 0, kBlockBytes);
    for (int64_t k32 = 0; k32 < count; k32 += 32) {
      const Int8Group group = quantize_int8<S>(job, m, k + k32);
      for (int64_t lane = k32 / 8; lane < k32 / 8 + 4; ++lane) {
        const int8_t* a = group.a + 8 * lane - k32;
        int32_t sum = 0;
        for (int pair = 0; pair < 4; ++pair) {
          even[4 * lane + pair] = a[2 * pair];
          odd[4 * lane + pair] = a[2 * pair + 1];
          sum += a[2 * pair] + a[2 * pair + 1];
        }
        s_x[lane] = group.s_x;
        const float float_sum = static_cast<float>(sum);
        const int32_t minus_8_sum = -8 * sum;
        const void* stored = &minus_8_sum;
        if (job.zero_point != nullptr) stored = &float_sum;
        memcpy(sums + 4 * lane, stored, 4);
      }
    }
  }

  // partial[r] = per lane, s_x * (dot(a, q) - zero_point * sum(a))
  template <bool kZero, int kRows>
  static void dot(const I (&words)[kRows], const uint8_t* block, const F (&zero)[kRows],
                  F (&partial)[kRows]) {
    const int32_t* a = reinterpret_cast<const int32_t*>(block);
    const I even = S::load_i(a), odd = S::load_i(a + kLanes), sums = S::load_i(a + 3 * kLanes);
    const F s_x = S::as_float(S::load_i(a + 2 * kLanes));
    for (int r = 0; r < kRows; ++r) {
      const I start = kZero ? S::zero_i() : sums;
      F dot =
          S::to_float(S::dot8(start, S::low_codes(words[r]), even, S::high_codes(words[r]), odd));
      if (kZero) dot = S::fnma(zero[r], S::as_float(sums), dot);
      partial[r] = S::mul(s_x, dot);
    }
  }
};

}  // namespace cpu
}  // namespace cuda_int4
