// matmul_plain -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, k, n] + beta * c[i, m, n]
//
//   operand  dtype       shape          order in memory                    align
//   a        any of ten  [batch, M, K]  any strides, 0 repeats             dtype
//   b        of a        [batch, K, N]  any strides, 0 repeats             dtype
//   c        of a        [batch, M, N]  any strides, 0 repeats; or absent  dtype
//   y (out)  of a        [batch, M, N]  row-major                          dtype
//
// Requires  a real dtype (bool is refused); K == 0 gives beta * c, or 0
// Grid      one block of 256 threads per 64 x 64 tile of y, or 128 x 128 (fp32 sums, many tiles); at
//           most 2^30, the rest in strides
// Bytes     reads a and b once a tile across from them; bound by arithmetic without tensor cores
// Numerics  sums over k in order: fp32 for f16, bf16 and f32; fp64 for f64; integers wrap in int64
//           and so as their own dtype does; one rounding at the store
// Source    own; the one that takes everything, and the baseline of the others
#include <type_traits>

#include "matmul_kernels.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kDepth = 16;  // k of a step
constexpr int kThreads = 256;
constexpr int kSide = 16;            // threads along the rows of a tile, and along its columns
constexpr int kPad = 4;              // spreads the columns of a step over the banks
constexpr int64_t kManyTiles = 132;  // of 128 x 128
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// What T is summed in, and the way there and back.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double,
                               std::conditional_t<std::is_integral_v<T>, int64_t, float>>;

template <typename T>
__device__ __forceinline__ Sum<T> widen(T value) {
  if constexpr (std::is_same_v<Sum<T>, float>) {
    return as_float(value);
  } else {
    return static_cast<Sum<T>>(value);
  }
}

template <typename T>
__device__ __forceinline__ T narrow(Sum<T> value) {
  if constexpr (std::is_same_v<Sum<T>, float>) {
    return from_float<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

// A kTile x kDepth piece of a matrix, zeros beyond its edges: first into registers, later into
// tile[k][row]. Neighbouring threads take neighbouring addresses, whichever of the two dimensions
// that is.
template <typename T, int kTile>
struct Piece {
  static constexpr int kElems = kTile * kDepth / kThreads;
  Sum<T> elems[kElems];

  __device__ __forceinline__ static int row_of(int i, bool k_is_inner) {
    const int at = threadIdx.x + i * kThreads;
    return k_is_inner ? at / kDepth : at % kTile;
  }
  __device__ __forceinline__ static int k_of(int i, bool k_is_inner) {
    const int at = threadIdx.x + i * kThreads;
    return k_is_inner ? at % kDepth : at / kTile;
  }
  __device__ __forceinline__ void load(const T* matrix, int64_t row_stride, int64_t k_stride,
                                       int64_t row_begin, int64_t n_rows, int64_t k_begin,
                                       int64_t n_k) {
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      const int64_t row = row_begin + row_of(i, k_stride == 1),
                    k = k_begin + k_of(i, k_stride == 1);
      elems[i] =
          row < n_rows && k < n_k ? widen(matrix[row * row_stride + k * k_stride]) : Sum<T>(0);
    }
  }
  __device__ __forceinline__ void store(Sum<T> (&tile)[kDepth][kTile + kPad], int64_t k_stride) {
#pragma unroll
    for (int i = 0; i < kElems; ++i)
      tile[k_of(i, k_stride == 1)][row_of(i, k_stride == 1)] = elems[i];
  }
};

// kPerThread: rows, and columns, of y in a thread; in runs of 4, a run every 4 * kSide.
template <typename T, int kPerThread>
__global__ void __launch_bounds__(kThreads) matmul_plain_kernel(MatmulArgs p) {
  constexpr int kTile = kSide * kPerThread;
  __shared__ Sum<T> a_tile[kDepth][kTile + kPad];
  __shared__ Sum<T> b_tile[kDepth][kTile + kPad];
  const int64_t n_tiles_n = (p.N + kTile - 1) / kTile, n_tiles_m = (p.M + kTile - 1) / kTile;
  const int64_t n_tiles = p.batch * n_tiles_m * n_tiles_n;
  const int thread_m = threadIdx.x / kSide * 4, thread_n = threadIdx.x % kSide * 4;
  const auto in_tile = [](int first, int i) { return first + i % 4 + i / 4 * 4 * kSide; };
  for (int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const int64_t n_begin = tile % n_tiles_n * kTile;
    const int64_t m_begin = tile / n_tiles_n % n_tiles_m * kTile;
    const int64_t i = tile / n_tiles_n / n_tiles_m;
    const T* a = static_cast<const T*>(p.a) + i * p.a_batch;
    const T* b = static_cast<const T*>(p.b) + i * p.b_batch;
    Sum<T> sums[kPerThread][kPerThread] = {};
    Piece<T, kTile> a_next, b_next;
    a_next.load(a, p.a_m, p.a_k, m_begin, p.M, 0, p.K);
    b_next.load(b, p.b_n, p.b_k, n_begin, p.N, 0, p.K);
    for (int64_t k_begin = 0; k_begin < p.K; k_begin += kDepth) {
      a_next.store(a_tile, p.a_k);
      b_next.store(b_tile, p.b_k);
      __syncthreads();
      a_next.load(a, p.a_m, p.a_k, m_begin, p.M, k_begin + kDepth, p.K);
      b_next.load(b, p.b_n, p.b_k, n_begin, p.N, k_begin + kDepth, p.K);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int m = 0; m < kPerThread; ++m) {
#pragma unroll
          for (int n = 0; n < kPerThread; ++n)
            sums[m][n] += a_tile[k][in_tile(thread_m, m)] * b_tile[k][in_tile(thread_n, n)];
        }
      }
      __syncthreads();  // before the next step overwrites the tiles
    }
#pragma unroll
    for (int m = 0; m < kPerThread; ++m) {
#pragma unroll
      for (int n = 0; n < kPerThread; ++n) {
        const int64_t row = m_begin + in_tile(thread_m, m), column = n_begin + in_tile(thread_n, n);
        if (row >= p.M || column >= p.N) continue;
        Sum<T> value = static_cast<Sum<T>>(p.alpha) * sums[m][n];
        if (p.c != nullptr) {
          const T* c = static_cast<const T*>(p.c) + i * p.c_batch;
          value += static_cast<Sum<T>>(p.beta) * widen(c[row * p.c_m + column * p.c_n]);
        }
        static_cast<T*>(p.y)[(i * p.M + row) * p.N + column] = narrow<T>(value);
      }
    }
  }
}

int64_t tiles_of(const MatmulArgs& args, int64_t size) {
  return args.batch * ((args.M + size - 1) / size) * ((args.N + size - 1) / size);
}

template <typename T, int kPerThread>
cudaError_t launch_tiles(const MatmulArgs& args, cudaStream_t stream) {
  const int64_t n_tiles = tiles_of(args, kSide * kPerThread);
  matmul_plain_kernel<T, kPerThread>
      <<<static_cast<unsigned>(n_tiles < kMaxBlocks ? n_tiles : kMaxBlocks), kThreads, 0, stream>>>(
          args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const MatmulArgs& args, cudaStream_t stream) {
  if constexpr (std::is_same_v<Sum<T>, float>) {
    if (args.M > 64 && tiles_of(args, 8 * kSide) >= kManyTiles)
      return launch_tiles<T, 8>(args, stream);
  }
  return launch_tiles<T, 4>(args, stream);
}

}  // namespace

cudaError_t launch_matmul_plain(const MatmulArgs& args, cudaStream_t stream) {
  if (args.batch == 0 || args.M == 0 || args.N == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat16:
      return launch<__half>(args, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return launch<float>(args, stream);
    case DType::kFloat64:
      return launch<double>(args, stream);
    case DType::kUInt8:
      return launch<uint8_t>(args, stream);
    case DType::kInt8:
      return launch<int8_t>(args, stream);
    case DType::kInt16:
      return launch<int16_t>(args, stream);
    case DType::kInt32:
      return launch<int32_t>(args, stream);
    case DType::kInt64:
      return launch<int64_t>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
