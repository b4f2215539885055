// gather   -- plain[i] = indexed[i, index_0[i], index_1[i], ...]: embedding, index, index_select, gather
// scatter  -- indexed[i, index_0[i], index_1[i], ...] = plain[i]: index_put, scatter
//
//   operand  dtype          shape                 order in memory               align
//   plain    any            positions, <= 8 dims  any strides                   dtype
//   indexed  that of plain  positions             any strides; 0 where indexed  dtype
//   index_d  i32 | i64      positions             any strides, 0 too            dtype
//
// Requires  index_d in -size_d .. size_d - 1; any other is skipped (gather: 0) and noted
// Grid      ceil(units / 256) blocks of 256; a thread moves one unit: 16, 8, 4, 2 or 1 bytes of a row
//           that lies in one piece on both sides, else one element
// Bytes     reads or writes plain, the rows of indexed that the indices name, and the indices
// Numerics  bytes are moved as they are; of values scattered to one place an arbitrary one stays
// Source    own
#include "elements.cuh"
#include "indexing.cuh"
#include "launch_dependent.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;

struct DeviceIndex {
  const char* data;
  int64_t size;
  int64_t stride;  // in bytes
  bool is_int64;
};

template <int kIndices>
struct IndexParams {
  DeviceLoop<2 + kIndices> loop;  // plain, indexed, indices
  char* plain;
  char* indexed;
  int n_indices;
  DeviceIndex indices[kIndices];
  FaultNote note;
  bool wraps;
  uint64_t value;  // bits that a scatter without values writes
};

/// Offset of what the indices of a step name in the indexed tensor; false: one is out of range.
template <int kIndices>
__device__ __forceinline__ bool follow_indices(const IndexParams<kIndices>& p,
                                               const int64_t (&offsets)[2 + kIndices],
                                               int64_t* offset) {
#pragma unroll
  for (int k = 0; k < kIndices; ++k) {
    if (k >= p.n_indices) break;
    const char* from = p.indices[k].data + offsets[2 + k];
    const int64_t given = p.indices[k].is_int64 ? *reinterpret_cast<const int64_t*>(from)
                                                : *reinterpret_cast<const int32_t*>(from);
    const int64_t index = given < 0 && p.wraps ? given + p.indices[k].size : given;
    if (index < 0 || index >= p.indices[k].size) {
      note_fault(p.note, kIndexOutOfRange, given, p.indices[k].size);
      return false;
    }
    *offset += index * p.indices[k].stride;
  }
  return true;
}

template <typename Unit, bool kScatters, int kIndices>
__global__ void __launch_bounds__(kThreads)
    index_kernel(const __grid_constant__ IndexParams<kIndices> p) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const uint32_t step = blockIdx.x * kThreads + threadIdx.x;
  if (step >= p.loop.n_steps) return;
  int64_t offsets[2 + kIndices];
  p.loop.offsets(step, offsets);
  int64_t offset = offsets[1];
  const bool in_range = follow_indices(p, offsets, &offset);
  const char* from = kScatters ? p.plain + offsets[0] : p.indexed + offset;
  char* to = kScatters ? p.indexed + offset : p.plain + offsets[0];
  if (!in_range && kScatters) return;
  Unit value = {};
  if (kScatters && p.plain == nullptr)
    value = *reinterpret_cast<const Unit*>(&p.value);
  else if (in_range)
    value = *reinterpret_cast<const Unit*>(from);
  *reinterpret_cast<Unit*>(to) = value;
}

template <typename Unit, bool kScatters, int kIndices>
cudaError_t launch_units(const IndexArgs& args, const LoopNest& nest, const FaultNote& note,
                         cudaStream_t stream) {
  IndexParams<kIndices> p = {};
  p.loop = nest.device_loop<2 + kIndices>();
  p.plain = nest.data[0];
  p.indexed = nest.data[1];
  p.n_indices = args.n_dims;
  p.note = note;
  p.wraps = args.wraps;
  p.value = bits_of(args.value, args.indexed.dtype);
  for (int k = 0; k < args.n_dims; ++k) {
    const IndexedDim& dim = args.dims[k];
    p.indices[k] = {nest.data[2 + k], dim.size, dim.stride * dtype_bytes(args.indexed.dtype),
                    dim.index.dtype == DType::kInt64};
  }
  const unsigned blocks = (p.loop.n_steps + kThreads - 1) / kThreads;
  return launch_dependent(index_kernel<Unit, kScatters, kIndices>, blocks, kThreads, 0, stream, p);
}

/// The widest unit of rows that are in one piece on both sides and that one index names.
int64_t unit_bytes(const IndexArgs& args, const LoopNest& nest, int64_t bytes) {
  if (!args.plain.present()) return bytes;
  for (int k = 0; k < args.n_dims; ++k)
    if (!nest.is_splat(2 + k)) return bytes;
  for (int64_t unit = 16; unit > bytes; unit /= 2) {
    bool fits = nest.has_vectors(0, unit / bytes, bytes, unit) &&
                nest.has_vectors(1, unit / bytes, bytes, unit);
    for (int k = 0; k < args.n_dims; ++k) fits = fits && args.dims[k].stride * bytes % unit == 0;
    if (fits) return unit;
  }
  return bytes;
}

template <typename Unit, bool kScatters>
cudaError_t launch_indices(const IndexArgs& args, const LoopNest& nest, const FaultNote& note,
                           cudaStream_t stream) {
  return args.n_dims == 1 ? launch_units<Unit, kScatters, 1>(args, nest, note, stream)
                          : launch_units<Unit, kScatters, kMaxDims>(args, nest, note, stream);
}

template <bool kScatters>
Status launch(const IndexArgs& args, const FaultNote& note, cudaStream_t stream) {
  LoopNest nest = loop_over(args.indexed, 2 + args.n_dims);
  if (args.plain.present()) nest.set(0, args.plain);
  nest.set(1, args.indexed);
  for (int k = 0; k < args.n_dims; ++k) nest.set(2 + k, args.dims[k].index);
  if (nest.n_steps() == 0) return {};
  nest.collapse();
  return nest.in_pieces([&](const LoopNest& piece) -> Status {
    const int64_t bytes = dtype_bytes(args.indexed.dtype), unit = unit_bytes(args, piece, bytes);
    LoopNest units = piece;
    units.widen(unit / bytes);
    const auto launch_by_unit = [&]() {
      switch (unit) {
        case 16:
          return launch_indices<uint4, kScatters>(args, units, note, stream);
        case 8:
          return launch_indices<uint2, kScatters>(args, units, note, stream);
        case 4:
          return launch_indices<uint32_t, kScatters>(args, units, note, stream);
        case 2:
          return launch_indices<uint16_t, kScatters>(args, units, note, stream);
        default:
          return launch_indices<uint8_t, kScatters>(args, units, note, stream);
      }
    };
    return launch_status(args.who, launch_by_unit());
  });
}

}  // namespace

Status launch_gather(const IndexArgs& args, const FaultNote& note, cudaStream_t stream) {
  return launch<false>(args, note, stream);
}

Status launch_scatter(const IndexArgs& args, const FaultNote& note, cudaStream_t stream) {
  return launch<true>(args, note, stream);
}

}  // namespace cuda_int4
