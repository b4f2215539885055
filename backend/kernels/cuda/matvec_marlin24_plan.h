// How matvec_marlin24_mma shares out its work: the grid, and where things lie
// in a block's memory.
#pragma once

#include <cstdint>

namespace cuda_int4 {

struct Marlin24Problem {
  int64_t M, padded_N, K;  // M <= 16
  int64_t unit_bytes;      // of shared memory, for a unit that is on its way
  bool is_int8;
};

struct Marlin24Device {
  int n_multiprocessors, shared_bytes;  // shared: that one block may have
  bool has_clusters;
};

struct Marlin24Plan {
  int warps;         // of a block
  int cluster;       // blocks that share K: 1, 2, 4 or 8
  int clusters;      // of the grid; they share the strips
  int round_strips;  // of a cluster, whose sums are added up together
};

// In bytes, from the start of a block's shared memory.
struct Marlin24Shared {
  uint32_t x, x_stride, factors, ring, slots, partial, total;
};

constexpr int kMarlin24StripRows = 64, kMarlin24UnitK = 128;
constexpr int kMarlin24Ring = 2;           // units of a warp that are on their way
constexpr int kMarlin24ColumnFloats = 68;  // from column to column of 64 sums: no bank conflicts
constexpr int kMarlin24MaxCluster = 8;

// What registers allow of a multiprocessor's warps, and so of a block's.
constexpr int marlin24_max_warps(int64_t M) { return M <= 8 ? 24 : 16; }

Marlin24Shared marlin24_shared(const Marlin24Problem& problem, const Marlin24Plan& plan);

// The plan with the smallest estimate of those that fit; false if none does.
bool marlin24_plan(const Marlin24Problem& problem, const Marlin24Device& device,
                   Marlin24Plan* plan);

}  // namespace cuda_int4
