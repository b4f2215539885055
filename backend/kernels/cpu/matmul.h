// matmul -- y[m, n] for many rows m: a tile of weights is decoded once and used by all of them.
//
//   operand     dtype            shape          order in memory
//   x           staged by the policy P, row by row
//   qdata       u32 = 8 codes    [N, K/8]       row-major
//   scale, zp   any float        [N, n_groups]  row-major
//   y (out)     f16, bf16, f32   [M, N]         row-major
//
// A unit is 2 * kLanes columns n, one to a lane. Per block of 8 * kLanes k: transpose the dwords of
// the unit's rows, decode into a tile in L1 (the policy says as what), then for each 8 or fewer
// rows m multiply into sums [m, n] kept on the stack.
// Bytes     reads the codes once per 128 rows m; bound by arithmetic
// Numerics  fp32; per (m, n) in order of k, the same for every cut of the work.
#pragma once

#include "cpu_kernels.h"
#include "linear_parts.h"

namespace cuda_int4 {
namespace cpu {

constexpr int64_t kMatmulMaxM =
    128;  // rows m of one pass over the weights: bounds sums and scratch

// The scales and zero points of one window of kLanes groups, [group][n].
template <class S>
struct GroupWindow {
  static constexpr int64_t kColumns = 2 * S::kLanes;
  alignas(64) float scale[S::kLanes][kColumns];
  alignas(64) float zero[S::kLanes][kColumns];

  void load(const LinearJob& job, int64_t n, int64_t first_group) {
    load_part(job, job.scale, job.scale_dtype, n, first_group, scale);
    if (job.zero_point != nullptr) {
      load_part(job, job.zero_point, job.zero_point_dtype, n, first_group, zero);
    }
  }

 private:
  static void load_part(const LinearJob& job, const void* from, DType dtype, int64_t n,
                        int64_t first_group, float (&to)[S::kLanes][kColumns]) {
    const int64_t n_groups = job.K / job.group_size;
    const int64_t count = smaller(S::kLanes, n_groups - first_group);
    alignas(64) float row[2 * S::kLanes];
    for (int64_t half = 0; half < kColumns; half += S::kLanes) {
      typename S::I rows[S::kLanes];
      for (int64_t r = 0; r < S::kLanes; ++r) {
        const int64_t at = smaller(n + half + r, job.N - 1) * n_groups + first_group;
        load_groups<S>(from, dtype, at, count, row);
        rows[r] = S::as_int(S::load(row));
      }
      S::transpose(rows);
      for (int g = 0; g < S::kLanes; ++g) S::store(to[g] + half, S::as_float(rows[g]));
    }
  }
};

// Calls P::multiply with the number of rows as a constant, kMaxRows at a time.
template <class P, int kRows>
static void multiply_tail(const typename P::Block& block, int64_t m, int64_t n_rows, float* sums) {
  if constexpr (kRows > 0) {
    if (n_rows == kRows) return P::template multiply<kRows>(block, m, sums);
    multiply_tail<P, kRows - 1>(block, m, n_rows, sums);
  }
}

template <class S, class P>
static void matmul_run(const LinearJob& job, int64_t unit_begin, int64_t unit_end) {
  using I = typename S::I;
  constexpr int64_t kColumns = 2 * S::kLanes, kBlock = 8 * S::kLanes;
  alignas(64) float sums[kMatmulMaxM * kColumns];
  GroupWindow<S> groups;
  typename P::Block block;
  const int64_t n_groups = job.K / job.group_size;
  block.job = &job;
  block.groups = &groups;
  block.group_shift = group_shift(job.group_size, n_groups == 1);

  for (int64_t n = unit_begin * kColumns; n < smaller(unit_end * kColumns, job.N); n += kColumns) {
    for (int64_t i = 0; i < job.M * kColumns; i += S::kLanes) S::store(sums + i, S::zero());
    int64_t window = -1;
    for (int64_t k = 0; k < job.K; k += kBlock) {
      block.k = k;
      block.count = smaller(kBlock, job.K - k);
      if ((k >> block.group_shift) / S::kLanes != window) {
        window = (k >> block.group_shift) / S::kLanes;
        block.first_group = window * S::kLanes;
        groups.load(job, n, block.first_group);
      }
      for (int64_t half = 0; half < kColumns; half += S::kLanes) {
        I words[S::kLanes];
        for (int64_t r = 0; r < S::kLanes; ++r) {
          const uint8_t* q = job.qdata + smaller(n + half + r, job.N - 1) * (job.K / 2) + k / 2;
          words[r] =
              block.count == kBlock ? S::load_words(q) : S::load_words_partial(q, block.count / 8);
        }
        S::transpose(words);
        P::decode(words, half, &block);
      }
      int64_t m = 0;
      for (; m + P::kMaxRows <= job.M; m += P::kMaxRows) {
        P::template multiply<P::kMaxRows>(block, m, sums + m * kColumns);
      }
      multiply_tail<P, P::kMaxRows - 1>(block, m, job.M - m, sums + m * kColumns);
    }
    for (int64_t m = 0; m < job.M; ++m) {
      for (int64_t half = 0; half < kColumns && n + half < job.N; half += S::kLanes) {
        store_y_vector<S>(job, m, n + half, smaller(S::kLanes, job.N - n - half),
                          S::load(sums + m * kColumns + half));
      }
    }
  }
}

template <class S, class P>
constexpr LinearKernel matmul_kernel(const char* name) {
  return {name, 2 * S::kLanes, kMatmulMaxM, P::scratch_bytes, P::stage, matmul_run<S, P>};
}

}  // namespace cpu
}  // namespace cuda_int4
