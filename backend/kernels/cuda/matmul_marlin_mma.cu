// matmul_marlin_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g]
//                                + bias[n],  g = k / group_size;  marlin.v1 and marlin24.v1
//
//   operand     dtype               shape                     order in memory               align
//   x           f16 | bf16          [M, K]                    row-major                     2 B
//   qdata       u8                  [K/16 | K/32, 8*Np]       marlin.h                      16 B
//   meta        i16                 [K/32, 2*Np]              marlin.h; marlin24.v1 only    16 B
//   scale       f16 | bf16 | f32    [n_groups, Np]            marlin.h                      dtype
//   zero_point  of scale | f32      [n_groups, Np]            as scale; absent means 8      dtype
//   bias        dtype of x          [N]                       contiguous; absent means 0    2 B
//   y (out)     dtype of x          [M, N]                    row-major                     2 B
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      one block of 4 warps per 256 weight rows and kTokens rows of x, tiles along M first; a warp
//           owns 64 weight rows, a column of tiles
// Bytes     reads x once per 256 weight rows, qdata once per kTokens rows of x (the L2 holds what
//           neighbours share); bound by the tensor cores of mma.sync
// Numerics  weights rounded once to the dtype of x (w4a16_fragments.cuh), scales of another dtype
//           once more; fp32 sums, one rounding at the store
// Source    direct; the rung below matmul_marlin_wgmma, and the one for sm_80 and for x at odd addresses
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "marlin_fragments.cuh"
#include "matmul_marlin.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kWarps * 64;
constexpr int kStageK = 64;
constexpr int kStages = 4;

template <bool kSparse_, int kTokens_>
struct Tile {
  static constexpr bool kSparse = kSparse_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kTileK = kSparse ? 32 : 16;  // weights along K of a tile of codes
  static constexpr int kTiles = kStageK / kTileK;
  static constexpr int kXBytes = kTokens * kStageK * 2;
  static constexpr int kQBytes = kTiles * 512;  // of one warp
  static constexpr int kMetaBytes = kSparse ? kTiles * 256 : 0;
  static constexpr int kStageBytes = kXBytes + kWarps * (kQBytes + kMetaBytes);
  static constexpr int kYRowBytes = kRows * 2 + 16;  // one 16 more: no bank conflicts among tokens
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kTokens* kYRowBytes);
};

// Offset of 16 bytes of x: rows of 128 bytes, 16-byte columns rotated so that ldmatrix hits all banks.
__device__ __forceinline__ int x_offset(int row, int column) {
  return row * 128 + ((column ^ (row & 7)) * 16);
}

// Rows of x past the end repeat the last one: their sums are not stored.
template <typename C>
__device__ __forceinline__ void load_stage(const MatmulMarlinArgs& p, bool x_is_aligned, int64_t m0,
                                           int64_t column, bool has_column, int64_t k0,
                                           uint8_t* stage) {
  const uint32_t shared = shared_address(stage);
#pragma unroll
  for (int i = 0; i < C::kXBytes / 16 / kThreads; ++i) {
    const int item = threadIdx.x + i * kThreads, row = item / 8, piece = item % 8;
    const int64_t k = k0 + piece * 8;
    if (k >= p.K) continue;
    const int64_t m = min(m0 + row, p.M - 1);
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + m * p.K + k;
    if (x_is_aligned) {
      cp_async_16(shared + x_offset(row, piece), from);
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(stage + x_offset(row, piece));
      for (int e = 0; e < 8; ++e) to[e] = from[e];
    }
  }
  if (!has_column) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t columns = (p.N + 63) / 64, first = k0 / C::kTileK;
  const uint32_t codes = shared + C::kXBytes + warp * (C::kQBytes + C::kMetaBytes) + lane * 16;
#pragma unroll
  for (int i = 0; i < C::kTiles; ++i) {
    if (k0 + i * C::kTileK >= p.K) break;
    const int64_t tile = (first + i) * columns + column;
    cp_async_16(codes + i * 512, static_cast<const uint8_t*>(p.qdata) + tile * 512 + lane * 16);
    if (C::kSparse && lane < 16) {
      cp_async_16(codes + C::kQBytes + i * 256,
                  static_cast<const uint8_t*>(p.meta) + tile * 256 + lane * 16);
    }
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) matmul_marlin_mma_kernel(MatmulMarlinArgs p) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  constexpr int kBlocksN = C::kTokens / 8;  // of tokens
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_m = (p.M + C::kTokens - 1) / C::kTokens;
  const int64_t m0 = blockIdx.x % tiles_m * C::kTokens, n0 = blockIdx.x / tiles_m * kRows;
  const int64_t column = n0 / 64 + warp, padded_n = (p.N + 63) / 64 * 64;
  const bool has_column = column * 64 < padded_n;
  const bool x_is_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const int64_t n_groups = p.K / p.group_size;
  const int units_per_group = static_cast<int>(p.group_size / 32);
  const int n_stages = static_cast<int>((p.K + kStageK - 1) / kStageK);

  // Scales are read a group ahead of their use.
  float next_scale[4][2], next_zero[4][2];
  GroupScale<T> group[4][2];
  auto load_scales = [&](int64_t group_index) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t index = group_index * padded_n + (has_column ? column : 0) * 64 +
                              marlin_scale_index<C::kSparse>(j, g, half, n_groups == 1);
        next_scale[j][half] = load_as_float(p.scale, index, p.scale_dtype);
        next_zero[j][half] =
            p.zero_point == nullptr ? 8.f : load_as_float(p.zero_point, index, p.zero_point_dtype);
      }
    }
  };
  load_scales(0);
  int64_t group_index = 0;
  int units_left = 0;  // of the group in use, 32 k each

  float sum[4][kBlocksN][4] = {};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < n_stages) {
      load_stage<C>(p, x_is_aligned, m0, column, has_column, int64_t{stage} * kStageK,
                    shared_bytes + stage * C::kStageBytes);
    }
    cp_async_commit();
  }
  for (int stage = 0; stage < n_stages; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one before
    const int next = stage + kStages - 1;
    if (next < n_stages) {
      load_stage<C>(p, x_is_aligned, m0, column, has_column, int64_t{next} * kStageK,
                    shared_bytes + next % kStages * C::kStageBytes);
    }
    cp_async_commit();
    if (!has_column) continue;
    const uint8_t* from = shared_bytes + stage % kStages * C::kStageBytes;
    const uint32_t x_tile = shared_address(from);
    const uint8_t* codes_tile = from + C::kXBytes + warp * (C::kQBytes + C::kMetaBytes);
#pragma unroll
    for (int unit = 0; unit < kStageK / 32; ++unit) {
      if (int64_t{stage} * kStageK + unit * 32 >= p.K) break;
      if (units_left == 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            group[j][half] = group_scale<T>(next_scale[j][half], next_zero[j][half], true);
          }
        }
        units_left = units_per_group;
        if (++group_index < n_groups) load_scales(group_index);
      }
      --units_left;
      uint32_t b[kBlocksN][4];  // 32 k of 8 tokens
#pragma unroll
      for (int i = 0; i < kBlocksN; ++i) {
        ldmatrix_x4(b[i], x_tile + x_offset(i * 8 + lane % 8, unit * 4 + lane / 8));
      }
      if constexpr (C::kSparse) {
        const uint4 codes = *reinterpret_cast<const uint4*>(codes_tile + unit * 512 + lane * 16);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        const uint32_t* places =
            reinterpret_cast<const uint32_t*>(codes_tile + C::kQBytes + unit * 256) + lane;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          fragment_of_marlin_word<T>(words[j], group[j][0], group[j][1], a);
          const uint32_t meta = places[j / 2 * 32];
#pragma unroll
          for (int i = 0; i < kBlocksN; ++i) {
            if (j % 2 == 0) {
              mma_sparse_m16n8k32<0>(sum[j][i], a, b[i], meta, T());
            } else {
              mma_sparse_m16n8k32<1>(sum[j][i], a, b[i], meta, T());
            }
          }
        }
      } else {
#pragma unroll
        for (int slice = 0; slice < 2; ++slice) {
          const uint4 codes =
              *reinterpret_cast<const uint4*>(codes_tile + (unit * 2 + slice) * 512 + lane * 16);
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t a[4];
            fragment_of_marlin_word<T>(words[j], group[j][0], group[j][1], a);
#pragma unroll
            for (int i = 0; i < kBlocksN; ++i) {
              const uint32_t b_slice[2] = {b[i][2 * slice], b[i][2 * slice + 1]};
              mma_m16n8k16(sum[j][i], a, b_slice, T());
            }
          }
        }
      }
    }
  }

  // y through shared memory: a row of it per token.
  cp_async_wait<0>();
  __syncthreads();
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 64 + marlin_row<C::kSparse>(j, g, half);
      const int64_t n = n0 + row;
      const float bias_of = bias != nullptr && n < p.N ? as_float(bias[n]) : 0.f;
#pragma unroll
      for (int i = 0; i < kBlocksN; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint8_t* to = shared_bytes + (i * 8 + 2 * t + e) * C::kYRowBytes + row * 2;
          *reinterpret_cast<T*>(to) = from_float<T>(sum[j][i][2 * half + e] + bias_of);
        }
      }
    }
  }
  __syncthreads();
  T* y = static_cast<T*>(p.y);
  const bool in_vectors = p.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  const int64_t n = n0 + threadIdx.x % 32 * 8;
  if (n >= p.N) return;
  for (int token = warp; token < C::kTokens && m0 + token < p.M; token += kWarps) {
    const Elems<T, 8> values =
        *reinterpret_cast<const Elems<T, 8>*>(shared_bytes + token * C::kYRowBytes + lane * 16);
    T* to = y + (m0 + token) * p.N + n;
    if (in_vectors) {
      *reinterpret_cast<Elems<T, 8>*>(to) = values;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i < p.N) to[i] = values.values[i];
      }
    }
  }
}

template <typename T, typename C>
cudaError_t launch_tile(const MatmulMarlinArgs& args, cudaStream_t stream) {
  const auto kernel = matmul_marlin_mma_kernel<T, C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = ((args.M + C::kTokens - 1) / C::kTokens) * ((args.N + kRows - 1) / kRows);
  if (tiles > INT32_MAX || args.K > INT32_MAX) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(tiles), kThreads, C::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, bool kSparse>
cudaError_t launch_tokens(const MatmulMarlinArgs& args, cudaStream_t stream) {
  return args.M <= 32 ? launch_tile<T, Tile<kSparse, 32>>(args, stream)
                      : launch_tile<T, Tile<kSparse, 64>>(args, stream);
}

template <typename T>
cudaError_t launch(const MatmulMarlinArgs& args, cudaStream_t stream) {
  return args.meta == nullptr ? launch_tokens<T, false>(args, stream)
                              : launch_tokens<T, true>(args, stream);
}

}  // namespace

cudaError_t launch_matmul_marlin_mma(const MatmulMarlinArgs& args, cudaStream_t stream) {
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
