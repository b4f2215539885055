// cuda_int4::linear on marlin.v1 and marlin24.v1 on the CPU.
//
// Tiles of 64 rows of w go from the packed bytes to the order of coalesced.v1, in scratch, and on
// to its kernels: the same operations in the same order, so y has the bits that the weight packed
// as coalesced.v1 gives. Of scratch there is one slot per tile that may be in work at a time.
#include <atomic>

#include "../checks.h"
#include "../layouts.h"
#include "../marlin.h"
#include "../parallel_ranges.h"
#include "isa.h"
#include "linear.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

namespace {

constexpr int64_t kMaxSlots = 32;  // bounds scratch: 22 MB at K=14336, group_size 32

int64_t round_up(int64_t nbytes) { return ceil_div(nbytes, 64) * 64; }

// Where the parts of a slot and the slots begin, in bytes from the start of scratch.
struct Scratch {
  // 64 bytes behind each part: a kernel may read a vector that its last elements begin.
  explicit Scratch(const LinearJob& job, uint64_t staged_bytes) {
    const int64_t n_scales = kMarlinTileN * (job.K / job.group_size);
    slots = round_up(static_cast<int64_t>(staged_bytes));
    scale = round_up(kMarlinTileN * job.K / 2) + 64;
    zero_point = scale + round_up(n_scales * dtype_bytes(job.scale_dtype)) + 64;
    slot_bytes = zero_point + 64;
    if (job.zero_point != nullptr)
      slot_bytes += round_up(n_scales * dtype_bytes(job.zero_point_dtype));
    n_tiles = ceil_div(job.N, kMarlinTileN);
    n_slots = smaller(n_tiles, kMaxSlots);
  }
  MarlinTile tile(const LinearJob& job, int64_t slot) const {
    uint8_t* begin = static_cast<uint8_t*>(job.scratch) + slots + slot * slot_bytes;
    return {begin, begin + scale, begin + zero_point};
  }
  int64_t slots, scale, zero_point, slot_bytes, n_tiles, n_slots;
};

MarlinJob make_marlin_job(const LinearArgs& args) {
  MarlinJob job = {};
  job.qdata = static_cast<const uint8_t*>(args.qdata.data);
  job.meta = args.meta.present() ? static_cast<const uint16_t*>(args.meta.data) : nullptr;
  job.scale = args.scale.data;
  job.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  job.scale_dtype = args.scale.dtype;
  job.zero_point_dtype = args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  job.Np = marlin_padded_N(args);
  job.K = linear_K(args);
  job.group_size = args.group_size;
  return job;
}

// Rows 64 * tile .. of the job, whose weight `unpacked` has.
LinearJob tile_of_job(const LinearJob& job, int64_t tile, const MarlinTile& unpacked) {
  const int64_t n0 = kMarlinTileN * tile, elem_bytes = dtype_bytes(job.dtype);
  LinearJob columns = job;
  columns.qdata = unpacked.codes;
  columns.scale = unpacked.scale;
  if (job.zero_point != nullptr) columns.zero_point = unpacked.zero_point;
  if (job.bias != nullptr) columns.bias = static_cast<const char*>(job.bias) + n0 * elem_bytes;
  columns.y = static_cast<char*>(job.y) + n0 * elem_bytes;
  columns.N = smaller(kMarlinTileN, job.N - n0);
  return columns;
}

}  // namespace

uint64_t linear_marlin_scratch_bytes_on(const CpuKernels& kernels, const LinearArgs& args) {
  LinearJob job = make_linear_job(args);
  const LinearKernel* kernel = kernels.choose_linear(job);
  job.M = smaller(job.M, kernel->max_rows);
  const Scratch scratch(job, kernel->scratch_bytes(job));
  return static_cast<uint64_t>(scratch.slots + scratch.n_slots * scratch.slot_bytes);
}

Status linear_marlin_on(const CpuKernels& kernels, const LinearArgs& args,
                        const ExecutionContext& context) {
  LinearJob job = make_linear_job(args);
  job.scratch = context.scratch;
  const MarlinJob packed = make_marlin_job(args);
  const LinearKernel* kernel = kernels.choose_linear(job);
  const Scratch scratch(job, kernel->scratch_bytes(rows_of_job(job, 0, kernel->max_rows)));
  const int64_t tiles_per_slot = ceil_div(scratch.n_tiles, scratch.n_slots);
  for (int64_t m0 = 0; m0 < job.M; m0 += kernel->max_rows) {
    const LinearJob rows = rows_of_job(job, m0, kernel->max_rows);
    stage_rows(*kernel, rows, context);
    parallel_ranges(context, scratch.n_slots,
                    ceil_div(kGrainWeights, rows.M * job.K * kMarlinTileN * tiles_per_slot),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t slot = begin; slot < end; ++slot) {
                        const MarlinTile unpacked = scratch.tile(rows, slot);
                        for (int64_t tile = slot; tile < scratch.n_tiles; tile += scratch.n_slots) {
                          kernels.unpack_marlin(packed, tile, unpacked);
                          const LinearJob columns = tile_of_job(rows, tile, unpacked);
                          kernel->run(columns, 0, ceil_div(columns.N, kernel->n_unit));
                        }
                      }
                    });
  }
  return {};
}

}  // namespace cpu

uint64_t cpu_linear_marlin_scratch_bytes(const LinearArgs& args) {
  return cpu::linear_marlin_scratch_bytes_on(cpu::best_kernels(), args);
}

Status cpu_linear_marlin(const LinearArgs& args, const ExecutionContext& context) {
  return cpu::linear_marlin_on(cpu::best_kernels(), args, context);
}

uint64_t cpu_linear_marlin24_scratch_bytes(const LinearArgs& args) {
  return cpu::linear_marlin_scratch_bytes_on(cpu::best_kernels(), args);
}

Status cpu_linear_marlin24(const LinearArgs& args, const ExecutionContext& context) {
  return cpu::linear_marlin_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
