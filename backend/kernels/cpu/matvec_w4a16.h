// matvec policy for float activations: x as float32, one multiply-add per weight.
//
// Staged block: x f32 [8][kLanes], element (j, lane) = x[8 * lane + j]; then f32 [kLanes], the sum
// of each lane's 8 elements. k beyond K is 0.
#pragma once

#include "matvec.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatvecW4A16 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kBlockBytes = 9 * 4 * kLanes;

  static void stage(const LinearJob& job, int64_t m, int64_t k, int64_t count, uint8_t* to) {
    alignas(64) float x[kBlockK<S>] = {};
    load_x<S>(job, m, k, k + count, x);
    float* staged = reinterpret_cast<float*>(to);
    F sum = S::zero();
    for (int j = 0; j < 8; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) staged[j * kLanes + lane] = x[8 * lane + j];
      sum = S::add(sum, S::load(staged + j * kLanes));
    }
    S::store(staged + 8 * kLanes, sum);
  }

  // partial[r] = per lane, sum_j x * (q - zero_point)
  template <bool kZero, int kRows>
  static void dot(const I (&words)[kRows], const uint8_t* block, const F (&zero)[kRows],
                  F (&partial)[kRows]) {
    const float* x = reinterpret_cast<const float*>(block);
    for (int r = 0; r < kRows; ++r) partial[r] = S::zero();
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const F x_j = S::load(x + j * kLanes);
      for (int r = 0; r < kRows; ++r) {
        partial[r] = S::fma(S::template code<!kZero>(words[r], j), x_j, partial[r]);
      }
    }
    if (!kZero) return;
    const F sum = S::load(x + 8 * kLanes);
    for (int r = 0; r < kRows; ++r) partial[r] = S::fnma(zero[r], sum, partial[r]);
  }
};

}  // namespace cpu
}  // namespace cuda_int4
