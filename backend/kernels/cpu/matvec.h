// matvec -- y[m, n] for few rows m, straight from the packed codes; one thread owns an n.
//
//   operand     dtype            shape          order in memory
//   x           staged by the policy P, one block per 8 * S::kLanes consecutive k
//   qdata       u32 = 8 codes    [N, K/8]       row-major
//   scale, zp   any float        [N, n_groups]  row-major
//   y (out)     f16, bf16, f32   [M, N]         row-major
//
// Lane i of a vector of dwords holds the codes of k = 8i .. 8i + 7 of its block, so each lane is
// within one group, and a dot needs no shuffle: x is permuted once per call to match. Four rows n
// go together and share the loads of x.
// Bytes     reads N*K/2 + scales once; bound by memory where the arithmetic keeps up (README.md)
// Numerics  fp32: per block and lane sum_j x * q, then minus zero_point * sum_j x, times scale,
//           added to the lane's sum; lanes added at the end. x one-hot gives (q - z) * scale
//           rounded as the definition rounds it. The order is the same for every cut of the work.
#pragma once

#include "cpu_kernels.h"
#include "linear_parts.h"

namespace cuda_int4 {
namespace cpu {

constexpr int64_t kMatvecRows = 4;    // rows n of one unit
constexpr int64_t kChunkBlocks = 64;  // blocks of K between refills of the group buffers
constexpr int64_t kMatvecMaxM = 64;   // rows of x that scratch holds

template <class S>
constexpr int64_t kBlockK = 8 * S::kLanes;

template <class S, class P>
static uint64_t matvec_row_bytes(const LinearJob& job) {
  return static_cast<uint64_t>(ceil_div(job.K, kBlockK<S>)) * P::kBlockBytes;
}

template <class S, class P>
static uint64_t matvec_scratch_bytes(const LinearJob& job) {
  return matvec_row_bytes<S, P>(job) * static_cast<uint64_t>(job.M);
}

template <class S, class P>
static void matvec_stage(const LinearJob& job, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    uint8_t* to = static_cast<uint8_t*>(job.scratch) + m * matvec_row_bytes<S, P>(job);
    for (int64_t k = 0; k < job.K; k += kBlockK<S>, to += P::kBlockBytes) {
      P::stage(job, m, k, smaller(kBlockK<S>, job.K - k), to);
    }
  }
}

// kRows outputs y[m, n .. n + kRows). Scales and zero points become float32 a chunk at a time; with
// kBFloat they are bfloat16 and are read where they lie: 495 to 442 us at 4096 x 4096, group_size 32,
// two threads of an AMD EPYC with AVX-512 BF16.
template <class S, class P, int kRows, bool kZero, bool kBFloat, int kLanesPerGroup>
static void matvec_rows(const LinearJob& job, int64_t m, int64_t n) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int64_t kGroupsPerBlock = kLanesPerGroup >= S::kLanes ? 1 : S::kLanes / kLanesPerGroup;
  constexpr int64_t kWordBytes = 4 * S::kLanes;
  constexpr int64_t kStaged = kChunkBlocks * kGroupsPerBlock + 2 * S::kLanes;
  alignas(64) float scales[kRows][kStaged];
  alignas(64) float zeros[kRows][kStaged];

  const int64_t n_groups = job.K / job.group_size;
  const int64_t n_blocks = ceil_div(job.K, kBlockK<S>), n_full = job.K / kBlockK<S>;
  // Index of a block's first group = its number of groups so far >> shift.
  const int shift = group_shift(ceil_div(job.group_size, kBlockK<S>), n_groups == 1);
  const uint8_t* x = static_cast<const uint8_t*>(job.scratch) + m * matvec_row_bytes<S, P>(job);
  const uint8_t* q = job.qdata + n * (job.K / 2);
  F sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = S::zero();

  for (int64_t chunk = 0; chunk < n_blocks; chunk += kChunkBlocks) {
    const int64_t chunk_end = smaller(chunk + kChunkBlocks, n_blocks);
    int64_t first = 0;  // group of the first staged scale
    const auto stage_groups = [&](int64_t block_begin, int64_t block_end) {
      first = (block_begin * kGroupsPerBlock) >> shift;
      const int64_t end = smaller(n_groups, ((block_end * kGroupsPerBlock - 1) >> shift) + 1);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (n + r) * n_groups + first;
        load_groups<S>(job.scale, job.scale_dtype, at, end - first, scales[r]);
        if (kZero) load_groups<S>(job.zero_point, job.zero_point_dtype, at, end - first, zeros[r]);
      }
    };
    // The value of each lane's group; a partial block has fewer groups than a vector reads.
    const auto spread = [&](const void* from, const float (&staged)[kStaged], int r, int64_t group,
                            bool is_full) {
      if constexpr (kBFloat) {
        const BFloat* values = static_cast<const BFloat*>(from) + (n + r) * n_groups + group;
        if (is_full) return S::template spread_bfloat<kLanesPerGroup>(values);
      }
      return S::template spread<kLanesPerGroup>(staged + (group - first));
    };
    const auto add_block = [&](int64_t block, const I(&words)[kRows], bool is_full) {
      const int64_t group = (block * kGroupsPerBlock) >> shift;
      F zero[kRows], partial[kRows];
      for (int r = 0; r < kRows; ++r) {
        if (kZero) zero[r] = spread(job.zero_point, zeros[r], r, group, is_full);
      }
      P::template dot<kZero, kRows>(words, x + block * P::kBlockBytes, zero, partial);
      for (int r = 0; r < kRows; ++r) {
        sums[r] = S::fma(spread(job.scale, scales[r], r, group, is_full), partial[r], sums[r]);
      }
    };
    if (!kBFloat) stage_groups(chunk, chunk_end);
    for (int64_t block = chunk; block < smaller(chunk_end, n_full); ++block) {
      I words[kRows];
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* from = q + r * (job.K / 2) + block * kWordBytes;
        words[r] = S::load_words(from);
        // The same place of the next unit: 1.4x over the hardware's own prefetch, which starts
        // anew at each row. Past the end of qdata it is a no-op.
        __builtin_prefetch(from + kRows * (job.K / 2));
      }
      add_block(block, words, true);
    }
    if (chunk_end == n_blocks && n_full < n_blocks) {  // the last block is a partial one
      const int64_t n_words = (job.K - n_full * kBlockK<S>) / 8;
      I words[kRows];
      for (int r = 0; r < kRows; ++r) {
        words[r] = S::load_words_partial(q + r * (job.K / 2) + n_full * kWordBytes, n_words);
      }
      if (kBFloat) stage_groups(n_full, n_blocks);
      add_block(n_full, words, false);
    }
  }
  for (int r = 0; r < kRows; ++r) store_y(job, m, n + r, S::sum(sums[r]));
}

template <class S, class P, bool kZero, bool kBFloat, int kLanesPerGroup>
static void matvec_units(const LinearJob& job, int64_t unit_begin, int64_t unit_end) {
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t n = unit * kMatvecRows;
    for (int64_t m = 0; m < job.M; ++m) {  // the unit's codes stay in L1 between rows of x
      if (n + kMatvecRows <= job.N) {
        matvec_rows<S, P, kMatvecRows, kZero, kBFloat, kLanesPerGroup>(job, m, n);
      } else {
        for (int64_t r = n; r < job.N; ++r) {
          matvec_rows<S, P, 1, kZero, kBFloat, kLanesPerGroup>(job, m, r);
        }
      }
    }
  }
}

template <class S, class P>
static void matvec_run(const LinearJob& job, int64_t unit_begin, int64_t unit_end) {
  const auto with_zero = [&](auto lanes_per_group) {
    constexpr int kLanesPerGroup = decltype(lanes_per_group)::value;
    const bool has_zero = job.zero_point != nullptr;
    if constexpr (S::kSpreadsBFloat) {
      if (job.scale_dtype == DType::kBFloat16 &&
          (!has_zero || job.zero_point_dtype == DType::kBFloat16)) {
        return has_zero
                   ? matvec_units<S, P, true, true, kLanesPerGroup>(job, unit_begin, unit_end)
                   : matvec_units<S, P, false, true, kLanesPerGroup>(job, unit_begin, unit_end);
      }
    }
    has_zero ? matvec_units<S, P, true, false, kLanesPerGroup>(job, unit_begin, unit_end)
             : matvec_units<S, P, false, false, kLanesPerGroup>(job, unit_begin, unit_end);
  };
  if (job.group_size == 32 && S::kLanes > 4) return with_zero(std::integral_constant<int, 4>());
  if (job.group_size == 64 && S::kLanes > 8) return with_zero(std::integral_constant<int, 8>());
  with_zero(std::integral_constant<int, S::kLanes>());
}

template <class S, class P>
constexpr LinearKernel matvec_kernel(const char* name) {
  return {name,
          kMatvecRows,
          kMatvecMaxM,
          matvec_scratch_bytes<S, P>,
          matvec_stage<S, P>,
          matvec_run<S, P>};
}

}  // namespace cpu
}  // namespace cuda_int4
