// convolution -- y[n, o, h, w] = bias[o] + sum over c, u, v of x[n, c, ...] * weight[o, c, u, v]
//                (convolution.h has the formula in full)
//
//   operand  dtype         shape                        order in memory                     align
//   x        nine, not bool  [N, C, h, w]                 any strides                         dtype
//   weight   of x          [O, C / groups, u, v]        any strides; contiguous: fast       dtype
//   bias     of x | float  [O]                          contiguous; or absent               dtype
//   y (out)  of x          [N, O, h, w]                 any strides without gaps            dtype
//   columns  of x          [N, h * w, C * u * v]        row-major scratch; product only     16 B
//
// Requires  C % groups == 0, O % groups == 0, strides and dilations of at least 1
// Grid      direct: a thread per element of y, 256 to a block. product: a thread per element of
//           columns, then matmul.h's kernels; 1 x 1 windows need no columns
// Bytes     product: writes and reads columns beside x, weight and y
// Numerics  fp32 sums (f64: fp64, integers: int64), one rounding at the store; a product as its kernel
// Source    own; the product takes floats without groups, not transposed, whose columns fit 512 MiB
#include <type_traits>

#include "any_dtype.cuh"
#include "convolution_kernels.cuh"
#include "matmul_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;
constexpr int64_t kAlignment = 256;  // of columns, in bytes
constexpr int64_t kMaxColumnsBytes = int64_t{512} << 20;

unsigned grid_of(int64_t numel) {
  const int64_t blocks = (numel + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Where along x the window at `out` has its element `u`; -1: beside x.
__device__ __forceinline__ int64_t source(const ConvolutionArgs& p, int d, int64_t out, int64_t u) {
  const Window& w = p.window;
  int64_t at;
  if (p.is_transposed) {
    at = out + w.padding[d] - u * w.dilation[d];
    if (at % w.stride[d] != 0) return -1;
    at /= w.stride[d];
  } else {
    at = out * w.stride[d] - w.padding[d] + u * w.dilation[d];
  }
  return at >= 0 && at < p.in_sizes[d] ? at : -1;
}

template <typename Reader>
__global__ void __launch_bounds__(kThreads) convolution_direct_kernel(ConvolutionArgs p) {
  using V = typename Reader::V;
  const int64_t in_group = p.in_channels / p.groups, out_group = p.out_channels / p.groups;
  const int64_t numel = p.N * p.out_channels * p.out_sizes[0] * p.out_sizes[1];
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < numel;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t w = i % p.out_sizes[1], h = i / p.out_sizes[1] % p.out_sizes[0];
    const int64_t plane = i / p.out_sizes[1] / p.out_sizes[0];
    const int64_t o = plane % p.out_channels, n = plane / p.out_channels, group = o / out_group;
    V sum = 0;
    for (int64_t u = 0; u < p.window.kernel[0]; ++u) {
      const int64_t in_h = source(p, 0, h, u);
      if (in_h < 0) continue;
      for (int64_t v = 0; v < p.window.kernel[1]; ++v) {
        const int64_t in_w = source(p, 1, w, v);
        if (in_w < 0) continue;
        int64_t x_at = n * p.x_strides[0] + group * in_group * p.x_strides[1] +
                       in_h * p.x_strides[2] + in_w * p.x_strides[3];
        int64_t weight_at = u * p.weight_strides[2] + v * p.weight_strides[3];
        int64_t weight_step = p.weight_strides[1];
        if (p.is_transposed) {  // [in channels, out channels of a group, kernel]
          weight_at += group * in_group * p.weight_strides[0] + o % out_group * p.weight_strides[1];
          weight_step = p.weight_strides[0];
        } else {
          weight_at += o * p.weight_strides[0];
        }
        for (int64_t c = 0; c < in_group; ++c) {
          sum += Reader::at(p.x, p.dtype, x_at) * Reader::at(p.weight, p.dtype, weight_at);
          x_at += p.x_strides[1];
          weight_at += weight_step;
        }
      }
    }
    if (p.bias != nullptr) {
      if constexpr (std::is_same_v<V, int64_t>) {
        sum += load_int64(p.bias, p.bias_dtype, o);
      } else {
        sum += static_cast<V>(load_double(p.bias, p.bias_dtype, o));
      }
    }
    store_as(p.y, p.dtype,
             n * p.y_strides[0] + o * p.y_strides[1] + h * p.y_strides[2] + w * p.y_strides[3],
             sum);
  }
}

// columns[n, h * w, (c * kernel_h + u) * kernel_w + v] = x under the window, 0 beside it
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    convolution_columns_kernel(ConvolutionArgs p, Word* columns) {
  const int64_t kernel_elems = p.window.kernel[0] * p.window.kernel[1];
  const int64_t K = p.in_channels * kernel_elems;
  const int64_t numel = p.N * p.out_sizes[0] * p.out_sizes[1] * K;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < numel;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t v = i % p.window.kernel[1], u = i / p.window.kernel[1] % p.window.kernel[0];
    const int64_t c = i / kernel_elems % p.in_channels, at = i / K;
    const int64_t w = at % p.out_sizes[1], h = at / p.out_sizes[1] % p.out_sizes[0];
    const int64_t n = at / p.out_sizes[1] / p.out_sizes[0];
    const int64_t in_h = source(p, 0, h, u), in_w = source(p, 1, w, v);
    columns[i] = in_h < 0 || in_w < 0
                     ? Word(0)
                     : static_cast<const Word*>(p.x)[n * p.x_strides[0] + c * p.x_strides[1] +
                                                     in_h * p.x_strides[2] + in_w * p.x_strides[3]];
  }
}

// The convolution as a product, if it is one; matmul->b is left null where it needs columns.
struct Product {
  bool possible = false;
  uint64_t columns_bytes = 0;
  MatmulArgs matmul = {};
};

Product product_of(const ConvolutionArgs& args) {
  Product product;
  const Window& window = args.window;
  const int elem_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const bool is_float = args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16 ||
                        args.dtype == DType::kFloat32;
  const int64_t kernel_elems = window.kernel[0] * window.kernel[1];
  const int64_t K = args.in_channels * kernel_elems, L = args.out_sizes[0] * args.out_sizes[1];
  const int64_t O = args.out_channels;
  const bool weight_is_flat = args.weight_strides[3] == 1 &&
                              args.weight_strides[2] == window.kernel[1] &&
                              args.weight_strides[1] == kernel_elems && args.weight_strides[0] == K;
  const auto flat = [&](const int64_t (&strides)[4], const int64_t (&sizes)[2], int64_t channels) {
    return strides[3] == 1 && strides[2] == sizes[1] && strides[1] == sizes[0] * sizes[1] &&
           (args.N == 1 || strides[0] == channels * strides[1]);
  };
  if (!is_float || args.groups != 1 || args.is_transposed || !weight_is_flat || K == 0 || L == 0 ||
      !flat(args.y_strides, args.out_sizes, O) ||
      (args.bias != nullptr && args.bias_dtype != args.dtype))
    return product;

  // y [O, L] = weight [O, K] @ columns [L, K].T, for each n.
  MatmulArgs& matmul = product.matmul;
  matmul.a = args.weight;
  matmul.c = args.bias;
  matmul.y = args.y;
  matmul.dtype = args.dtype;
  matmul.batch = args.N;
  matmul.M = O;
  matmul.N = L;
  matmul.K = K;
  matmul.a_m = K;
  matmul.a_k = 1;
  matmul.b_batch = L * K;
  matmul.c_m = 1;
  matmul.alpha = matmul.beta = 1;
  bool is_x = kernel_elems == 1 && flat(args.x_strides, args.in_sizes, args.in_channels);
  for (int d = 0; d < 2; ++d) is_x = is_x && window.stride[d] == 1 && window.padding[d] == 0;
  if (is_x) {  // x [K, L] is its own columns
    matmul.b = args.x;
    matmul.b_k = L;
    matmul.b_n = 1;
  } else {
    const int64_t n_rows = args.N * L;
    if (n_rows > kMaxColumnsBytes / elem_bytes / K) return product;
    product.columns_bytes =
        static_cast<uint64_t>((n_rows * K * elem_bytes + kAlignment - 1) / kAlignment * kAlignment);
    matmul.b_k = 1;
    matmul.b_n = K;
  }
  product.possible = true;
  return product;
}

}  // namespace

uint64_t convolution_scratch_bytes(const ConvolutionArgs& args) {
  const Product product = product_of(args);
  if (!product.possible) return 0;
  // The null that stands for columns is aligned as they will be.
  const uint64_t columns = product.columns_bytes == 0 ? 0 : product.columns_bytes + kAlignment;
  return columns + matmul_scratch_bytes(product.matmul);
}

cudaError_t launch_convolution(const ConvolutionArgs& args, void* scratch, uint64_t scratch_bytes,
                               cudaStream_t stream) {
  const int64_t numel = args.N * args.out_channels * args.out_sizes[0] * args.out_sizes[1];
  if (numel == 0) return cudaSuccess;
  Product product = product_of(args);
  if (!product.possible) {
    return with_reader(args.dtype, args.dtype, [&](auto reader) {
      convolution_direct_kernel<decltype(reader)><<<grid_of(numel), kThreads, 0, stream>>>(args);
      return cudaGetLastError();
    });
  }
  char* rest = static_cast<char*>(scratch);
  char* const end = rest + scratch_bytes;
  if (product.columns_bytes > 0) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(scratch);
    char* columns = rest + (begin + kAlignment - 1) / kAlignment * kAlignment - begin;
    rest = columns + product.columns_bytes;
    if (rest > end) return cudaErrorInvalidValue;
    const int64_t n_columns = args.N * args.out_sizes[0] * args.out_sizes[1] * product.matmul.K;
    if (args.dtype == DType::kFloat32) {
      convolution_columns_kernel<<<grid_of(n_columns), kThreads, 0, stream>>>(
          args, reinterpret_cast<uint32_t*>(columns));
    } else {
      convolution_columns_kernel<<<grid_of(n_columns), kThreads, 0, stream>>>(
          args, reinterpret_cast<uint16_t*>(columns));
    }
    product.matmul.b = columns;
  }
  return launch_matmul(product.matmul, rest, static_cast<uint64_t>(end - rest), stream);
}

}  // namespace cuda_int4
