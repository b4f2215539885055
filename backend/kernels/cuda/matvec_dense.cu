// matvec_dense -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, n, k] + beta * c[i, m, n], M small
//
//   operand  dtype             shape          order in memory                                   align
//   a        f16 | bf16 | f32  [batch, M, K]  k inside, rows and matrices at strides of 16 B    16 B
//   b        of a              [batch, N, K]  likewise                                          16 B
//   c        of a              [batch, M, N]  any strides, 0 repeats; or absent                 dtype
//   y (out)  of a              [batch, M, N]  row-major                                         dtype
//
// Requires  M == 1 (f32: M <= 8), rows of whole 16 bytes   (matvec_dense_accepts)
// Grid      (ceil(N / columns of a block), batch) blocks of 8 warps; a tile is 1 column n (M > 1: 2),
//           and 1 to 8 warps of the block take its k in turns of 512 bytes; 4 (8) loads of 16 bytes
//           of b in flight in a lane
// Bytes     reads b once, a once a tile (from the L1), writes y; bound by b
// Numerics  fp32 sums over a lane's k, over lanes, over warps in order; no tf32; one rounding at the
//           store
// Source    own
#include <type_traits>

#include "launch_dependent.cuh"
#include "matmul_kernels.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLoads = 4;                   // of a row, in flight
constexpr int64_t kWarpsWanted = 132 * 16;  // on the GPU; fewer leave the bus idle
constexpr int64_t kMaxGridY = 65535;

template <typename T>
__device__ __forceinline__ uint4 load_or_zero(const T* p, bool load) {
  return load ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

// Value i of 16 bytes.
template <typename T>
__device__ __forceinline__ float value_of(const uint4& words, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float((&words.x)[i]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t pair = (&words.x)[i / 2];
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
  } else {
    const uint32_t pair = (&words.x)[i / 2];
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> (i % 2 * 16))));
  }
}

// Columns of a tile, and blocks that an SM holds: one row needs few registers.
template <int kM>
constexpr int kTileN = kM == 1 ? 1 : 2;
template <int kM>
constexpr int kBlocksPerSm = kM == 1 ? 4 : 2;

template <typename T, int kM>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kM>)
    matvec_dense_kernel(MatmulArgs p, int n_turns) {
  constexpr int kTileN = cuda_int4::kTileN<kM>;
  constexpr int kVec = kElemsPer16Bytes<T>;
  constexpr int kChunk = 32 * kVec;  // k that a warp's load covers
  __shared__ float partials[kWarps][kM][kTileN];
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = kWarps / n_turns;  // warps that share a tile take turns along k
  const int64_t n_begin = (int64_t{blockIdx.x} * tiles + warp / n_turns) * kTileN;
  const int64_t chunk_step = int64_t{kChunk} * n_turns;
  for (int64_t i = blockIdx.y; i < p.batch; i += gridDim.y) {
    const T* a = static_cast<const T*>(p.a) + i * p.a_batch;
    const T* b = static_cast<const T*>(p.b) + i * p.b_batch + n_begin * p.b_n;
    float sums[kM][kTileN] = {};
    for (int64_t k = warp % n_turns * kChunk + kVec * lane; k < p.K; k += kLoads * chunk_step) {
      uint4 w[kTileN][kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int n = 0; n < kTileN; ++n) {
          w[n][j] = load_or_zero(b + n * p.b_n + k + j * chunk_step,
                                 n_begin + n < p.N && k + j * chunk_step < p.K);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const uint4 x =
              load_or_zero(a + m * p.a_m + k + j * chunk_step, m < p.M && k + j * chunk_step < p.K);
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
#pragma unroll
            for (int n = 0; n < kTileN; ++n)
              sums[m][n] = fmaf(value_of<T>(x, e), value_of<T>(w[n][j], e), sums[m][n]);
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
      for (int turn = 0; turn < n_turns; ++turn)
        sum += partials[tile * n_turns + turn][m][n_in_tile];
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

template <typename T, int kM>
cudaError_t launch(const MatmulArgs& args, cudaStream_t stream) {
  const int64_t chunk = 32 * kElemsPer16Bytes<T>, tiles = (args.N + kTileN<kM> - 1) / kTileN<kM>;
  int n_turns = 1;
  while (n_turns < kWarps && tiles * args.batch * n_turns < kWarpsWanted &&
         n_turns * chunk < args.K)
    n_turns *= 2;
  const int64_t columns = kWarps / n_turns * kTileN<kM>;
  const dim3 grid(static_cast<unsigned>((args.N + columns - 1) / columns),
                  static_cast<unsigned>(args.batch < kMaxGridY ? args.batch : kMaxGridY));
  return launch_dependent(matvec_dense_kernel<T, kM>, grid, kThreads, 0, stream, args, n_turns);
}

}  // namespace

bool matvec_dense_accepts(const MatmulArgs& args) {
  const bool is_float32 = args.dtype == DType::kFloat32;
  const bool is_16_bit = args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16;
  const uintptr_t pointers =
      reinterpret_cast<uintptr_t>(args.a) | reinterpret_cast<uintptr_t>(args.b);
  const int64_t strides = args.K | args.a_m | args.b_n | args.a_batch | args.b_batch;
  return (is_float32 || is_16_bit) && args.M <= (is_float32 ? 8 : 1) && args.a_k == 1 &&
         args.b_k == 1 && args.K > 0 && strides % (is_float32 ? 4 : 8) == 0 && pointers % 16 == 0;
}

cudaError_t launch_matvec_dense(const MatmulArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::kFloat16) return launch<__half, 1>(args, stream);
  if (args.dtype == DType::kBFloat16) return launch<__nv_bfloat16, 1>(args, stream);
  if (args.M == 1) return launch<float, 1>(args, stream);
  return args.M <= 4 ? launch<float, 4>(args, stream) : launch<float, 8>(args, stream);
}

}  // namespace cuda_int4
