// marlin.v1 and marlin24.v1 -- codes in the order of tensor-core fragments, dense and 2:4 sparse.
//
// Np is N rounded up to 64, kMarlinTileN. Rows N .. Np - 1 are padding: scale 0, code 8, zero point
// 8; their metadata is valid. A kernel may compute them, y has no place for them.
//
//   marlin.v1
//   part        dtype                     shape             order in memory                   align
//   qdata       u8 (32-bit words)         [K/16, 8*Np]      word W of tile row kt: below      16 B
//   scale       f16 | bf16 | f32          [n_groups, Np]    permuted within 64 (32) columns   16 B
//   zero_point  dtype of scale | f32      [n_groups, Np]    as scale; absent means 8.0        16 B
//   bias        f16 | bf16 | f32          [N]               contiguous; absent means 0        dtype
//
//   marlin24.v1
//   qdata       u8 (32-bit words)         [K/32, 8*Np]      the 2 codes kept of each 4 k      16 B
//   meta        i16                       [K/32, 2*Np]      their places, 4 bits for 4 k      16 B
//   scale       f16 | bf16 | f32          [n_groups, Np]    permuted within 8 columns         16 B
//   zero_point  absent: a weight that is not kept is 0
//   bias        f16 | bf16 | f32          [N]               contiguous; absent means 0        dtype
//
//   w = (q - zero_point) * scale. Nibble t of word W of row kt of qdata (2*Np words), with
//   i = W % 128 / 4, j = W % 4:
//     k = 16 * kt + 2 * (i % 4) + t / 4 + 8 * (t % 2)      (2:4: kc, counting kept codes)
//     n = 64 * (W / 128) + 16 * j + i / 4 + 8 * (t / 2 % 2)                (marlin.v1)
//     n = 64 * (W / 128) + 8 * (i / 4) + 4 * (t / 2 % 2) + j               (marlin24.v1)
//   Element of row n in a row of scale, with n = b + ..: marlin.v1 n = 64c + 8x + y -> 64c + 8y + x;
//   one group per row: n = 32c + 8x + 2y + e -> 32c + 8y + 2x + e (x, y < 4, e < 2); marlin24.v1
//   n = 8c + 4x + y -> 8c + 2y + x (x < 2, y < 4); one group per row: n.
//   meta of weights k - k % 4 .. + 3 of row n is first | second << 2, first < second, in bits
//   4 * (k / 4 % 4) of word 2 * Np * (k / 32) + 128 * (n / 64) + 64 * (n / 2 % 2) + 8 * (n % 64 / 8)
//   + 4 * (n % 2) + 2 * (k / 16 % 2) + n / 4 % 2.
//
// Requires K % 32 == 0, group_size in {32, 64, 128, 256} or K, K % group_size == 0; any N, which
// LinearArgs.out_features states. Source: IST-DASLab/marlin and Sparse-Marlin; docs/adr/0008.
#pragma once

#include "linear_sizes.h"

namespace cuda_int4 {

constexpr int64_t kMarlinTileN = 64;

// N with its padding; args are valid.
inline int64_t marlin_padded_N(const LinearArgs& args) { return args.qdata.sizes[1] / 8; }

Status validate_marlin_weight(const LinearArgs& args);
Status validate_marlin24_weight(const LinearArgs& args);
int64_t marlin_K(const LinearArgs& args);
int64_t marlin24_K(const LinearArgs& args);

// All of meta, in host memory at any address; args have passed validate_marlin24_weight. The message names the
// first place that is wrong.
Status validate_marlin24_values(const LinearArgs& args);

// Kernels of the layout table, one pair per device; arguments have passed validate_linear.
uint64_t cpu_linear_marlin_scratch_bytes(const LinearArgs& args);
Status cpu_linear_marlin(const LinearArgs& args, const ExecutionContext& context);
uint64_t cuda_linear_marlin_scratch_bytes(const LinearArgs& args);
Status cuda_linear_marlin(const LinearArgs& args, const ExecutionContext& context);
uint64_t cpu_linear_marlin24_scratch_bytes(const LinearArgs& args);
Status cpu_linear_marlin24(const LinearArgs& args, const ExecutionContext& context);
uint64_t cuda_linear_marlin24_scratch_bytes(const LinearArgs& args);
Status cuda_linear_marlin24(const LinearArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
