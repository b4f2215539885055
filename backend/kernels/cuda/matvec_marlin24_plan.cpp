// The choice of a plan: every cluster, number of blocks on a multiprocessor,
// warps and rounds, by their estimates.
#include "matvec_marlin24_plan.h"

#include <algorithm>

namespace cuda_int4 {

namespace {

int64_t ceil_of(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

// Microseconds, but for what all plans have in common. Fitted to an H200: of some 70 plans a shape, the
// chosen one is on average 2 % slower than the best.
float estimate(const Marlin24Problem& problem, const Marlin24Plan& plan, int n_usable,
               const Marlin24Device& device) {
  const auto as_float = [](int64_t n) { return static_cast<float>(n); };
  const int64_t units = ceil_of(ceil_of(problem.K, kMarlin24UnitK), plan.cluster);
  const int64_t strips = ceil_of(problem.padded_N / kMarlin24StripRows, plan.clusters);
  const int64_t rounds = ceil_of(strips, plan.round_strips);
  const int64_t rest = strips - (rounds - 1) * plan.round_strips;
  const int64_t warp_units = (rounds - 1) * ceil_of(plan.round_strips * units, plan.warps) +
                             ceil_of(rest * units, plan.warps);
  const int64_t block_count = ceil_of(int64_t{plan.clusters} * plan.cluster, n_usable);
  const float M = as_float(problem.M), blocks = as_float(block_count);
  const float warps = blocks * as_float(plan.warps);  // of a multiprocessor
  const float columns = as_float(plan.round_strips) * M;
  // A unit in each of them: what they get through together, or one thing behind the other.
  const float unit = problem.M > 8
                         ? std::max(1.42f, 0.188f * warps)
                         : std::max(0.746f + 0.0149f * M, (0.0486f + 0.0008f * M) * warps);
  const float x = 0.035f * blocks * M * as_float(units);
  const float sums =
      as_float(rounds) * (1.05f + columns * (0.0032f / as_float(plan.warps) + 0.0312f * blocks));
  const float cluster = plan.cluster == 1 ? 0.f
                                          : 1.17f + 0.0346f * M * as_float(strips) * blocks +
                                                1.18f * as_float(rounds - 1);
  // Half a multiprocessor at most: the kernel behind comes to sit beside this one, and loads.
  const int64_t shared_bytes = 2 * block_count * (marlin24_shared(problem, plan).total + 1024);
  const bool leaves_room = 2 * block_count * plan.warps <= marlin24_max_warps(problem.M) &&
                           shared_bytes <= device.shared_bytes + 1024;
  return as_float(warp_units) * unit + x + sums + cluster - (leaves_room ? 0.72f : 0.f);
}

}  // namespace

Marlin24Shared marlin24_shared(const Marlin24Problem& problem, const Marlin24Plan& plan) {
  Marlin24Shared shared = {};
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = ceil_of(at + bytes, 128) * 128;
    return static_cast<uint32_t>(begin);
  };
  const int64_t units = ceil_of(ceil_of(problem.K, kMarlin24UnitK), plan.cluster);
  const int64_t x_stride = units * kMarlin24UnitK * 2 + 16;  // rows in other banks
  take(plan.cluster == 1 ? 0 : 8);                           // the barrier
  shared.x_stride = static_cast<uint32_t>(x_stride);
  shared.x = take(problem.M * x_stride);
  shared.factors = take(problem.is_int8 ? units * 4 * (problem.M > 8 ? 64 : 32) : 0);
  shared.ring = take(plan.warps * kMarlin24Ring * problem.unit_bytes);
  shared.slots = take((plan.warps + plan.round_strips - 1) * problem.M * kMarlin24ColumnFloats * 4);
  shared.partial =
      take(plan.cluster == 1 ? 0 : plan.round_strips * kMarlin24StripRows * problem.M * 4);
  shared.total = static_cast<uint32_t>(std::min<int64_t>(at, UINT32_MAX));
  return shared;
}

bool marlin24_plan(const Marlin24Problem& problem, const Marlin24Device& device,
                   Marlin24Plan* plan) {
  const int64_t strips = problem.padded_N / kMarlin24StripRows;
  const int64_t units = ceil_of(problem.K, kMarlin24UnitK);
  const int most_warps = marlin24_max_warps(problem.M);
  float best = 0.f;
  bool found = false;
  for (int cluster = 1; cluster <= (device.has_clusters ? kMarlin24MaxCluster : 1); cluster *= 2) {
    // Clusters of 4 and 8 leave 12 of an H200's 132 multiprocessors without a
    // block.
    const int n_usable =
        cluster <= 2 ? device.n_multiprocessors : device.n_multiprocessors * 10 / 11;
    if (n_usable < cluster || units < cluster) break;
    for (int blocks = 1; blocks <= 4; ++blocks) {
      const int64_t most_bytes = (device.shared_bytes + 1024) / blocks - 1024;
      const int64_t clusters = std::min<int64_t>(strips, n_usable * blocks / cluster);
      const int64_t block_strips = ceil_of(strips, clusters);
      for (int warps = 4; warps <= 16 && warps * blocks <= most_warps; warps += 2) {
        for (int64_t rounds = 1; rounds <= block_strips; rounds *= 2) {
          const Marlin24Plan tried = {warps, cluster, static_cast<int>(clusters),
                                      static_cast<int>(ceil_of(block_strips, rounds))};
          if (marlin24_shared(problem, tried).total > most_bytes) continue;
          const float time = estimate(problem, tried, n_usable, device);
          if (found && time >= best) continue;
          found = true;
          best = time;
          *plan = tried;
        }
      }
    }
  }
  return found;
}

}  // namespace cuda_int4
