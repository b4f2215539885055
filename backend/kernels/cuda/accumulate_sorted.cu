// accumulate_sorted -- indexed[i, index_0[p], index_1[p], ...] += plain[i, p] for all p, in time that
//                      grows with the positions and not with positions times destinations
//
//   operand  dtype          shape                  order in memory               align
//   plain    any            positions, <= 8 dims   any strides, 0 too            dtype
//   indexed  that of plain  positions              any strides; 0 where indexed  dtype
//   index_d  i32 | i64      positions              any strides, 0 too            dtype
//   scratch  u32, sums      make_plan says how much                              16 B
//
// Requires  index_d in -size_d .. size_d - 1; any other is skipped and noted
// Grid      a key for each tuple of indices, the destination; the keys are sorted with their positions,
//           8 bits a pass (count and move: blocks of 256 threads and 2048 keys; scan: a block to a
//           digit); then a thread to each column of a chunk of sorted positions, and to each column
//           of a run that reaches further
// Bytes     keys and positions, 16 bytes, once a pass; values once; destinations twice
// Numerics  sums in float32, float64 or int64 in the order of the positions, a chunk at a time, added
//           to the destination and rounded once: the same bits in every run
// Source    least significant digit radix sort (Merrill and Grimshaw, 2011, in its plain form); own
#include "elements.cuh"
#include "indexing.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"

namespace cuda_int4 {

namespace {

constexpr int kDigits = 256;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kKeysPerThread = 8, kTileKeys = kThreads * kKeysPerThread;
// Positions of a chunk: fewer where few columns leave few threads.
constexpr uint32_t kChunk = 128, kChunkOfFewColumns = 32;
constexpr int64_t kFewColumns = 32;
constexpr int kAhead = 4;  // values of a thread in flight
constexpr int64_t kMaxGridY = 65535;

struct SortBuffers {
  const uint32_t* keys_in;
  const uint32_t* positions_in;  // nullptr: position i is i
  uint32_t* keys_out;
  uint32_t* positions_out;
  uint32_t* counts;  // [digit][tile]; after the scan, how many in the tiles before
  uint32_t* totals;  // [digit]
  uint32_t n, n_tiles;
  int shift;
};

template <int kIndices>
struct KeyParams {
  DeviceLoop<kIndices> positions;
  const char* indices[kIndices];
  int64_t sizes[kIndices];
  bool is_int64[kIndices];
  int n_indices;
  FastDivisor n_searched;
  uint32_t n_keys;
  bool wraps;
  uint32_t* keys;
  FaultNote note;
};

// keys[position] = number of its destination; n_keys where an index is out of range.
template <int kIndices>
__global__ void __launch_bounds__(kThreads)
    find_keys_kernel(const __grid_constant__ KeyParams<kIndices> p) {
  const uint32_t position = blockIdx.x * kThreads + threadIdx.x;
  if (position >= p.positions.n_steps) return;
  int64_t offsets[kIndices];
  p.positions.offsets(position, offsets);
  int64_t key = p.n_searched.divide(position);
  bool in_range = true;
#pragma unroll
  for (int k = 0; k < kIndices; ++k) {
    if (k >= p.n_indices) break;
    const char* from = p.indices[k] + offsets[k];
    const int64_t given = p.is_int64[k] ? *reinterpret_cast<const int64_t*>(from)
                                        : *reinterpret_cast<const int32_t*>(from);
    const int64_t index = given < 0 && p.wraps ? given + p.sizes[k] : given;
    if (index < 0 || index >= p.sizes[k]) {
      note_fault(p.note, kIndexOutOfRange, given, p.sizes[k]);
      in_range = false;
    }
    key = key * p.sizes[k] + (in_range ? index : 0);
  }
  p.keys[position] = in_range ? static_cast<uint32_t>(key) : p.n_keys;
}

// counts[digit][tile] = how many keys of the tile have the digit.
__global__ void __launch_bounds__(kThreads) count_kernel(SortBuffers p) {
  __shared__ uint32_t counts[kDigits];
  counts[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const uint32_t at = blockIdx.x * kTileKeys + i * kThreads + threadIdx.x;
    if (at < p.n) atomicAdd(&counts[p.keys_in[at] >> p.shift & (kDigits - 1)], 1u);
  }
  __syncthreads();
  p.counts[threadIdx.x * p.n_tiles + blockIdx.x] = counts[threadIdx.x];
}

// The sum of the values of the threads before, and of all; warp_sums is free again after the next
// barrier.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t (&warp_sums)[kWarps],
                                               uint32_t* total) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t up_to = value;
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t lower = __shfl_up_sync(0xffffffffu, up_to, offset);
    if (lane >= offset) up_to += lower;
  }
  if (lane == 31) warp_sums[warp] = up_to;
  __syncthreads();
  uint32_t before = up_to - value;
  *total = 0;
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    *total += warp_sums[w];
  }
  return before;
}

// Block `digit`: counts[digit][tile] = sum of counts[digit][0 .. tile - 1], totals[digit] = of all.
__global__ void __launch_bounds__(kThreads) scan_kernel(SortBuffers p) {
  __shared__ uint32_t warp_sums[kWarps];
  uint32_t* counts = p.counts + blockIdx.x * p.n_tiles;
  uint32_t before = 0;  // in the rounds so far
  for (uint32_t begin = 0; begin < p.n_tiles; begin += kThreads) {
    const uint32_t tile = begin + threadIdx.x;
    const uint32_t count = tile < p.n_tiles ? counts[tile] : 0;
    uint32_t total;
    const uint32_t at = before + sum_before(count, warp_sums, &total);
    if (tile < p.n_tiles) counts[tile] = at;
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) p.totals[blockIdx.x] = before;
}

// Keys and positions to where their digit puts them; equal digits keep their order.
__global__ void __launch_bounds__(kThreads) move_kernel(SortBuffers p) {
  __shared__ uint32_t places[kWarps][kDigits];
  __shared__ uint32_t warp_sums[kWarps];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kWarps * kDigits; i += kThreads)
    places[i / kDigits][i % kDigits] = 0;
  __syncthreads();
  const uint32_t first = blockIdx.x * kTileKeys + warp * 32 * kKeysPerThread + lane;
  uint32_t keys[kKeysPerThread], ranks[kKeysPerThread];  // among those of the warp and digit
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const uint32_t at = first + 32 * i;
    keys[i] = at < p.n ? p.keys_in[at] : 0;
    const uint32_t digit = at < p.n ? keys[i] >> p.shift & (kDigits - 1) : kDigits;
    const uint32_t same = __match_any_sync(0xffffffffu, digit);
    const uint32_t n_before = __popc(same & ((1u << lane) - 1));
    const uint32_t counted = digit < kDigits ? places[warp][digit] : 0;
    __syncwarp();
    if (n_before == 0 && digit < kDigits) places[warp][digit] = counted + __popc(same);
    __syncwarp();
    ranks[i] = counted + n_before;
  }
  uint32_t all;  // thread = digit from here on; the barrier in sum_before ends the counting
  uint32_t place = sum_before(p.totals[threadIdx.x], warp_sums, &all) +
                   p.counts[threadIdx.x * p.n_tiles + blockIdx.x];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t count = places[w][threadIdx.x];
    places[w][threadIdx.x] = place;
    place += count;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const uint32_t at = first + 32 * i;
    if (at >= p.n) break;
    const uint32_t to = places[warp][keys[i] >> p.shift & (kDigits - 1)] + ranks[i];
    p.keys_out[to] = keys[i];
    p.positions_out[to] = p.positions_in == nullptr ? at : p.positions_in[at];
  }
}

struct SumParams {
  DeviceLoop<1> positions;     // the values
  DeviceLoop<1> destinations;  // by key
  DeviceLoop<2> columns;       // the destination, the values
  char* to;
  const char* values;
  const uint32_t* keys;   // sorted
  const uint32_t* order;  // their positions
  void* before;           // [chunk][column]: sum of the run that began before the chunk,
  void* after;            // and of the one that goes on after it
  uint32_t n, n_keys, chunk, n_chunks, n_columns;
  DType dtype;
  int32_t n_bytes;
};

template <typename C>
__device__ __forceinline__ void add_to(const SumParams& p, uint32_t key, int64_t column, C sum) {
  int64_t offset[1];
  p.destinations.offsets(key, offset);
  char* to = p.to + offset[0] + column;
  store_element<C>(to, p.dtype, p.n_bytes, load_element<C>(to, p.dtype, p.n_bytes) + sum);
}

// Runs of equal keys: those inside a chunk to their destinations, the others to scratch.
template <typename C>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const __grid_constant__ SumParams p) {
  const uint32_t chunk = blockIdx.x * blockDim.y + threadIdx.y;
  if (chunk >= p.n_chunks) return;
  const uint32_t begin = chunk * p.chunk, end = min(begin + p.chunk, p.n);
  const uint32_t key_before = begin > 0 ? p.keys[begin - 1] : p.n_keys;
  const uint32_t key_after = end < p.n ? p.keys[end] : p.n_keys;
  const uint32_t step = gridDim.y * blockDim.x;
  for (uint32_t column = blockIdx.y * blockDim.x + threadIdx.x; column < p.n_columns;
       column += step) {
    int64_t columns[2];
    p.columns.offsets(column, columns);
    const int64_t partial = int64_t{chunk} * p.n_columns + column;
    uint32_t run_key = p.n_keys;
    bool began_before = false;
    C sum = 0;
    const auto finish_run = [&](bool goes_on) {
      if (run_key == p.n_keys) return;
      if (began_before)
        static_cast<C*>(p.before)[partial] = sum;
      else if (goes_on)
        static_cast<C*>(p.after)[partial] = sum;
      else
        add_to<C>(p, run_key, columns[0], sum);
    };
    for (uint32_t at = begin; at < end; at += kAhead) {
      uint32_t keys[kAhead];
      C values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        keys[i] = at + i < end ? p.keys[at + i] : p.n_keys;
        values[i] = 0;
        if (keys[i] == p.n_keys) continue;
        int64_t offset[1];
        p.positions.offsets(p.order[at + i], offset);
        values[i] = load_element<C>(p.values + offset[0] + columns[1], p.dtype, p.n_bytes);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at + i >= end) break;
        if (keys[i] != run_key) {
          finish_run(false);
          run_key = keys[i];
          began_before = at + i == begin && run_key == key_before;
          sum = 0;
        }
        sum += values[i];
      }
    }
    finish_run(run_key == key_after);
  }
}

// The runs that begin in a chunk and go on after it.
template <typename C>
__global__ void __launch_bounds__(kThreads) add_runs_kernel(const __grid_constant__ SumParams p) {
  const uint32_t chunk = blockIdx.x * blockDim.y + threadIdx.y;
  if (chunk + 1 >= p.n_chunks) return;
  const uint32_t begin = chunk * p.chunk, end = begin + p.chunk;
  const uint32_t key = p.keys[end - 1];
  if (key == p.n_keys || p.keys[end] != key) return;
  if (begin > 0 && p.keys[begin] == key && p.keys[begin - 1] == key) return;
  uint32_t low = end, high = p.n;  // the first place whose key is another lies in low + 1 .. high
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    (p.keys[middle] == key ? low : high) = middle;
  }
  const uint32_t last_chunk = low / p.chunk;
  const uint32_t step = gridDim.y * blockDim.x;
  for (uint32_t column = blockIdx.y * blockDim.x + threadIdx.x; column < p.n_columns;
       column += step) {
    int64_t columns[2];
    p.columns.offsets(column, columns);
    C sum = static_cast<const C*>(p.after)[int64_t{chunk} * p.n_columns + column];
#pragma unroll 8
    for (uint32_t other = chunk + 1; other <= last_chunk; ++other)
      sum += static_cast<const C*>(p.before)[int64_t{other} * p.n_columns + column];
    add_to<C>(p, key, columns[0], sum);
  }
}

// ---- host ----

struct SortPlan {
  LoopNest positions;     // values, indices; the dimensions that the destinations have too, then
                          // those that are searched
  LoopNest destinations;  // the destination; the former, then the indexed ones
  LoopNest columns;       // the destination, the values: what all indices leave alone
  int64_t n, n_searched, n_keys, n_columns, n_tiles, chunk, n_chunks;
  uint64_t bytes_of_list, bytes_of_counts, bytes_of_partials;
};

void add_dim(LoopNest* nest, int64_t size) { nest->sizes[nest->n_dims++] = size; }

uint64_t padded(uint64_t n_bytes) { return (n_bytes + 15) / 16 * 16; }

SortPlan make_plan(const IndexArgs& args) {
  SortPlan plan = {};
  const int64_t bytes = dtype_bytes(args.indexed.dtype);
  plan.positions.n_operands = 1 + args.n_dims;
  plan.destinations.n_operands = 1;
  plan.columns.n_operands = 2;
  const auto varies = [&](int d) {
    for (int k = 0; k < args.n_dims; ++k)
      if (args.dims[k].index.strides[d] != 0) return true;
    return false;
  };
  const auto add_position_dim = [&](int d) {
    const int at = plan.positions.n_dims;
    add_dim(&plan.positions, args.indexed.sizes[d]);
    plan.positions.strides[0][at] = args.plain.strides[d] * bytes;
    for (int k = 0; k < args.n_dims; ++k)
      plan.positions.strides[1 + k][at] =
          args.dims[k].index.strides[d] * dtype_bytes(args.dims[k].index.dtype);
  };
  for (int d = 0; d < args.indexed.ndim; ++d) {
    if (args.indexed.strides[d] == 0) continue;
    LoopNest& nest = varies(d) ? plan.destinations : plan.columns;
    nest.strides[0][nest.n_dims] = args.indexed.strides[d] * bytes;
    if (&nest == &plan.columns) nest.strides[1][nest.n_dims] = args.plain.strides[d] * bytes;
    add_dim(&nest, args.indexed.sizes[d]);
    if (varies(d)) add_position_dim(d);
  }
  plan.n_searched = 1;
  for (int d = 0; d < args.indexed.ndim; ++d) {
    if (args.indexed.strides[d] != 0) continue;
    plan.n_searched *= args.indexed.sizes[d];
    add_position_dim(d);
  }
  for (int k = 0; k < args.n_dims; ++k) {
    plan.destinations.strides[0][plan.destinations.n_dims] = args.dims[k].stride * bytes;
    add_dim(&plan.destinations, args.dims[k].size);
  }
  plan.n = plan.positions.n_steps();
  plan.n_keys = plan.destinations.n_steps();
  plan.n_columns = plan.columns.n_steps();
  plan.columns.collapse();
  plan.n_tiles = (plan.n + kTileKeys - 1) / kTileKeys;
  plan.chunk = plan.n_columns < kFewColumns ? kChunkOfFewColumns : kChunk;
  plan.n_chunks = (plan.n + plan.chunk - 1) / plan.chunk;
  plan.bytes_of_list = padded(static_cast<uint64_t>(plan.n) * 4);
  plan.bytes_of_counts = padded(static_cast<uint64_t>(plan.n_tiles + 1) * kDigits * 4);
  const uint64_t sum_bytes = is_float_kind(args.indexed.dtype) ? 4 : 8;
  plan.bytes_of_partials = padded(static_cast<uint64_t>(plan.n_chunks) *
                                  static_cast<uint64_t>(plan.n_columns) * sum_bytes);
  return plan;
}

template <int kIndices>
void launch_keys(const IndexArgs& args, const SortPlan& plan, uint32_t* keys, const FaultNote& note,
                 cudaStream_t stream) {
  KeyParams<kIndices> p = {};
  LoopNest indices = plan.positions;
  indices.n_operands = args.n_dims;
  for (int k = 0; k < args.n_dims; ++k) {
    for (int d = 0; d < indices.n_dims; ++d) indices.strides[k][d] = indices.strides[1 + k][d];
    p.indices[k] = static_cast<const char*>(args.dims[k].index.data);
    p.sizes[k] = args.dims[k].size;
    p.is_int64[k] = args.dims[k].index.dtype == DType::kInt64;
  }
  p.positions = indices.device_loop<kIndices>();
  p.n_indices = args.n_dims;
  p.n_searched = FastDivisor::of(static_cast<uint32_t>(plan.n_searched));
  p.n_keys = static_cast<uint32_t>(plan.n_keys);
  p.wraps = args.wraps;
  p.keys = keys;
  p.note = note;
  find_keys_kernel<kIndices>
      <<<static_cast<unsigned>((plan.n + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
}

template <typename C>
void launch_sums(const SumParams& p, cudaStream_t stream) {
  dim3 block(1, kThreads);
  while (block.x < p.n_columns && block.x < kThreads) block.x *= 2, block.y /= 2;
  const int64_t n_wide = (int64_t{p.n_columns} + block.x - 1) / block.x;
  const dim3 grid((p.n_chunks + block.y - 1) / block.y,
                  static_cast<unsigned>(n_wide < kMaxGridY ? n_wide : kMaxGridY));
  add_chunks_kernel<C><<<grid, block, 0, stream>>>(p);
  if (p.n_chunks > 1) add_runs_kernel<C><<<grid, block, 0, stream>>>(p);
}

}  // namespace

uint64_t accumulate_sorted_scratch_bytes(const IndexArgs& args) {
  const SortPlan plan = make_plan(args);
  return 4 * plan.bytes_of_list + plan.bytes_of_counts + 2 * plan.bytes_of_partials;
}

Status launch_accumulate_sorted(const IndexArgs& args, const FaultNote& note, void* scratch,
                                cudaStream_t stream) {
  const SortPlan plan = make_plan(args);
  if (plan.n == 0 || plan.n_keys == 0 || plan.n_columns == 0) return {};
  if (plan.n > kMaxSteps || plan.n_keys >= kMaxSteps || plan.n_columns > kMaxSteps)
    return error(StatusCode::kUnsupported,
                 "%.200s: expected at most %lld positions, destinations and columns to add up, got "
                 "%lld, %lld and %lld; use device cpu",
                 args.who, static_cast<long long>(kMaxSteps), static_cast<long long>(plan.n),
                 static_cast<long long>(plan.n_keys), static_cast<long long>(plan.n_columns));
  char* at = static_cast<char*>(scratch);
  const auto take = [&at](uint64_t n_bytes) {
    char* taken = at;
    at += n_bytes;
    return taken;
  };
  uint32_t *keys[2], *positions[2];
  for (int i = 0; i < 2; ++i) {
    keys[i] = reinterpret_cast<uint32_t*>(take(plan.bytes_of_list));
    positions[i] = reinterpret_cast<uint32_t*>(take(plan.bytes_of_list));
  }
  if (args.n_dims == 1)
    launch_keys<1>(args, plan, keys[0], note, stream);
  else
    launch_keys<kMaxDims>(args, plan, keys[0], note, stream);

  SortBuffers sort = {};
  sort.counts = reinterpret_cast<uint32_t*>(take(plan.bytes_of_counts));
  sort.n = static_cast<uint32_t>(plan.n);
  sort.n_tiles = static_cast<uint32_t>(plan.n_tiles);
  sort.totals = sort.counts + plan.n_tiles * kDigits;
  int from = 0;
  for (int shift = 0; shift < 32 && plan.n_keys >> shift != 0; shift += 8, from ^= 1) {
    sort.keys_in = keys[from];
    sort.positions_in = shift == 0 ? nullptr : positions[from];
    sort.keys_out = keys[from ^ 1];
    sort.positions_out = positions[from ^ 1];
    sort.shift = shift;
    count_kernel<<<sort.n_tiles, kThreads, 0, stream>>>(sort);
    scan_kernel<<<kDigits, kThreads, 0, stream>>>(sort);
    move_kernel<<<sort.n_tiles, kThreads, 0, stream>>>(sort);
  }

  SumParams p = {};
  LoopNest values = plan.positions;
  values.n_operands = 1;
  p.positions = values.device_loop<1>();
  p.destinations = plan.destinations.device_loop<1>();
  p.columns = plan.columns.device_loop<2>();
  p.to = static_cast<char*>(args.indexed.data);
  p.values = static_cast<const char*>(args.plain.data);
  p.keys = keys[from];
  p.order = positions[from];
  p.before = take(plan.bytes_of_partials);
  p.after = take(plan.bytes_of_partials);
  p.n = sort.n;
  p.n_keys = static_cast<uint32_t>(plan.n_keys);
  p.chunk = static_cast<uint32_t>(plan.chunk);
  p.n_chunks = static_cast<uint32_t>(plan.n_chunks);
  p.n_columns = static_cast<uint32_t>(plan.n_columns);
  p.dtype = args.indexed.dtype;
  p.n_bytes = static_cast<int32_t>(dtype_bytes(args.indexed.dtype));
  if (is_float_kind(p.dtype))
    launch_sums<float>(p, stream);
  else if (p.dtype == DType::kFloat64)
    launch_sums<double>(p, stream);
  else
    launch_sums<int64_t>(p, stream);
  return launch_status(args.who, cudaGetLastError());
}

}  // namespace cuda_int4
