// matmul policy for bfloat16 activations where the machine multiplies bfloat16 pairs: codes stay
// exact in bfloat16, and scale and zero point are applied to float32 sums once per segment.
//
// A segment is as many k as share a group, at most a block (8 * kLanes).
// Staged x, per row: dwords [K/8][4], the pair (x[8i + j], x[8i + 4 + j]), padded by 64 bytes; then
// for all rows f32 [M][n_segments], the sum of x.
// Tile: dwords [4 * kLanes pairs][2 * kLanes n] of bfloat16 codes.
#pragma once

#include "matmul.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatmulW4A16Bf16 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kColumns = 2 * kLanes;
  static constexpr int kMaxRows = 8;

  struct Block {
    const LinearJob* job;
    const GroupWindow<S>* groups;
    int64_t k, count, first_group;
    int group_shift;
    alignas(64) int32_t tile[4 * kLanes * kColumns];
  };

  static int64_t segment(const LinearJob& job) { return smaller(job.group_size, 8 * kLanes); }
  static int64_t n_segments(const LinearJob& job) { return ceil_div(job.K, segment(job)); }
  static int64_t row_words(const LinearJob& job) { return job.K / 2 + kLanes; }
  static float* x_sums(const LinearJob& job, int64_t m) {
    float* after_x = static_cast<float*>(job.scratch) + job.M * row_words(job);
    return after_x + m * n_segments(job);
  }
  static uint64_t scratch_bytes(const LinearJob& job) {
    return static_cast<uint64_t>(job.M) * static_cast<uint64_t>(row_words(job) + n_segments(job)) *
           4;
  }
  static void stage(const LinearJob& job, int64_t m_begin, int64_t m_end) {
    for (int64_t m = m_begin; m < m_end; ++m) {
      const BFloat* x = static_cast<const BFloat*>(job.x) + m * job.K;
      BFloat* to = static_cast<BFloat*>(job.scratch) + 2 * m * row_words(job);
      for (int64_t k = 0; k < job.K; k += 8) {
        for (int j = 0; j < 4; ++j) {
          to[k + 2 * j] = x[k + j];
          to[k + 2 * j + 1] = x[k + 4 + j];
        }
      }
      float* sums = x_sums(job, m);
      for (int64_t k = 0; k < job.K; k += segment(job)) {
        F sum = S::zero();
        const int64_t end = smaller(k + segment(job), job.K);
        for (int64_t i = k; i < end; i += kLanes) sum = S::add(sum, S::load(x + i));
        *sums++ = S::sum(sum);
      }
    }
  }

  static void decode(const I (&words)[kLanes], int64_t half, Block* block) {
    if (block->job->zero_point != nullptr) {
      decode_codes<false>(words, half, block);
    } else {
      decode_codes<true>(words, half, block);
    }
  }

  template <int kRows>
  static void multiply(const Block& block, int64_t m, float* sums) {
    const LinearJob& job = *block.job;
    const int64_t stride = row_words(job);
    const int32_t* x = static_cast<const int32_t*>(job.scratch) + m * stride + block.k / 2;
    for (int64_t k = 0; k < block.count; k += segment(job)) {
      F left[kRows], right[kRows];
      for (int r = 0; r < kRows; ++r) left[r] = right[r] = S::zero();
      const int64_t end = smaller(k + segment(job), block.count);
      for (int64_t pair = k / 2; pair < end / 2; ++pair) {
        const I w_left = S::load_i(block.tile + pair * kColumns);
        const I w_right = S::load_i(block.tile + pair * kColumns + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t bits;
          memcpy(&bits, x + r * stride + pair, 4);  // stored as two BFloat
          const I x_pair = S::set1_i(bits);
          left[r] = S::dot_pairs(left[r], w_left, x_pair);
          right[r] = S::dot_pairs(right[r], w_right, x_pair);
        }
      }
      const int64_t group = ((block.k + k) >> block.group_shift) - block.first_group;
      const int64_t at_segment = (block.k + k) / segment(job);
      fold<kRows>(block, left, 0, group, x_sums(job, m) + at_segment, sums);
      fold<kRows>(block, right, kLanes, group, x_sums(job, m) + at_segment, sums);
    }
  }

 private:
  template <bool kMinus8>
  static void decode_codes(const I (&words)[kLanes], int64_t half, Block* block) {
    for (int64_t i = 0; i < block->count / 8; ++i) {
      int32_t* to = block->tile + 4 * i * kColumns + half;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        S::store_i(to + j * kColumns, S::template bf16_codes<kMinus8>(words[i], j));
      }
    }
  }

  // sums[r] += scale * (dot[r] - zero_point * sum of x)
  template <int kRows>
  static void fold(const Block& block, const F (&dots)[kRows], int64_t half, int64_t group,
                   const float* x_sum, float* sums) {
    const F scale = S::load(block.groups->scale[group] + half);
    const bool has_zero = block.job->zero_point != nullptr;
    const F zero = has_zero ? S::load(block.groups->zero[group] + half) : S::zero();
    const int64_t n_segments_of_row = n_segments(*block.job);
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums + r * kColumns + half;
      F dot = dots[r];
      if (has_zero) dot = S::fnma(zero, S::set1(x_sum[r * n_segments_of_row]), dot);
      S::store(sum, S::fma(scale, dot, S::load(sum)));
    }
  }
};

}  // namespace cpu
}  // namespace cuda_int4
