// matmul policy for int8 activations: exact int32 dots per 32 k, folded into float32.
//
// Staged x, per row: a int8 [K/8][8] (the 4 of even k, then the 4 of odd k), padded by 64 bytes;
// then for all rows f32 [M][K/32][2] (s_x, sum of a).
// Tile: u8 [kLanes dwords][even k, odd k][2 * kLanes n][4] = codes 0..15.
#pragma once

#include "matmul.h"
#include "quantize_int8.h"

namespace cuda_int4 {
namespace cpu {

template <class S>
struct MatmulW4A8 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;
  static constexpr int64_t kColumns = 2 * kLanes;
  static constexpr int kMaxRows = kLanes == 16 ? 8 : 4;

  struct Block {
    const LinearJob* job;
    const GroupWindow<S>* groups;
    int64_t k, count, first_group;
    int group_shift;
    alignas(64) int32_t tile[kLanes * 2 * kColumns];
  };

  static int64_t row_bytes(const LinearJob& job) { return job.K + 64; }
  static float* parameters(const LinearJob& job, int64_t m) {
    uint8_t* after_a = static_cast<uint8_t*>(job.scratch) + job.M * row_bytes(job);
    return reinterpret_cast<float*>(after_a) + m * (job.K / 32 * 2);
  }
  static uint64_t scratch_bytes(const LinearJob& job) {
    return static_cast<uint64_t>(job.M) * static_cast<uint64_t>(row_bytes(job) + job.K / 32 * 8);
  }
  static void stage(const LinearJob& job, int64_t m_begin, int64_t m_end) {
    for (int64_t m = m_begin; m < m_end; ++m) {
      int8_t* a = static_cast<int8_t*>(job.scratch) + m * row_bytes(job);
      float* parameter = parameters(job, m);
      for (int64_t k = 0; k < job.K; k += 32, a += 32, parameter += 2) {
        const Int8Group group = quantize_int8<S>(job, m, k);
        for (int i = 0; i < 32; ++i) a[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = group.a[i];
        parameter[0] = group.s_x;
        parameter[1] = static_cast<float>(group.sum);
      }
    }
  }

  static void decode(const I (&words)[kLanes], int64_t half, Block* block) {
    for (int64_t i = 0; i < block->count / 8; ++i) {
      S::store_i(block->tile + 2 * i * kColumns + half, S::low_codes(words[i]));
      S::store_i(block->tile + (2 * i + 1) * kColumns + half, S::high_codes(words[i]));
    }
  }

  template <int kRows>
  static void multiply(const Block& block, int64_t m, float* sums) {
    const LinearJob& job = *block.job;
    const int64_t stride = row_bytes(job);
    const uint8_t* a_rows = static_cast<const uint8_t*>(job.scratch) + m * stride + block.k;
    for (int64_t k = 0; k < block.count; k += 32) {
      const int64_t group = ((block.k + k) >> block.group_shift) - block.first_group;
      I left[kRows], right[kRows];
      for (int r = 0; r < kRows; ++r) left[r] = right[r] = S::zero_i();
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const int32_t* tile = block.tile + (k / 8 + i) * 2 * kColumns;
        const I low_left = S::load_i(tile), low_right = S::load_i(tile + kLanes);
        const I high_left = S::load_i(tile + kColumns);
        const I high_right = S::load_i(tile + kColumns + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t a[2];
          memcpy(a, a_rows + r * stride + k + 8 * i, 8);
          const I even = S::set1_i(a[0]), odd = S::set1_i(a[1]);
          left[r] = S::dot8(left[r], low_left, even, high_left, odd);
          right[r] = S::dot8(right[r], low_right, even, high_right, odd);
        }
      }
      const float* scale = block.groups->scale[group];
      const float* zero = block.groups->zero[group];
      const bool has_zero = job.zero_point != nullptr;
      for (int half = 0; half < 2; ++half) {
        const F scales = S::load(scale + half * kLanes);
        const F zeros = has_zero ? S::load(zero + half * kLanes) : S::set1(8.f);
        for (int r = 0; r < kRows; ++r) {
          const float* parameter = parameters(job, m + r) + (block.k + k) / 32 * 2;
          float* sum = sums + r * kColumns + half * kLanes;
          const F dot = S::to_float(half == 0 ? left[r] : right[r]);
          const F centred = S::fnma(zeros, S::set1(parameter[1]), dot);
          const F factor = S::mul(scales, S::set1(parameter[0]));
          S::store(sum, S::fma(factor, centred, S::load(sum)));
        }
      }
    }
  }
};

}  // namespace cpu
}  // namespace cuda_int4
