// pool -- the average or the maximum of x under a window
//
//   operand        dtype                         shape                    order in memory      align
//   x              f16 | bf16 | f32 | f64 | i64  [n_planes, height, width]  row-major          dtype
//   y (out)        of x                          [n_planes, height, width]  row-major          dtype
//   indices (out)  i64                           that of y                  row-major; or absent  8 B
//
// Requires  padding of at most half the kernel
// Grid      a thread per element of y, 256 to a block
// Bytes     reads x once a window that covers it, mostly from the L2
// Numerics  averages: fp32 sums (f64: fp64, i64: int64, the quotient cut); maxima are copied, a NaN
//           wins (of several the last), of equals the first
// Source    own
#include <cuda_runtime.h>

#include "any_dtype.cuh"
#include "convolution_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// Along one dimension: elements begin, begin + step, ... below end, and how many count.
struct Range {
  int64_t begin, end, step, count;
};

__device__ __forceinline__ Range range_of(const PoolArgs& p, int d, int64_t out) {
  const int64_t size = p.in_sizes[d];
  if (p.pooling == Pooling::kAdaptiveAverage) {
    const int64_t begin = out * size / p.out_sizes[d];
    const int64_t end = ((out + 1) * size + p.out_sizes[d] - 1) / p.out_sizes[d];
    return {begin, end, 1, end - begin};
  }
  const Window& w = p.window;
  int64_t begin = out * w.stride[d] - w.padding[d];
  const int64_t end = begin + (w.kernel[d] - 1) * w.dilation[d] + 1;
  const int64_t padded = min(end, size + w.padding[d]) - begin;
  if (begin < 0) begin += (-begin + w.dilation[d] - 1) / w.dilation[d] * w.dilation[d];
  const int64_t inside = min(end, size);
  return {begin, inside, w.dilation[d], p.counts_padding ? padded : inside - begin};
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolArgs p) {
  using V = typename Reader::V;
  const int64_t width = p.in_sizes[1], in_plane = p.in_sizes[0] * width;
  const int64_t out_plane = p.out_sizes[0] * p.out_sizes[1];
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.n_planes * out_plane;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t base = i / out_plane * in_plane;
    const Range rows = range_of(p, 0, i % out_plane / p.out_sizes[1]);
    const Range columns = range_of(p, 1, i % p.out_sizes[1]);
    const bool is_maximum = p.pooling == Pooling::kMaximum;
    V result = 0;
    int64_t index = -1;
    for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
      for (int64_t w = columns.begin; w < columns.end; w += columns.step) {
        const V value = Reader::at(p.x, p.dtype, base + h * width + w);
        if (!is_maximum) {
          result += value;
        } else if (index < 0 || value > result || value != value) {
          result = value;
          index = h * width + w;
        }
      }
    }
    if (!is_maximum) {
      const int64_t count = rows.count * columns.count;
      result /= static_cast<V>(p.divisor != 0 ? p.divisor : count == 0 ? 1 : count);
    }
    store_as(p.y, p.dtype, i, result);
    if (p.indices != nullptr) p.indices[i] = index;
  }
}

}  // namespace

cudaError_t launch_pool(const PoolArgs& args, cudaStream_t stream) {
  const int64_t numel = args.n_planes * args.out_sizes[0] * args.out_sizes[1];
  if (numel == 0) return cudaSuccess;
  const int64_t blocks = (numel + kThreads - 1) / kThreads;
  return with_reader(args.dtype, args.dtype, [&](auto reader) {
    pool_kernel<decltype(reader)>
        <<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(
            args);
    return cudaGetLastError();
  });
}

}  // namespace cuda_int4
