// matmul policy for float activations: weights decoded to float32, one multiply-add per weight.
//
// Staged x: f32 [M, K + kLanes]; the odd row length keeps rows out of each other's cache sets.
// Tile: f32 [8 * kLanes k][2 * kLanes n] = (q - zero_point) * scale, rounded as the definition.
#pragma once

#include "matmul.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatmulW4A16 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kColumns = 2 * kLanes;
  static constexpr int kMaxRows = kLanes == 16 ? 8 : 6;  // accumulators: 16 of 32, 12 of 16

  struct Block {
    const LinearJob* job;
    const GroupWindow<S>* groups;
    int64_t k, count, first_group;
    int group_shift;
    alignas(64) float tile[8 * kLanes * kColumns];
  };

  static int64_t row_floats(const LinearJob& job) { return job.K + kLanes; }
  static uint64_t scratch_bytes(const LinearJob& job) {
    return static_cast<uint64_t>(job.M) * static_cast<uint64_t>(row_floats(job)) * 4;
  }
  static void stage(const LinearJob& job, int64_t m_begin, int64_t m_end) {
    for (int64_t m = m_begin; m < m_end; ++m) {
      load_x<S>(job, m, 0, job.K, static_cast<float*>(job.scratch) + m * row_floats(job));
    }
  }

  static void decode(const I (&words)[kLanes], int64_t half, Block* block) {
    const bool has_zero = block->job->zero_point != nullptr;
    for (int64_t i = 0; i < block->count / 8; ++i) {
      const int64_t group = ((block->k + 8 * i) >> block->group_shift) - block->first_group;
      const F scale = S::load(block->groups->scale[group] + half);
      const F zero = has_zero ? S::load(block->groups->zero[group] + half) : S::set1(8.f);
      float* to = block->tile + 8 * i * kColumns + half;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const F code = S::template code<false>(words[i], j);
        S::store(to + j * kColumns, S::mul(S::sub(code, zero), scale));
      }
    }
  }

  template <int kRows>
  static void multiply(const Block& block, int64_t m, float* sums) {
    const int64_t stride = row_floats(*block.job);
    const float* x = static_cast<const float*>(block.job->scratch) + m * stride + block.k;
    F left[kRows], right[kRows];
    for (int r = 0; r < kRows; ++r) {
      left[r] = S::load(sums + r * kColumns);
      right[r] = S::load(sums + r * kColumns + kLanes);
    }
    for (int64_t k = 0; k < block.count; ++k) {
      const F w_left = S::load(block.tile + k * kColumns);
      const F w_right = S::load(block.tile + k * kColumns + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F x_rk = S::set1(x[r * stride + k]);
        left[r] = S::fma(x_rk, w_left, left[r]);
        right[r] = S::fma(x_rk, w_right, right[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      S::store(sums + r * kColumns, left[r]);
      S::store(sums + r * kColumns + kLanes, right[r]);
    }
  }
};

}  // namespace cpu
}  // namespace cuda_int4
