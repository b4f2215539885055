// matvec_w32a32 -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, n, k] + beta * c[i, m, n], M small
//
//   operand  dtype  shape          order in memory                                   align
//   a        f32    [batch, M, K]  k inside, rows and matrices at strides of 16 B    16 B
//   b        f32    [batch, N, K]  likewise                                          16 B
//   c        f32    [batch, M, N]  any strides, 0 repeats; or absent                 4 B
//   y (out)  f32    [batch, M, N]  row-major                                         4 B
//
// Requires  M <= 8, K % 4 == 0   (matvec_w32a32_accepts)
// Grid      (ceil(N / 2 / tiles of a block), batch) blocks of 8 warps; a tile is 2 columns n, and 1 to
//           8 warps of the block walk its k in steps of 512, 8 loads of 16 bytes of b each in flight
// Bytes     reads b once, a once a tile (from the L1), writes y; bound by b
// Numerics  fp32 sums over a lane's k, over lanes, over warps in order; no tf32
// Source    own
#include "matmul_kernels.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kTileN = 2;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLoads = 4;            // of a row, in flight
constexpr int kStep = 128 * kLoads;  // k that a warp takes in one go
constexpr int kWarpSteps = 2;        // below this a second warp does not pay
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ float4 load_or_zero(const float* p, bool load) {
  return load ? __ldg(reinterpret_cast<const float4*>(p)) : float4{0, 0, 0, 0};
}

template <int kM>
__global__ void __launch_bounds__(kThreads, 2)
    matvec_w32a32_kernel(MatmulArgs p, int warps_per_tile) {
  __shared__ float partials[kWarps][kM][kTileN];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = kWarps / warps_per_tile;
  const int64_t n_begin = (int64_t{blockIdx.x} * tiles + warp / warps_per_tile) * kTileN;
  for (int64_t i = blockIdx.y; i < p.batch; i += gridDim.y) {
    const float* a = static_cast<const float*>(p.a) + i * p.a_batch;
    const float* b = static_cast<const float*>(p.b) + i * p.b_batch + n_begin * p.b_n;
    float sums[kM][kTileN] = {};
    for (int64_t k = (warp % warps_per_tile) * kStep + 4 * lane; k < p.K;
         k += kStep * warps_per_tile) {
      float4 w[kTileN][kLoads];
#pragma unroll
      for (int n = 0; n < kTileN; ++n) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
          w[n][j] =
              load_or_zero(b + n * p.b_n + k + 128 * j, n_begin + n < p.N && k + 128 * j < p.K);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const float4 x = load_or_zero(a + m * p.a_m + k + 128 * j, m < p.M && k + 128 * j < p.K);
#pragma unroll
          for (int n = 0; n < kTileN; ++n) {
            sums[m][n] = fmaf(x.x, w[n][j].x, sums[m][n]);
            sums[m][n] = fmaf(x.y, w[n][j].y, sums[m][n]);
            sums[m][n] = fmaf(x.z, w[n][j].z, sums[m][n]);
            sums[m][n] = fmaf(x.w, w[n][j].w, sums[m][n]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kTileN; ++n) {
        const float sum = warp_sum(sums[m][n]);
        if (lane == 0) partials[warp][m][n] = sum;
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < tiles * kM * kTileN; at += kThreads) {
      const int n_in_tile = at % kTileN, m = at / kTileN % kM, tile = at / kTileN / kM;
      const int64_t n = (int64_t{blockIdx.x} * tiles + tile) * kTileN + n_in_tile;
      if (m >= p.M || n >= p.N) continue;
      float sum = 0.f;
      for (int w = 0; w < warps_per_tile; ++w)
        sum += partials[tile * warps_per_tile + w][m][n_in_tile];
      sum *= static_cast<float>(p.alpha);
      if (p.c != nullptr) {
        const float* c = static_cast<const float*>(p.c) + i * p.c_batch;
        sum += static_cast<float>(p.beta) * c[m * p.c_m + n * p.c_n];
      }
      static_cast<float*>(p.y)[(i * p.M + m) * p.N + n] = sum;
    }
    __syncthreads();  // before the next matrix overwrites partials
  }
}

}  // namespace

bool matvec_w32a32_accepts(const MatmulArgs& args) {
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.a) | reinterpret_cast<uintptr_t>(args.b);
  const int64_t strides = args.K | args.a_m | args.b_n | args.a_batch | args.b_batch;
  return args.dtype == DType::kFloat32 && args.M <= 8 && args.a_k == 1 && args.b_k == 1 &&
         args.K > 0 && strides % 4 == 0 && pointers % 16 == 0;
}

cudaError_t launch_matvec_w32a32(const MatmulArgs& args, cudaStream_t stream) {
  int warps = 1;
  while (warps < kWarps && int64_t{warps} * kStep * kWarpSteps < args.K) warps *= 2;
  const int64_t columns = kWarps / warps * kTileN;
  const dim3 grid(static_cast<unsigned>((args.N + columns - 1) / columns),
                  static_cast<unsigned>(args.batch < kMaxGridY ? args.batch : kMaxGridY));
  if (args.M == 1) {
    matvec_w32a32_kernel<1><<<grid, kThreads, 0, stream>>>(args, warps);
  } else if (args.M <= 4) {
    matvec_w32a32_kernel<4><<<grid, kThreads, 0, stream>>>(args, warps);
  } else {
    matvec_w32a32_kernel<8><<<grid, kThreads, 0, stream>>>(args, warps);
  }
  return cudaGetLastError();
}

}  // namespace cuda_int4
