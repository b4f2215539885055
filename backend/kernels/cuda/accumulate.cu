// accumulate -- indexed[i, index_0[p], index_1[p], ...] += plain[i, p] for all p: scatter_add, index_put
//
//   operand  dtype          shape                  order in memory               align
//   plain    any            positions, <= 8 dims   any strides, 0 too            dtype
//   indexed  that of plain  positions              any strides; 0 where indexed  dtype
//   index_d  i32 | i64      positions              any strides, 0 too            dtype
//
// Requires  index_d in -size_d .. size_d - 1; any other is skipped and noted
// Grid      a thread per element of the destination, blocks of 256; it looks through all positions
// Bytes     reads the indices once per element of the destination, out of the caches: for short
//           indices or small destinations; accumulate_sorted takes the others
// Numerics  sums in float32, float64 or int64, in the order of the positions, rounded once: the same
//           bits in every run, which atomic additions would not give
// Source    own
#include "elements.cuh"
#include "indexing.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
// Looks at an index, and positions of one destination, which a thread goes through at 0.3 us each
// (H200): above, sorting is quicker.
constexpr int64_t kMostLooks = int64_t{1} << 24, kMostPositions = 256;

template <int kIndices>
struct AccumulateParams {
  // Over the destination: it, the values, each index, and the coordinate that each index must have.
  DeviceLoop<2 + 2 * kIndices> outer;
  // Over the positions that the indices differ in: the values, each index.
  DeviceLoop<1 + kIndices> inner;
  char* to;
  const char* values;
  const char* indices[kIndices];
  int64_t sizes[kIndices];
  bool is_int64[kIndices];
  int n_indices;
  DType dtype;
  int32_t n_bytes;
  bool wraps;
  FaultNote note;
};

template <typename C, int kIndices>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const __grid_constant__ AccumulateParams<kIndices> p) {
  const uint32_t step = blockIdx.x * kThreads + threadIdx.x;
  if (step >= p.outer.n_steps) return;
  int64_t outer[2 + 2 * kIndices];
  p.outer.offsets(step, outer);
  C sum = load_element<C>(p.to + outer[0], p.dtype, p.n_bytes);
  bool any = false;
  for (uint32_t position = 0; position < p.inner.n_steps; ++position) {
    int64_t inner[1 + kIndices];
    p.inner.offsets(position, inner);
    bool matches = true;
#pragma unroll
    for (int k = 0; k < kIndices; ++k) {
      if (k >= p.n_indices) break;
      const char* from = p.indices[k] + outer[2 + k] + inner[1 + k];
      const int64_t given = p.is_int64[k] ? *reinterpret_cast<const int64_t*>(from)
                                          : *reinterpret_cast<const int32_t*>(from);
      const int64_t index = given < 0 && p.wraps ? given + p.sizes[k] : given;
      if (index < 0 || index >= p.sizes[k]) note_fault(p.note, kIndexOutOfRange, given, p.sizes[k]);
      matches = matches && index == outer[2 + kIndices + k];
    }
    if (!matches) continue;
    any = true;
    sum += load_element<C>(p.values + outer[1] + inner[0], p.dtype, p.n_bytes);
  }
  if (any) store_element<C>(p.to + outer[0], p.dtype, p.n_bytes, sum);
}

/// The dimension of `nest` that has just been added.
int add_dim(LoopNest* nest, int64_t size) {
  nest->sizes[nest->n_dims] = size;
  return nest->n_dims++;
}

template <int kIndices>
Status launch(const IndexArgs& args, const FaultNote& note, cudaStream_t stream) {
  const int64_t bytes = dtype_bytes(args.indexed.dtype);
  LoopNest outer = {}, inner = {};
  outer.n_operands = 2 + 2 * kIndices;
  inner.n_operands = 1 + kIndices;
  for (int d = 0; d < args.indexed.ndim; ++d) {
    const bool is_searched = args.indexed.strides[d] == 0;
    LoopNest* nest = is_searched ? &inner : &outer;
    const int at = add_dim(nest, args.indexed.sizes[d]);
    const int values = is_searched ? 0 : 1;
    nest->strides[values][at] = args.plain.strides[d] * bytes;
    for (int k = 0; k < args.n_dims; ++k)
      nest->strides[values + 1 + k][at] =
          args.dims[k].index.strides[d] * dtype_bytes(args.dims[k].index.dtype);
    if (!is_searched) nest->strides[0][at] = args.indexed.strides[d] * bytes;
  }
  for (int k = 0; k < args.n_dims; ++k) {
    const int at = add_dim(&outer, args.dims[k].size);
    outer.strides[0][at] = args.dims[k].stride * bytes;
    outer.strides[2 + kIndices + k][at] = 1;
  }
  if (outer.n_steps() == 0 || inner.n_steps() == 0) return {};
  if (outer.n_steps() > kMaxSteps || inner.n_steps() > kMaxSteps)
    return error(StatusCode::kUnsupported,
                 "%.200s: expected at most %lld elements and positions to add up, got %lld and "
                 "%lld; use device cpu",
                 args.who, static_cast<long long>(kMaxSteps),
                 static_cast<long long>(outer.n_steps()), static_cast<long long>(inner.n_steps()));
  outer.collapse();
  AccumulateParams<kIndices> p = {};
  p.outer = outer.device_loop<2 + 2 * kIndices>();
  p.inner = inner.device_loop<1 + kIndices>();
  p.to = static_cast<char*>(args.indexed.data);
  p.values = static_cast<const char*>(args.plain.data);
  p.n_indices = args.n_dims;
  p.dtype = args.indexed.dtype;
  p.n_bytes = static_cast<int32_t>(bytes);
  p.wraps = args.wraps;
  p.note = note;
  for (int k = 0; k < args.n_dims; ++k) {
    p.indices[k] = static_cast<const char*>(args.dims[k].index.data);
    p.sizes[k] = args.dims[k].size;
    p.is_int64[k] = args.dims[k].index.dtype == DType::kInt64;
  }
  const unsigned blocks = (p.outer.n_steps + kThreads - 1) / kThreads;
  if (is_float_kind(p.dtype))
    accumulate_kernel<float, kIndices><<<blocks, kThreads, 0, stream>>>(p);
  else if (p.dtype == DType::kFloat64)
    accumulate_kernel<double, kIndices><<<blocks, kThreads, 0, stream>>>(p);
  else
    accumulate_kernel<int64_t, kIndices><<<blocks, kThreads, 0, stream>>>(p);
  return launch_status(args.who, cudaGetLastError());
}

bool is_short(const IndexArgs& args) {
  int64_t n_destinations = 1, n_positions = 1;  // of each destination
  for (int d = 0; d < args.indexed.ndim; ++d)
    (args.indexed.strides[d] == 0 ? n_positions : n_destinations) *= args.indexed.sizes[d];
  for (int k = 0; k < args.n_dims; ++k) n_destinations *= args.dims[k].size;
  return n_positions == 0 || n_destinations == 0 ||
         (n_positions <= kMostPositions && n_destinations <= kMostLooks / n_positions);
}

}  // namespace

uint64_t accumulate_scratch_bytes(const IndexArgs& args) {
  return is_short(args) ? 0 : accumulate_sorted_scratch_bytes(args);
}

Status launch_accumulate(const IndexArgs& args, const FaultNote& note, void* scratch,
                         cudaStream_t stream) {
  if (!is_short(args)) return launch_accumulate_sorted(args, note, scratch, stream);
  return args.n_dims == 1 ? launch<1>(args, note, stream) : launch<kMaxDims>(args, note, stream);
}

}  // namespace cuda_int4
