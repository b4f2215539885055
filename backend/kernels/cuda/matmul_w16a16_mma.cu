// matmul_w16a16_mma -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, k, n] + beta * c[i, m, n]
//
//   operand  dtype       shape          order in memory                                    align
//   a        f16 | bf16  [batch, M, K]  k inside, rows and matrices at strides of 16 B     16 B
//   b        of a        [batch, K, N]  k or n inside, the rest at strides of 16 B         16 B
//   c        of a        [batch, M, N]  any strides, 0 repeats; or absent                  2 B
//   y (out)  of a        [batch, M, N]  row-major                                          2 B
//
// Requires  K % 8 == 0, and N % 8 == 0 where n is inside   (matmul_w16a16_accepts)
// Grid      one block of 8 warps (2 x 4) per 64 x 64 tile of y, or, k inside, 128 x 128 if there are many
// Bytes     reads a and b once a tile across from them, mostly from the L2; bound by the tensor cores
// Numerics  fp32 sums in the order of k; one rounding at the store
// Source    own: mma.sync m16n8k16 from a ring of 4 stages of 64 k that cp.async fills; for machines
//           without cuBLASLt
#include "matmul_kernels.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kDepth = 64;  // k of a stage
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kPad = 8;  // 16 bytes: the 8 rows of an ldmatrix fall on all banks
constexpr int64_t kMaxBlocks = int64_t{1} << 30;
constexpr int64_t kFewTiles = 132;  // of 128 x 128: below, smaller ones fill the GPU better

// A square tile of y for a block of 2 x 4 warps.
template <int kSize>
struct Tile {
  static constexpr int kWarpM = kSize / 2, kWarpN = kSize / 4;  // of y in a warp
  static constexpr int kStageElems = kSize * (kDepth + kPad);   // of a, and of b with k inside
  static constexpr int kSharedBytes = kStages * 2 * kStageElems * 2;
  static_assert(kDepth * (kSize + kPad) <= kStageElems, "b with n inside takes no more");
};

// `n_lines` lines of `length` neighbouring elements into rows of `length + kPad`; zeros beyond
// line_limit and element_limit, which is a multiple of 8.
template <int n_lines, int length, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* matrix, int64_t line_stride,
                                          int64_t first_line, int64_t line_limit,
                                          int64_t first_element, int64_t element_limit) {
  constexpr int kVectors = length / 8;
#pragma unroll
  for (int i = 0; i < n_lines * kVectors / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads;
    const int line = at / kVectors, element = at % kVectors * 8;
    const bool inside = first_line + line < line_limit && first_element + element < element_limit;
    const T* from = matrix + (first_line + line) * line_stride + first_element + element;
    cp_async_16_or_zero(shared_address(tile + line * (length + kPad) + element),
                        inside ? from : matrix, inside);
  }
}

template <typename T, bool kKInside, int kTile>
__global__ void __launch_bounds__(kThreads) matmul_w16a16_mma_kernel(MatmulArgs p) {
  constexpr int kWarpM = Tile<kTile>::kWarpM, kWarpN = Tile<kTile>::kWarpN;
  constexpr int kStageElems = Tile<kTile>::kStageElems;
  extern __shared__ __align__(16) unsigned char shared[];
  T* a_tiles = reinterpret_cast<T*>(shared);
  T* b_tiles = a_tiles + kStages * kStageElems;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / (kTile / kWarpN) * kWarpM, warp_n = warp % (kTile / kWarpN) * kWarpN;
  const int64_t n_tiles_n = (p.N + kTile - 1) / kTile, n_tiles_m = (p.M + kTile - 1) / kTile;
  const int64_t n_steps = (p.K + kDepth - 1) / kDepth;
  for (int64_t tile = blockIdx.x; tile < p.batch * n_tiles_m * n_tiles_n; tile += gridDim.x) {
    // Tiles next to each other share columns: b, mostly the larger, is read once.
    const int64_t m_begin = tile % n_tiles_m * kTile;
    const int64_t n_begin = tile / n_tiles_m % n_tiles_n * kTile;
    const int64_t i = tile / n_tiles_m / n_tiles_n;
    const T* a = static_cast<const T*>(p.a) + i * p.a_batch;
    const T* b = static_cast<const T*>(p.b) + i * p.b_batch;
    const auto load_stage = [&](int64_t step) {
      if (step < n_steps) {
        const int64_t k = step * kDepth;
        T* a_tile = a_tiles + step % kStages * kStageElems;
        T* b_tile = b_tiles + step % kStages * kStageElems;
        load_tile<kTile, kDepth>(a_tile, a, p.a_m, m_begin, p.M, k, p.K);
        if constexpr (kKInside) {
          load_tile<kTile, kDepth>(b_tile, b, p.b_n, n_begin, p.N, k, p.K);
        } else {
          load_tile<kDepth, kTile>(b_tile, b, p.b_k, k, p.K, n_begin, p.N);
        }
      }
      cp_async_commit();  // an empty group at the end, so that the count of groups holds
    };

    float sums[kWarpM / 16][kWarpN / 8][4] = {};
    __syncthreads();  // the tile before has been read
    for (int step = 0; step < kStages - 1; ++step) load_stage(step);
    for (int64_t step = 0; step < n_steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there for all, and the one before it is free
      load_stage(step + kStages - 1);
      const T* a_tile = a_tiles + step % kStages * kStageElems;
      const T* b_tile = b_tiles + step % kStages * kStageElems;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a_frags[kWarpM / 16][4], b_frags[kWarpN / 8][2];
#pragma unroll
        for (int m = 0; m < kWarpM / 16; ++m) {
          const int row = warp_m + 16 * m + lane % 16;
          ldmatrix_x4(a_frags[m],
                      shared_address(a_tile + row * (kDepth + kPad) + k + lane / 16 * 8));
        }
#pragma unroll
        for (int n = 0; n < kWarpN / 8; n += 2) {
          uint32_t four[4];  // two columns of fragments
          if constexpr (kKInside) {
            const int row = warp_n + 8 * n + lane % 8 + lane / 16 * 8;
            ldmatrix_x4(four,
                        shared_address(b_tile + row * (kDepth + kPad) + k + lane / 8 % 2 * 8));
          } else {
            const int row = k + lane % 16;
            ldmatrix_x4_trans(four, shared_address(b_tile + row * (kTile + kPad) + warp_n + 8 * n +
                                                   lane / 16 * 8));
          }
          b_frags[n][0] = four[0];
          b_frags[n][1] = four[1];
          b_frags[n + 1][0] = four[2];
          b_frags[n + 1][1] = four[3];
        }
#pragma unroll
        for (int m = 0; m < kWarpM / 16; ++m) {
#pragma unroll
          for (int n = 0; n < kWarpN / 8; ++n)
            mma_m16n8k16(sums[m][n], a_frags[m], b_frags[n], T());
        }
      }
    }
    cp_async_wait<0>();

    const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
    const T* c = p.c == nullptr ? nullptr : static_cast<const T*>(p.c) + i * p.c_batch;
    T* y = static_cast<T*>(p.y) + i * p.M * p.N;
#pragma unroll
    for (int m = 0; m < kWarpM / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpN / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t row = m_begin + warp_m + 16 * m + lane / 4 + j / 2 * 8;
          const int64_t column = n_begin + warp_n + 8 * n + lane % 4 * 2 + j % 2;
          if (row >= p.M || column >= p.N) continue;
          float value = alpha * sums[m][n][j];
          if (c != nullptr) value += beta * as_float(c[row * p.c_m + column * p.c_n]);
          y[row * p.N + column] = from_float<T>(value);
        }
      }
    }
  }
}

template <typename T, bool kKInside, int kTile>
cudaError_t launch(const MatmulArgs& args, cudaStream_t stream) {
  const auto kernel = matmul_w16a16_mma_kernel<T, kKInside, kTile>;
  constexpr int kSharedBytes = Tile<kTile>::kSharedBytes;
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (code != cudaSuccess) return code;
  const int64_t n_tiles =
      args.batch * ((args.M + kTile - 1) / kTile) * ((args.N + kTile - 1) / kTile);
  kernel<<<static_cast<unsigned>(n_tiles < kMaxBlocks ? n_tiles : kMaxBlocks), kThreads,
           kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

// 128 x 128 with k inside only: with n inside they have not been checked on a GPU.
template <typename T>
cudaError_t choose_tile(const MatmulArgs& args, cudaStream_t stream) {
  const int64_t n_large = args.batch * ((args.M + 127) / 128) * ((args.N + 127) / 128);
  if (args.M <= 64 || n_large < kFewTiles) return launch<T, true, 64>(args, stream);
  int device = 0, most_shared = 0;  // 99 KiB on some GPUs that run the code for sm_80
  cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return code;
  return Tile<128>::kSharedBytes <= most_shared ? launch<T, true, 128>(args, stream)
                                                : launch<T, true, 64>(args, stream);
}

template <typename T>
cudaError_t choose(const MatmulArgs& args, cudaStream_t stream) {
  return args.b_k == 1 ? choose_tile<T>(args, stream) : launch<T, false, 64>(args, stream);
}

}  // namespace

bool matmul_w16a16_accepts(const MatmulArgs& args) {
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.a) | reinterpret_cast<uintptr_t>(args.b);
  const bool k_inside = args.b_k == 1;
  const int64_t strides =
      args.K | args.a_m | args.a_batch | args.b_batch | (k_inside ? args.b_n : args.b_k | args.N);
  return (args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16) && args.a_k == 1 &&
         (k_inside || args.b_n == 1) && args.K > 0 && strides % 8 == 0 && pointers % 16 == 0;
}

cudaError_t launch_matmul_w16a16_mma(const MatmulArgs& args, cudaStream_t stream) {
  return args.dtype == DType::kFloat16 ? choose<__half>(args, stream)
                                       : choose<__nv_bfloat16>(args, stream);
}

}  // namespace cuda_int4
