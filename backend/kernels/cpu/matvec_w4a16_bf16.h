// matvec policy for bfloat16 activations where the machine multiplies bfloat16 pairs: half the
// instructions of matvec_w4a16.h, and as exact, since codes and x are bfloat16 as they are.
//
// Staged block: x bf16 [4][2 * kLanes], element (j, word) = x[4 * word + j]; then f32 [kLanes], the
// sum of each lane's 8 elements. k beyond K is 0.
#pragma once

#include "matvec.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatvecW4A16Bf16 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kBlockBytes = 5 * 4 * kLanes;

  static void stage(const LinearJob& job, int64_t m, int64_t k, int64_t count, uint8_t* to) {
    BFloat x[kBlockK<S>] = {};
    const BFloat* from = static_cast<const BFloat*>(job.x) + m * job.K + k;
    memcpy(x, from, static_cast<size_t>(count) * sizeof(BFloat));
    BFloat* staged = reinterpret_cast<BFloat*>(to);
    for (int j = 0; j < 4; ++j) {
      for (int word = 0; word < 2 * kLanes; ++word) staged[j * 2 * kLanes + word] = x[4 * word + j];
    }
    float* sums = reinterpret_cast<float*>(to + 16 * kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] = 0.f;
      for (int j = 0; j < 8; ++j) sums[lane] += to_float(x[8 * lane + j]);
    }
  }

  // partial[r] = per lane, sum_j x * (q - zero_point)
  template <bool kZero, int kRows>
  static void dot(const I (&words)[kRows], const uint8_t* block, const F (&zero)[kRows],
                  F (&partial)[kRows]) {
    const int32_t* x = reinterpret_cast<const int32_t*>(block);
    for (int r = 0; r < kRows; ++r) partial[r] = S::zero();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const I x_j = S::load_i(x + j * kLanes);
      for (int r = 0; r < kRows; ++r) {
        partial[r] = S::dot_pairs(partial[r], S::template bf16_codes<!kZero>(words[r], j), x_j);
      }
    }
    if (!kZero) return;
    const F sum = S::as_float(S::load_i(x + 4 * kLanes));
    for (int r = 0; r < kRows; ++r) partial[r] = S::fnma(zero[r], sum, partial[r]);
  }
};

}  // namespace cpu
}  // namespace cuda_int4
