// copy -- to[i] = from[i] for up to 8 pairs of views: permute, slice, expand, cat, split, flip, ...
//
//   operand  dtype                 shape           order in memory               align
//   from     any                   that of its to  any strides, 0 and negative   dtype
//   to       as wide as from's     up to 8 dims    any strides                   dtype
//
// Requires  each to of the sizes of its from; no to overlaps another view of the launch
// Grid      (ceil(units / 256), pairs) blocks of 256; a thread moves one unit: 16, 8, 4, 2 or 1 bytes,
//           the most that the rows, strides and addresses of all pairs allow
//           The transpose kernel: blocks of (32, 8), a tile of 32 x 32 elements each
// Bytes     reads from, writes to. Where the innermost dimensions of the two differ, tiles turn in
//           shared memory, so that both sides see rows
// Numerics  bytes are moved as they are
// Source    own
//
// fill -- out[i] = start + i * step, i the row-major index, computed in float64 or int64 and rounded
//         once; where step is 0 by units of up to 16 bytes
//
// tril -- out[..., i, j] = j - i <= diagonal ? x[..., i, j] : 0; a thread per element, both contiguous
#include "copy.cuh"
#include "elements.cuh"
#include "launch_dependent.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxParts = 8;

struct DevicePart {
  DeviceLoop<2> loop;  // to, from
  char* to;
  const char* from;
};

template <int kParts>
struct CopyParams {
  DevicePart parts[kParts];
};

template <typename Unit, int kParts>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ CopyParams<kParts> p) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const DevicePart& part = p.parts[kParts == 1 ? 0 : blockIdx.y];
  const uint32_t step = blockIdx.x * kThreads + threadIdx.x;
  if (step >= part.loop.n_steps) return;
  int64_t offsets[2];
  part.loop.offsets(step, offsets);
  *reinterpret_cast<Unit*>(part.to + offsets[0]) =
      *reinterpret_cast<const Unit*>(part.from + offsets[1]);
}

// ---- one pair of views whose innermost dimensions differ ----

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // of a block's threads; each takes kTile / kTileRows rows of a tile

struct TransposeParams {
  DeviceLoop<2> batch;  // to, from: all dimensions but the two that make tiles
  FastDivisor tiles, column_tiles;
  uint32_t rows, columns;       // the dimensions along which `from` and `to` are contiguous
  int64_t to_row, from_column;  // the other strides, in bytes
  char* to;
  const char* from;
};

template <typename Unit>
__global__ void __launch_bounds__(kTile* kTileRows)
    transpose_kernel(const __grid_constant__ TransposeParams p) {
  __shared__ Unit tile[kTile][kTile + 1];  // a column of it falls into 32 banks
  const uint32_t batch = p.tiles.divide(blockIdx.x);
  const uint32_t in_batch = blockIdx.x - batch * p.tiles.divisor;
  const uint32_t row_tile = p.column_tiles.divide(in_batch);
  const uint32_t row = row_tile * kTile;
  const uint32_t column = (in_batch - row_tile * p.column_tiles.divisor) * kTile;
  int64_t offsets[2];
  p.batch.offsets(batch, offsets);
#pragma unroll
  for (uint32_t i = threadIdx.y; i < kTile; i += kTileRows) {
    if (row + threadIdx.x < p.rows && column + i < p.columns)
      tile[i][threadIdx.x] = reinterpret_cast<const Unit*>(
          p.from + offsets[1] + (column + i) * p.from_column)[row + threadIdx.x];
  }
  __syncthreads();
#pragma unroll
  for (uint32_t i = threadIdx.y; i < kTile; i += kTileRows) {
    if (row + i < p.rows && column + threadIdx.x < p.columns)
      reinterpret_cast<Unit*>(p.to + offsets[0] + (row + i) * p.to_row)[column + threadIdx.x] =
          tile[threadIdx.x][i];
  }
}

/// The dimension along which `from` is contiguous, if it is another than that of `to` and both are
/// long enough to fill tiles; else -1.
int dim_of_rows(const LoopNest& nest, int64_t bytes) {
  const int last = nest.n_dims - 1;
  if (nest.n_dims < 2 || nest.strides[0][last] != bytes || nest.strides[1][last] == bytes ||
      nest.sizes[last] < kTileRows)
    return -1;
  for (int d = 0; d < last; ++d)
    if (nest.strides[1][d] == bytes && nest.sizes[d] >= kTileRows) return d;
  return -1;
}

/// Nothing is launched, and false, where there would be too many tiles.
template <typename Unit>
bool launch_transpose(const LoopNest& nest, int row_dim, cudaStream_t stream) {
  const int last = nest.n_dims - 1;
  TransposeParams p = {};
  p.rows = static_cast<uint32_t>(nest.sizes[row_dim]);
  p.columns = static_cast<uint32_t>(nest.sizes[last]);
  p.to_row = nest.strides[0][row_dim];
  p.from_column = nest.strides[1][last];
  p.to = nest.data[0];
  p.from = nest.data[1];
  LoopNest batch = nest;
  batch.sizes[row_dim] = batch.sizes[last] = 1;
  batch.collapse();
  p.batch = batch.device_loop<2>();
  const int64_t column_tiles = (int64_t{p.columns} + kTile - 1) / kTile;
  const int64_t tiles = (int64_t{p.rows} + kTile - 1) / kTile * column_tiles;
  if (tiles > kMaxSteps / p.batch.n_steps) return false;
  p.tiles = FastDivisor::of(static_cast<uint32_t>(tiles));
  p.column_tiles = FastDivisor::of(static_cast<uint32_t>(column_tiles));
  transpose_kernel<Unit>
      <<<static_cast<unsigned>(tiles) * p.batch.n_steps, dim3(kTile, kTileRows), 0, stream>>>(p);
  return true;
}

bool launch_transpose(const LoopNest& nest, int row_dim, int64_t bytes, cudaStream_t stream) {
  switch (bytes) {
    case 8:
      return launch_transpose<uint2>(nest, row_dim, stream);
    case 4:
      return launch_transpose<uint32_t>(nest, row_dim, stream);
    case 2:
      return launch_transpose<uint16_t>(nest, row_dim, stream);
    default:
      return launch_transpose<uint8_t>(nest, row_dim, stream);
  }
}

/// The widest unit for all rows of `nest`, whose elements have `bytes` each.
int64_t unit_bytes(const LoopNest& nest, int64_t bytes) {
  for (int64_t unit = 16; unit > bytes; unit /= 2)
    if (nest.has_vectors(0, unit / bytes, bytes, unit) &&
        nest.has_vectors(1, unit / bytes, bytes, unit))
      return unit;
  return bytes;
}

template <typename Unit, int kParts>
cudaError_t launch_units(const LoopNest* nests, int n, cudaStream_t stream) {
  CopyParams<kParts> p = {};
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) {
    p.parts[i] = {nests[i].device_loop<2>(), nests[i].data[0], nests[i].data[1]};
    if (p.parts[i].loop.n_steps > most) most = p.parts[i].loop.n_steps;
  }
  const dim3 grid((most + kThreads - 1) / kThreads, static_cast<unsigned>(n));
  return launch_dependent(copy_kernel<Unit, kParts>, grid, kThreads, 0, stream, p);
}

template <typename Unit>
cudaError_t launch_parts(const LoopNest* nests, int n, cudaStream_t stream) {
  return n == 1 ? launch_units<Unit, 1>(nests, n, stream)
                : launch_units<Unit, kMaxParts>(nests, n, stream);
}

/// Up to kMaxParts nests of elements of `bytes`, in one launch.
cudaError_t launch_nests(LoopNest* nests, int n, int64_t bytes, cudaStream_t stream) {
  const int row_dim = n == 1 ? dim_of_rows(nests[0], bytes) : -1;
  if (row_dim >= 0 && launch_transpose(nests[0], row_dim, bytes, stream)) return cudaGetLastError();
  int64_t unit = 16;
  for (int i = 0; i < n; ++i) {
    const int64_t allowed = unit_bytes(nests[i], bytes);
    if (allowed < unit) unit = allowed;
  }
  for (int i = 0; i < n; ++i) nests[i].widen(unit / bytes);
  switch (unit) {
    case 16:
      return launch_parts<uint4>(nests, n, stream);
    case 8:
      return launch_parts<uint2>(nests, n, stream);
    case 4:
      return launch_parts<uint32_t>(nests, n, stream);
    case 2:
      return launch_parts<uint16_t>(nests, n, stream);
    default:
      return launch_parts<uint8_t>(nests, n, stream);
  }
}

struct SetParams {
  DeviceLoop<1> loop;
  char* out;
  uint64_t bits[2];  // 16 bytes of the element again and again
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) set_kernel(const __grid_constant__ SetParams p) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const uint32_t step = blockIdx.x * kThreads + threadIdx.x;
  if (step >= p.loop.n_steps) return;
  int64_t offsets[1];
  p.loop.offsets(step, offsets);
  *reinterpret_cast<Unit*>(p.out + offsets[0]) = *reinterpret_cast<const Unit*>(p.bits);
}

struct FillParams {
  DeviceLoop<1> loop;
  char* out;
  Number start, step;
  DType dtype;
  int32_t n_bytes;
};

template <typename C>
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ FillParams p) {
  const uint32_t step = blockIdx.x * kThreads + threadIdx.x;
  if (step >= p.loop.n_steps) return;
  int64_t offsets[1];
  p.loop.offsets(step, offsets);
  C value;
  if constexpr (std::is_integral_v<C>)
    value = p.start.as_int + step * p.step.as_int;
  else
    value = p.start.as_double + step * p.step.as_double;
  store_element<C>(p.out + offsets[0], p.dtype, p.n_bytes, value);
}

struct TrilParams {
  int64_t n_elems;
  FastDivisor rows, columns;
  int64_t diagonal;
  const char* x;
  char* out;
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) tril_kernel(const __grid_constant__ TrilParams p) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.n_elems) return;
  const uint32_t rows = p.columns.divide(i), column = i - rows * p.columns.divisor;
  const uint32_t row = rows - p.rows.divide(rows) * p.rows.divisor;
  const bool stays = int64_t{column} - int64_t{row} <= p.diagonal;
  reinterpret_cast<Unit*>(p.out)[i] = stays ? reinterpret_cast<const Unit*>(p.x)[i] : Unit{};
}

bool is_float(DType dtype) { return is_float_kind(dtype) || dtype == DType::kFloat64; }

Status launch_constant(const FillArgs& args, LoopNest nest, cudaStream_t stream) {
  SetParams p = {};
  const int64_t bytes = dtype_bytes(args.out.dtype);
  const uint64_t bits = bits_of(args.start, args.out.dtype);
  for (int64_t i = 0; i < 16; i += bytes)
    memcpy(reinterpret_cast<char*>(p.bits) + i, &bits, static_cast<size_t>(bytes));
  int64_t unit = 16;
  while (unit > bytes && !nest.has_vectors(0, unit / bytes, bytes, unit)) unit /= 2;
  nest.widen(unit / bytes);
  p.loop = nest.device_loop<1>();
  p.out = nest.data[0];
  const unsigned blocks = (p.loop.n_steps + kThreads - 1) / kThreads;
  const auto launch = [&](auto kernel) {
    return launch_status(args.who, launch_dependent(kernel, blocks, kThreads, 0, stream, p));
  };
  switch (unit) {
    case 16:
      return launch(set_kernel<uint4>);
    case 8:
      return launch(set_kernel<uint2>);
    case 4:
      return launch(set_kernel<uint32_t>);
    case 2:
      return launch(set_kernel<uint16_t>);
    default:
      return launch(set_kernel<uint8_t>);
  }
}

}  // namespace

Status launch_copy(const char* who, const CopyPart* parts, int n_parts, cudaStream_t stream) {
  LoopNest waiting[kMaxParts];
  int n_waiting = 0;
  int64_t bytes = 1;
  const auto flush = [&]() -> Status {
    if (n_waiting == 0) return {};
    const Status status = launch_status(who, launch_nests(waiting, n_waiting, bytes, stream));
    n_waiting = 0;
    return status;
  };
  for (int i = 0; i < n_parts; ++i) {
    bytes = dtype_bytes(parts[i].to.dtype);
    LoopNest nest = loop_over(parts[i].to, 2);
    nest.set(0, parts[i].to);
    nest.set(1, parts[i].from);
    if (nest.n_steps() == 0) continue;
    nest.collapse();
    CUDA_INT4_RETURN_IF_ERROR(nest.in_pieces([&](const LoopNest& piece) -> Status {
      waiting[n_waiting++] = piece;
      return n_waiting == kMaxParts ? flush() : Status{};
    }));
  }
  return flush();
}

Status launch_fill(const FillArgs& args, cudaStream_t stream) {
  LoopNest nest = loop_over(args.out, 1);
  nest.set(0, args.out);
  if (nest.n_steps() == 0) return {};
  nest.collapse();
  if (args.step.as_double == 0 && args.step.as_int == 0)
    return nest.in_pieces(
        [&](const LoopNest& piece) { return launch_constant(args, piece, stream); });
  if (nest.n_steps() > kMaxSteps)
    return error(StatusCode::kUnsupported, "%.200s: expected at most %lld elements, got %lld",
                 args.who, static_cast<long long>(kMaxSteps),
                 static_cast<long long>(nest.n_steps()));
  const FillParams p = {nest.device_loop<1>(),
                        nest.data[0],
                        args.start,
                        args.step,
                        args.out.dtype,
                        static_cast<int32_t>(dtype_bytes(args.out.dtype))};
  const unsigned blocks = (p.loop.n_steps + kThreads - 1) / kThreads;
  if (is_float(args.out.dtype))
    fill_kernel<double><<<blocks, kThreads, 0, stream>>>(p);
  else
    fill_kernel<int64_t><<<blocks, kThreads, 0, stream>>>(p);
  return launch_status(args.who, cudaGetLastError());
}

Status launch_tril(const TrilArgs& args, cudaStream_t stream) {
  TrilParams p = {1,
                  {},
                  {},
                  args.diagonal,
                  static_cast<const char*>(args.x.data),
                  static_cast<char*>(args.out.data)};
  for (int d = 0; d < args.x.ndim; ++d) p.n_elems *= args.x.sizes[d];
  if (p.n_elems == 0) return {};
  if (p.n_elems > kMaxSteps)
    return error(StatusCode::kUnsupported, "%.200s: expected at most %lld elements, got %lld",
                 args.who, static_cast<long long>(kMaxSteps), static_cast<long long>(p.n_elems));
  p.rows = FastDivisor::of(static_cast<uint32_t>(args.x.sizes[args.x.ndim - 2]));
  p.columns = FastDivisor::of(static_cast<uint32_t>(args.x.sizes[args.x.ndim - 1]));
  const unsigned blocks = static_cast<unsigned>((p.n_elems + kThreads - 1) / kThreads);
  switch (dtype_bytes(args.x.dtype)) {
    case 8:
      tril_kernel<uint2><<<blocks, kThreads, 0, stream>>>(p);
      break;
    case 4:
      tril_kernel<uint32_t><<<blocks, kThreads, 0, stream>>>(p);
      break;
    case 2:
      tril_kernel<uint16_t><<<blocks, kThreads, 0, stream>>>(p);
      break;
    default:
      tril_kernel<uint8_t><<<blocks, kThreads, 0, stream>>>(p);
  }
  return launch_status(args.who, cudaGetLastError());
}

}  // namespace cuda_int4
