// matmul_w4a16_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g]
//                               + bias[n],  g = k / group_size
//
//   operand     dtype               shape          order in memory                              align
//   x           f16 | bf16          [M, K]         row-major                                    2 B
//   qdata       u32                 [N, K/8]       row-major; bits 4i..4i+3 hold k = 8w + i     16 B
//   scale       f16 | bf16 | f32    [N, n_groups]  row-major                                    dtype
//   zero_point  of scale | f32      [N, n_groups]  row-major; absent means 8                    dtype
//   bias        dtype of x          [N]            contiguous; absent means 0                   2 B
//   y (out)     dtype of x          [M, N]         row-major                                    2 B
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      one block of 256 threads per tile of kTileM rows of x and 128 columns, tiles along M first
// Bytes     reads x once per 128 columns, qdata once per kTileM rows (the L2 holds what neighbours
//           share); bound by the tensor cores of mma.sync
// Numerics  weights rounded once to the dtype of x (w4a16_fragments.cuh), scales of another dtype
//           once more; fp32 sums, one rounding at the store
// Source    direct; the rung below matmul_w4a16_wgmma, and the one for sm_80 and for x at odd addresses
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matmul_w4a16.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "w4a16_fragments.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int kTileN = 128;
constexpr int kTileK = 64;
constexpr int kStages = 4;
constexpr int kChunkK = 32;  // what a group holds a whole number of; one LDS.128 of codes per row
constexpr int kChunks = kTileK / kChunkK;

// kTileM rows of x; warps along M and N; each warp owns kFragsM x kFragsN blocks of 16 x 8.
template <int kTileM_, int kWarpsM>
struct Tile {
  static constexpr int kTileM = kTileM_;
  static constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kFragsM = kTileM / kWarpsM / 16;
  static constexpr int kFragsN = kTileN / kWarpsN / 8;
  static constexpr int kXBytes = kTileM * kTileK * 2;
  static constexpr int kQBytes = kTileN * kTileK / 2;
  static constexpr int kStageBytes = kXBytes + kQBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Offset of 16 bytes of x: rows of 128 bytes, 16-byte columns rotated so that ldmatrix hits all banks.
__device__ __forceinline__ int x_offset(int row, int column) {
  return row * 128 + ((column ^ (row & 7)) * 16);
}

// Offset of 32 codes: rows of 32 bytes, rotated so that 8 rows at one k fill the 32 banks.
__device__ __forceinline__ int q_offset(int row, int chunk) {
  return row * 32 + ((chunk ^ ((row >> 2) & 1)) * 16);
}

// Rows past the end repeat the last one: their sums are not stored.
template <typename C>
__device__ __forceinline__ void load_tile(const MatmulW4A16Args& p, bool x_is_aligned, int64_t m0,
                                          int64_t n0, int64_t k0, uint8_t* stage) {
  const uint32_t shared = shared_address(stage);
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < C::kXBytes / 16 / kThreads; ++i) {
    const int item = thread + i * kThreads, row = item / 8, column = item % 8;
    const int64_t k = k0 + column * 8;
    if (k >= p.K) continue;
    const int64_t m = min(m0 + row, p.M - 1);
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + m * p.K + k;
    if (x_is_aligned) {
      cp_async_16(shared + x_offset(row, column), from);
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(stage + x_offset(row, column));
      for (int e = 0; e < 8; ++e) to[e] = from[e];
    }
  }
  static_assert(C::kQBytes / 16 == kThreads, "one 16-byte copy of codes per thread");
  const int row = thread / kChunks, chunk = thread % kChunks;
  const int64_t k = k0 + chunk * kChunkK;
  if (k < p.K) {
    const int64_t n = min(n0 + row, p.N - 1);
    cp_async_16(shared + C::kXBytes + q_offset(row, chunk),
                static_cast<const uint8_t*>(p.qdata) + (n * p.K + k) / 2);
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads, 2) matmul_w4a16_mma_kernel(MatmulW4A16Args p) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp / C::kWarpsN, warp_n = warp % C::kWarpsN;
  const int64_t tiles_m = (p.M + C::kTileM - 1) / C::kTileM;
  const int64_t m0 = blockIdx.x % tiles_m * C::kTileM, n0 = blockIdx.x / tiles_m * kTileN;
  const bool x_is_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const uint32_t selector = fragment_selector(t);
  const int64_t n_groups = p.K / p.group_size;
  const int chunks_per_group = static_cast<int>(p.group_size / kChunkK);
  const int n_tiles = static_cast<int>((p.K + kTileK - 1) / kTileK);

  // Scales are read a group ahead of their use.
  const int first_row = warp_n * C::kFragsN * 8 + g;
  float next_scale[C::kFragsN], next_zero[C::kFragsN];
  GroupScale<T> group[C::kFragsN];
  auto load_scales = [&](int64_t group_index) {
#pragma unroll
    for (int j = 0; j < C::kFragsN; ++j) {
      const int64_t n = min(n0 + first_row + j * 8, p.N - 1);
      const int64_t index = n * n_groups + group_index;
      next_scale[j] = load_as_float(p.scale, index, p.scale_dtype);
      next_zero[j] =
          p.zero_point == nullptr ? 8.f : load_as_float(p.zero_point, index, p.zero_point_dtype);
    }
  };
  load_scales(0);
  int64_t group_index = 0;
  int chunks_left = 0;  // of the group in use

  float sum[C::kFragsM][C::kFragsN][4] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < n_tiles) {
      load_tile<C>(p, x_is_aligned, m0, n0, int64_t{tile} * kTileK,
                   shared_bytes + tile * C::kStageBytes);
    }
    cp_async_commit();
  }
  for (int tile = 0; tile < n_tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile is there for all, and all are done with the one before
    const int next = tile + kStages - 1;
    if (next < n_tiles) {
      load_tile<C>(p, x_is_aligned, m0, n0, int64_t{next} * kTileK,
                   shared_bytes + next % kStages * C::kStageBytes);
    }
    cp_async_commit();
    const uint8_t* stage = shared_bytes + tile % kStages * C::kStageBytes;
    const uint32_t x_tile = shared_address(stage);
    const uint8_t* q_tile = stage + C::kXBytes;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (int64_t{tile} * kTileK + chunk * kChunkK >= p.K) break;
      if (chunks_left == 0) {
#pragma unroll
        for (int j = 0; j < C::kFragsN; ++j) {
          group[j] = group_scale<T>(next_scale[j], next_zero[j], false);
        }
        chunks_left = chunks_per_group;
        if (++group_index < n_groups) load_scales(group_index);
      }
      --chunks_left;
      uint4 codes[C::kFragsN];
#pragma unroll
      for (int j = 0; j < C::kFragsN; ++j) {
        codes[j] = *reinterpret_cast<const uint4*>(q_tile + q_offset(first_row + j * 8, chunk));
      }
#pragma unroll
      for (int slice = 0; slice < 2; ++slice) {  // 16 k each
        uint32_t a[C::kFragsM][4];
#pragma unroll
        for (int i = 0; i < C::kFragsM; ++i) {
          const int row = (warp_m * C::kFragsM + i) * 16 + lane % 16;
          ldmatrix_x4(a[i], x_tile + x_offset(row, chunk * 4 + slice * 2 + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < C::kFragsN; ++j) {
          uint32_t b[2];
          fragment_of_codes<T>(slice == 0 ? codes[j].x : codes[j].z,
                               slice == 0 ? codes[j].y : codes[j].w, selector, group[j], b[0],
                               b[1]);
#pragma unroll
          for (int i = 0; i < C::kFragsM; ++i) mma_m16n8k16(sum[i][j], a[i], b, T());
        }
      }
    }
  }

  T* y = static_cast<T*>(p.y);
  const T* bias = static_cast<const T*>(p.bias);
  const bool pairs = p.N % 2 == 0 && reinterpret_cast<uintptr_t>(p.y) % 4 == 0;
#pragma unroll
  for (int j = 0; j < C::kFragsN; ++j) {
    const int64_t n = n0 + (warp_n * C::kFragsN + j) * 8 + 2 * t;
    if (n >= p.N) continue;
    const bool has_second = n + 1 < p.N;
    const float bias_0 = bias == nullptr ? 0.f : as_float(bias[n]);
    const float bias_1 = bias == nullptr || !has_second ? 0.f : as_float(bias[n + 1]);
#pragma unroll
    for (int i = 0; i < C::kFragsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = m0 + (warp_m * C::kFragsM + i) * 16 + g + half * 8;
        if (m >= p.M) continue;
        Elems<T, 2> out = {{from_float<T>(sum[i][j][2 * half] + bias_0),
                            from_float<T>(sum[i][j][2 * half + 1] + bias_1)}};
        T* to = y + m * p.N + n;
        if (pairs) {
          *reinterpret_cast<Elems<T, 2>*>(to) = out;
        } else {
          to[0] = out.values[0];
          if (has_second) to[1] = out.values[1];
        }
      }
    }
  }
}

template <typename T, typename C>
cudaError_t launch_tile(const MatmulW4A16Args& args, cudaStream_t stream) {
  const auto kernel = matmul_w4a16_mma_kernel<T, C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = ((args.M + C::kTileM - 1) / C::kTileM) * ((args.N + kTileN - 1) / kTileN);
  if (tiles > INT32_MAX || args.K > INT32_MAX) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(tiles), kThreads, C::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const MatmulW4A16Args& args, cudaStream_t stream) {
  if (args.M <= 32) return launch_tile<T, Tile<32, 1>>(args, stream);
  if (args.M <= 64) return launch_tile<T, Tile<64, 1>>(args, stream);
  return launch_tile<T, Tile<128, 2>>(args, stream);
}

}  // namespace

cudaError_t launch_matmul_w4a16_mma(const MatmulW4A16Args& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return launch<__half>(args, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
