// matvec_w16a16_mma -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, n, k] + beta * c[i, m, n], M small
//
//   operand  dtype       shape          order in memory                                   align
//   a        f16 | bf16  [batch, M, K]  k inside, rows and matrices at strides of 16 B    16 B
//   b        of a        [batch, N, K]  likewise                                          16 B
//   c        of a        [batch, M, N]  any strides, 0 repeats; or absent                 2 B
//   y (out)  of a        [batch, M, N]  row-major                                         2 B
//
// Requires  M <= 16, K % 8 == 0   (matvec_w16a16_accepts)
// Grid      (ceil(N / 16 / tiles of a block), batch) blocks of 8 warps; a tile is 16 columns n, and 1
//           to 8 warps of the block walk its k in steps of 64, 4 loads of 16 bytes of b each in flight
// Bytes     reads b once, a once a tile (from the L2), writes y; bound by b
// Numerics  fp32 sums in the tensor cores, over warps in order; one rounding at the store
// Source    own. b is the A operand of m16n8k16 straight from global memory: a lane's 16 bytes of a
//           row are 8 neighbouring k, dealt to two mma as k pairs; a is dealt the same way, and a sum
//           does not mind the order of its k
#include "launch_dependent.cuh"
#include "matmul_kernels.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kTileN = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLoads = 2;           // of 32 k, in flight: each 2 of b
constexpr int kStep = 32 * kLoads;  // k that a warp takes in one go
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ uint4 load_or_zero(const void* p, bool load) {
  return load ? *static_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

// kRows: of y in units of 8.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 4 : 3)
    matvec_w16a16_mma_kernel(MatmulArgs p, int warps_per_tile) {
  __shared__ float partials[kWarps][8 * kRows][kTileN];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quarter = lane % 4;  // of the mma: row or column, pair of k
  const int tiles = kWarps / warps_per_tile;
  const int64_t n_begin = (int64_t{blockIdx.x} * tiles + warp / warps_per_tile) * kTileN;
  for (int64_t i = blockIdx.y; i < p.batch; i += gridDim.y) {
    const T* a = static_cast<const T*>(p.a) + i * p.a_batch;
    const T* b = static_cast<const T*>(p.b) + i * p.b_batch;
    const T* low_row = b + (n_begin + group) * p.b_n;
    const T* high_row = low_row + 8 * p.b_n;
    const bool has_low = n_begin + group < p.N, has_high = n_begin + group + 8 < p.N;
    float sums[kRows][4] = {};
    // All lanes go round equally often, also where K ends between their eights: mma.sync wants all.
    for (int64_t k_warp = (warp % warps_per_tile) * kStep; k_warp < p.K;
         k_warp += kStep * warps_per_tile) {
      const int64_t k = k_warp + 8 * quarter;
      uint4 low[kLoads], high[kLoads], x[kLoads][kRows];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const bool inside = k + 32 * j < p.K;
        low[j] = load_or_zero(low_row + k + 32 * j, inside && has_low);
        high[j] = load_or_zero(high_row + k + 32 * j, inside && has_high);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int m = 8 * r + group;
          x[j][r] = load_or_zero(a + m * p.a_m + k + 32 * j, k + 32 * j < p.K && m < p.M);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          mma_m16n8k16(sums[r], {low[j].x, high[j].x, low[j].y, high[j].y}, {x[j][r].x, x[j][r].y},
                       T());
          mma_m16n8k16(sums[r], {low[j].z, high[j].z, low[j].w, high[j].w}, {x[j][r].z, x[j][r].w},
                       T());
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        partials[warp][8 * r + 2 * quarter + j % 2][group + 8 * (j / 2)] = sums[r][j];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < tiles * 8 * kRows * kTileN; at += kThreads) {
      const int n_in_tile = at % kTileN, m = at / kTileN % (8 * kRows);
      const int tile = at / kTileN / (8 * kRows);
      const int64_t n = (int64_t{blockIdx.x} * tiles + tile) * kTileN + n_in_tile;
      if (m >= p.M || n >= p.N) continue;
      float sum = 0.f;
      for (int w = 0; w < warps_per_tile; ++w)
        sum += partials[tile * warps_per_tile + w][m][n_in_tile];
      sum *= static_cast<float>(p.alpha);
      if (p.c != nullptr) {
        const T* c = static_cast<const T*>(p.c) + i * p.c_batch;
        sum += static_cast<float>(p.beta) * as_float(c[m * p.c_m + n * p.c_n]);
      }
      static_cast<T*>(p.y)[(i * p.M + m) * p.N + n] = from_float<T>(sum);
    }
    __syncthreads();  // before the next matrix overwrites partials
  }
}

template <typename T>
cudaError_t launch(const MatmulArgs& args, cudaStream_t stream) {
  int warps_per_tile = 1;
  while (warps_per_tile < kWarps && int64_t{warps_per_tile} * kStep < args.K) warps_per_tile *= 2;
  const int64_t columns = kWarps / warps_per_tile * kTileN;
  const dim3 grid(static_cast<unsigned>((args.N + columns - 1) / columns),
                  static_cast<unsigned>(args.batch < kMaxGridY ? args.batch : kMaxGridY));
  const auto kernel = args.M <= 8 ? matvec_w16a16_mma_kernel<T, 1> : matvec_w16a16_mma_kernel<T, 2>;
  return launch_dependent(kernel, grid, kThreads, 0, stream, args, warps_per_tile);
}

}  // namespace

bool matvec_w16a16_accepts(const MatmulArgs& args) {
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.a) | reinterpret_cast<uintptr_t>(args.b);
  const int64_t strides = args.K | args.a_m | args.b_n | args.a_batch | args.b_batch;
  return (args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16) && args.M <= 16 &&
         args.a_k == 1 && args.b_k == 1 && args.K > 0 && strides % 8 == 0 && pointers % 16 == 0;
}

cudaError_t launch_matvec_w16a16_mma(const MatmulArgs& args, cudaStream_t stream) {
  return args.dtype == DType::kFloat16 ? launch<__half>(args, stream)
                                       : launch<__nv_bfloat16>(args, stream);
}

}  // namespace cuda_int4
