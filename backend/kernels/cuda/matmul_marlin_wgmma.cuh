// matmul_marlin_wgmma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g]
//                                  + bias[n],  g = k / group_size;  marlin.v1 and marlin24.v1
//
//   operand     dtype               shape                     order in memory               align
//   x           f16 | bf16          [M, K]                    row-major                     16 B
//   qdata       u8                  [K/16 | K/32, 8*Np]       marlin.h                      16 B
//   meta        i16                 [K/32, 2*Np]              marlin.h; marlin24.v1 only    16 B
//   scale       f16 | bf16 | f32    [n_groups, Np]            marlin.h                      16 B
//   zero_point  of scale | f32      [n_groups, Np]            as scale; absent means 8      16 B
//   bias        dtype of x          [N]                       contiguous; absent means 0    2 B
//   y (out)     dtype of x          [M, N]                    row-major                     2 B
//   scratch     flags, f32          tile_scratch_bytes; neither cleared before nor after    64 B
//
// Requires  sm_90a; K % 32 == 0; group_size in {32, 64, 128, 256} or K; M, N, K < 2^31
// Grid      persistent, one block a multiprocessor, tiles of kRows weight rows x kTokens rows of x
//           (wgmma_tiles.cuh)
// Block     consumer warpgroups (wgmma or wgmma.sp, weights from registers) and a producer thread that
//           feeds a ring of stages by the copy engine: codes, metadata, scales and zero points as they
//           lie in memory, and x. What a lane has of a fragment is a word of shared memory
// Bytes     reads the weight once per kTokens rows of x, x once per kRows weight rows (L2)
// Numerics  weights rounded once to the dtype of x (w4a16_fragments.cuh), scales of another dtype once
//           more; fp32 sums, one rounding at the store. Same inputs on the same GPU, same bits
// Source    direct; PTX ISA, wgmma and cp.async.bulk.tensor; the orders are those of Marlin and
//           Sparse-Marlin (IST-DASLab)
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch_dependent.cuh"
#include "marlin_fragments.cuh"
#include "matmul_marlin.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "wgmma_sparse.cuh"
#include "wgmma_tiles.cuh"

#pragma nv_diag_suppress 177  // below sm_90a the kernel is empty, and what it calls unused

namespace cuda_int4 {

// kSparse: marlin24.v1. kRowGroups warpgroups of consumers with 64 * kBlocks weight rows each, times
// kSplits that share out the k of each stage; kTokens rows of x; kTiles tiles of 16 codes along K (32
// weights where they are sparse) per stage of the ring, kSlices of them between two commits.
template <bool kSparse_, int kRowGroups_, int kSplits_, int kBlocks_, int kTokens_, int kTiles_,
          int kSlices_>
struct MarlinConfig {
  static constexpr bool kSparse = kSparse_;
  static constexpr int kRowGroups = kRowGroups_, kSplits = kSplits_, kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_, kTiles = kTiles_;
  static constexpr int kTileK = kSparse ? 32 : 16;
  static constexpr int kStageK = kTiles * kTileK;
  static constexpr int kRows = kRowGroups * 64 * kBlocks;
  static constexpr int kStorers = kRowGroups * 128;  // threads that hold sums of all of k
  static constexpr int kConsumers = kStorers * kSplits;
  static constexpr int kThreads = kConsumers + 128;
  // Of 61440 (4 warpgroups) or 64512 (2) in all, as launched; more than that would hang.
  static constexpr int kWarpgroups = kRowGroups * kSplits;
  static constexpr int kConsumerRegisters = kWarpgroups == 4 ? 112 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 4 ? 32 : 24;
  static constexpr int kSums = kTokens / 2;  // per thread and block of 64 rows
  static constexpr int kXBytes = kTokens * kStageK * 2;
  static constexpr int kTileBytes = kRows * 8;  // of codes
  static constexpr int kQBytes = kTiles * kTileBytes;
  static constexpr int kMetaBytes = kSparse ? kQBytes / 2 : 0;
  static constexpr int kBoxRows = kRows < 256 ? kRows : 256;
  static constexpr int kSlices = kSlices_;
  static constexpr int kSteps = kTiles / kSlices / kSplits;
  // Staging: kRows x kStagedTokens of y, or kSwapSums of the sums of each thread of the later splits.
  static constexpr int kStagedTokens = kTokens <= 32 ? kTokens : 32;
  static constexpr int kSwapSums = 16;
  static constexpr int kYBytes = kRows * kStagedTokens * 2;
  static constexpr int kSwapBytes = (kSplits - 1) * kStorers * kSwapSums * 4;
  static constexpr int kStagingBytes = kYBytes > kSwapBytes ? kYBytes : kSwapBytes;
  static_assert(kSteps % 2 == 0, "two fragment buffers take turns");
  static_assert(kWarpgroups == 2 || kWarpgroups == 4, "registers are shared out for these");
  static_assert(kBlocks <= 2, "the sums of more rows and their scales do not fit in registers");
  static_assert(kStageK % 64 == 0 && kRows % kBoxRows == 0, "whole boxes of the copy engine");
};

struct MarlinParams {
  const void* bias;
  void* y;
  float* partials;
  uint64_t* flags;
  TilePlan plan;
  DType scale_dtype, zero_point_dtype;
  int M, N;
  int n_ring;
  int scale_bytes, zero_bytes;  // of one group of the rows of a tile, in a stage
  int stage_groups;             // groups of a stage, at least 1
  int tiles_per_group_log2;     // of one stage: at most kTiles
  int64_t group_size;
  bool is_one_group;  // a row
  bool constant_weights;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The sparse instruction of each width, by number.
template <int kTokens>
struct WgmmaSparse;
#define CUDA_INT4_WGMMA_SPARSE(n)                                                         \
  template <>                                                                             \
  struct WgmmaSparse<n> {                                                                 \
    template <typename T, int kSelector>                                                  \
    static __device__ __forceinline__ void run(float (&d)[n / 2], const uint32_t (&a)[4], \
                                               uint32_t meta, uint32_t b) {               \
      wgmma_sparse_m64n##n##k32<kSelector>(d, a, meta, whole_descriptor(b), T());         \
    }                                                                                     \
  };
CUDA_INT4_WGMMA_SPARSE(32)
CUDA_INT4_WGMMA_SPARSE(64)
CUDA_INT4_WGMMA_SPARSE(128)
#undef CUDA_INT4_WGMMA_SPARSE
#endif

template <int kCount>
__device__ __forceinline__ void load_shared_words(const uint8_t* from, uint32_t (&words)[kCount]) {
  static_assert(kCount == 1 || kCount == 2, "one load");
  if constexpr (kCount == 1) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  }
}

__device__ __forceinline__ float float_of_bits(uint32_t bits, DType dtype) {
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                  : __uint_as_float(bits << 16);
}

// What a group of a row comes with: a scale in the dtype of x and in the order of many groups, one a
// stage; the same, several a stage; any scale; any scale and a zero point.
enum class MarlinScales { kOneAStage, kSimple, kAny, kZeros };

template <typename T, typename C, MarlinScales kScales>
__global__ void __launch_bounds__(C::kThreads, 1)
    matmul_marlin_wgmma_kernel(const __grid_constant__ CUtensorMap x_map,
                               const __grid_constant__ CUtensorMap q_map,
                               const __grid_constant__ CUtensorMap meta_map,
                               const __grid_constant__ CUtensorMap scale_map,
                               const __grid_constant__ CUtensorMap zero_map, const MarlinParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_bytes[];
  constexpr int kQ = C::kXBytes, kMeta = kQ + C::kQBytes, kScale = kMeta + C::kMetaBytes;
  const int zero_offset = kScale + p.stage_groups * p.scale_bytes;
  const int stage_bytes = (zero_offset + p.stage_groups * p.zero_bytes + 1023) & ~1023;
  uint8_t* ring = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
  uint8_t* staging = ring + p.n_ring * stage_bytes;
  const uint32_t ring_address = shared_address(ring);
  const uint32_t full = shared_address(staging) + C::kStagingBytes;
  const uint32_t empty = full + p.n_ring * 8;
  const int warp_of_block = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.n_ring; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, C::kConsumers / 32);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_launch_dependents();
  Schedule work(p.plan);
  int slot = 0;
  uint32_t phase = 0;
  auto advance = [&] {
    if (++slot == p.n_ring) {
      slot = 0;
      phase ^= 1;
    }
  };

  if (warp_of_block >= C::kConsumers / 32) {  // ---- producer ----
    setmaxnreg_dec<C::kProducerRegisters>();
    if (warp_of_block > C::kConsumers / 32 || lane != 0) return;
    prefetch_tensormap(&x_map);
    prefetch_tensormap(&q_map);
    prefetch_tensormap(&scale_map);
    bool may_read_x = !p.constant_weights;
    if (may_read_x) griddepcontrol_wait();
    const uint32_t n_bytes = zero_offset + p.stage_groups * p.zero_bytes;
    while (work.next()) {
      const int m0 = work.tile % p.plan.tiles_m * C::kTokens;
      const int n0 = work.tile / p.plan.tiles_m * C::kRows;
      for (int stage = work.k_begin; stage < work.k_end; ++stage) {
        spin_until(empty + 8 * slot, phase ^ 1);
        const uint32_t barrier = full + 8 * slot, at = ring_address + slot * stage_bytes;
        const int group = static_cast<int>(int64_t{stage} * C::kStageK / p.group_size);
        mbarrier_arrive_expect_tx(barrier, n_bytes);
#pragma unroll
        for (int i = 0; i < C::kRows / C::kBoxRows; ++i) {
          const int n = n0 + i * C::kBoxRows;
          cp_async_bulk_tensor_2d(at + kQ + i * C::kTiles * C::kBoxRows * 8, &q_map, n,
                                  stage * C::kTiles, barrier);
          if (C::kSparse) {
            cp_async_bulk_tensor_2d(at + kMeta + i * C::kTiles * C::kBoxRows * 4, &meta_map, n,
                                    stage * C::kTiles, barrier);
          }
          cp_async_bulk_tensor_2d(
              at + kScale + i * p.stage_groups * p.scale_bytes / (C::kRows / C::kBoxRows),
              &scale_map, n, group, barrier);
          if (kScales == MarlinScales::kZeros) {
            cp_async_bulk_tensor_2d(
                at + zero_offset + i * p.stage_groups * p.zero_bytes / (C::kRows / C::kBoxRows),
                &zero_map, n, group, barrier);
          }
        }
        if (!may_read_x) {
          griddepcontrol_wait();
          may_read_x = true;
        }
#pragma unroll
        for (int unit = 0; unit < C::kStageK / 64; ++unit) {
          cp_async_bulk_tensor_2d(at + unit * C::kTokens * 128, &x_map,
                                  stage * C::kStageK + unit * 64, m0, barrier);
        }
        advance();
      }
    }
    return;
  }

  // ---- consumers ----
  setmaxnreg_inc<C::kConsumerRegisters>();
  griddepcontrol_wait();                          // scratch and y may be in use by kernels ahead
  if (threadIdx.x == 0) p.flags[blockIdx.x] = 0;  // scratch may never have been written
  constexpr bool kHasZero = kScales == MarlinScales::kZeros;
  using Group = std::conditional_t<kHasZero, GroupScale<T>, SymmetricScale<T>>;
  const int warpgroup = warp_of_block / 4, warp = warp_of_block % 4;
  const int split = warpgroup / C::kRowGroups, row_group = warpgroup % C::kRowGroups;
  const int g = lane / 4, t = lane % 4;
  // This warp's rows of the block are words first_word .. + kBlocks of a tile of 64.
  const int first_row = row_group * 64 * C::kBlocks + warp * 16 * C::kBlocks;
  const int box = first_row / C::kBoxRows, tile64 = first_row % C::kBoxRows / 64;
  const int first_word = first_row % 64 / 16;
  const int q_lane =
      kQ + box * C::kTiles * C::kBoxRows * 8 + tile64 * 512 + lane * 16 + first_word * 4;
  // Sparse: word first_word / 2 of the tile's two has the places for both selectors; a warp with one
  // block takes selector 0, so that odd warps read the lanes that their instruction would pick by 1.
  const int meta_lane = C::kBlocks == 1 ? lane ^ (2 * (first_word & 1)) : lane;
  const int meta_of_lane = kMeta + box * C::kTiles * C::kBoxRows * 4 + tile64 * 256 +
                           (first_word / 2 * 32 + meta_lane) * 4;

  float sum[C::kBlocks][C::kSums];
  uint32_t frag[2][C::kSlices][C::kBlocks][4];
  uint32_t codes[2][C::kSlices][C::kBlocks];
  uint32_t meta[2][C::kSlices];
  Group group[C::kBlocks][2];

  // Of this lane's rows, from those of a group in shared memory.
  auto load_values = [&](const uint8_t* from, DType dtype, float (&values)[C::kBlocks][2]) {
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i) {
      const int first =
          tile64 * 64 + marlin_scale_index<C::kSparse>(first_word + i, g, 0, p.is_one_group);
      const int second =
          tile64 * 64 + marlin_scale_index<C::kSparse>(first_word + i, g, 1, p.is_one_group);
      if (dtype == DType::kFloat32) {
        values[i][0] = reinterpret_cast<const float*>(from)[first];
        values[i][1] = reinterpret_cast<const float*>(from)[second];
      } else {
        values[i][0] = float_of_bits(reinterpret_cast<const uint16_t*>(from)[first], dtype);
        values[i][1] = float_of_bits(reinterpret_cast<const uint16_t*>(from)[second], dtype);
      }
    }
  };
  auto load_scales = [&](const uint8_t* stage, int group_of_stage) {
    const uint8_t* scale =
        stage + kScale +
        (box * p.stage_groups + group_of_stage) * (p.scale_bytes / (C::kRows / C::kBoxRows));
    const uint8_t* zero =
        stage + zero_offset +
        (box * p.stage_groups + group_of_stage) * (p.zero_bytes / (C::kRows / C::kBoxRows));
    if constexpr (kScales == MarlinScales::kSimple || kScales == MarlinScales::kOneAStage) {
      uint32_t both[C::kBlocks];
      load_shared_words(scale + (tile64 * 64 + 8 * g + 2 * first_word) * 2, both);
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
        group[i][0] = symmetric_scale<T>(__byte_perm(both[i], both[i], 0x1010), true);
        group[i][1] = symmetric_scale<T>(__byte_perm(both[i], both[i], 0x3232), true);
      }
    } else {
      float scales[C::kBlocks][2], zeros[C::kBlocks][2];
      load_values(scale, p.scale_dtype, scales);
      if (kHasZero) load_values(zero, p.zero_point_dtype, zeros);
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (kHasZero) {
            group[i][half] = group_scale<T>(scales[i][half], zeros[i][half], true);
          } else {
            const float value = scales[i][half];
            group[i][half] = symmetric_scale<T>(pack_pair<T>(value, value), true);
          }
        }
      }
    }
  };
  auto load_codes = [&](const uint8_t* stage, int step) {
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
      const int tile = (split * C::kSteps + step) * C::kSlices + s;
      load_shared_words(stage + q_lane + tile * C::kBoxRows * 8, codes[step % 2][s]);
    }
  };
  // Only once the instructions that read these registers have run.
  auto load_meta = [&](const uint8_t* stage, int step) {
    if constexpr (C::kSparse) {
#pragma unroll
      for (int s = 0; s < C::kSlices; ++s) {
        const int tile = (split * C::kSteps + step) * C::kSlices + s;
        meta[step % 2][s] =
            *reinterpret_cast<const uint32_t*>(stage + meta_of_lane + tile * C::kBoxRows * 4);
      }
    }
  };

  while (work.next()) {
    const int m0 = work.tile % p.plan.tiles_m * C::kTokens;
    const int n0 = work.tile / p.plan.tiles_m * C::kRows;
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < C::kSums; ++j) sum[i][j] = 0.f;
    }
    spin_until(full + 8 * slot, phase);
    const uint8_t* stage = ring + slot * stage_bytes;
    load_codes(stage, 0);
    load_codes(stage, 1);
    if (kScales == MarlinScales::kOneAStage) load_scales(stage, 0);
    load_meta(stage, 0);
    int previous = -1;  // the stage whose slot is not yet given back
    for (int k = work.k_begin; k < work.k_end; ++k) {
      // the shuffle tells the compiler that this is one value per warp
      const uint32_t x_descriptor =
          __shfl_sync(0xffffffffu, descriptor_of(shared_address(stage)), 0);
      const int current = slot;
      const bool has_next = k + 1 < work.k_end;
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        uint32_t (&a)[C::kSlices][C::kBlocks][4] = frag[step % 2];
#pragma unroll
        for (int s = 0; s < C::kSlices; ++s) {
          const int tile = (split * C::kSteps + step) * C::kSlices + s;
          if (kScales != MarlinScales::kOneAStage &&
              (step + s == 0 || (tile & ((1 << p.tiles_per_group_log2) - 1)) == 0)) {
            load_scales(stage, tile >> p.tiles_per_group_log2);
          }
#pragma unroll
          for (int i = 0; i < C::kBlocks; ++i) {
            fragment_of_marlin_word<T>(codes[step % 2][s][i], group[i][0], group[i][1], a[s][i]);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < C::kSlices; ++s) {
          const int slice = (split * C::kSteps + step) * C::kSlices + s;  // of the stage
          const int k_bytes = slice * C::kTileK * 2;
          const int offset = k_bytes / 128 * C::kTokens * 128 + k_bytes % 128;
#pragma unroll
          for (int i = 0; i < C::kBlocks; ++i) {
            if constexpr (!C::kSparse) {
              Wgmma<C::kTokens>::template run<T>(sum[i], a[s][i], x_descriptor + (offset >> 4));
            } else if (i % 2 == 0) {
              WgmmaSparse<C::kTokens>::template run<T, 0>(sum[i], a[s][i], meta[step % 2][s],
                                                          x_descriptor + (offset >> 4));
            } else {
              WgmmaSparse<C::kTokens>::template run<T, 1>(sum[i], a[s][i], meta[step % 2][s],
                                                          x_descriptor + (offset >> 4));
            }
          }
        }
        wgmma_commit_group();
        // While these run: codes of the step after next, scales of the next stage.
        if (step + 2 < C::kSteps) {
          load_codes(stage, step + 2);
        } else {
          if (step + 2 == C::kSteps) {
            advance();
            if (has_next) spin_until(full + 8 * slot, phase);
          }
          if (has_next) load_codes(ring + slot * stage_bytes, step + 2 - C::kSteps);
        }
        if (step + 1 == C::kSteps) stage = ring + slot * stage_bytes;
        if (kScales == MarlinScales::kOneAStage && step + 1 == C::kSteps && has_next) {
          load_scales(stage, 0);
        }
        wgmma_wait_group<1>();
        if (step + 1 < C::kSteps || has_next) load_meta(stage, (step + 1) % C::kSteps);
        if (step == 0 && previous >= 0 && lane == 0) mbarrier_arrive(empty + 8 * previous);
      }
      previous = current;
    }
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(empty + 8 * previous);

    if constexpr (C::kSplits > 1) {  // the first split gets the sums of the others
      float4* swap = reinterpret_cast<float4*>(staging);
      constexpr int kQuads = C::kSwapSums / 4, kSwapBarrier = 2 + C::kRowGroups;
      const int thread = threadIdx.x % C::kStorers;
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
        for (int first = 0; first < C::kSums; first += C::kSwapSums) {
          bar_sync(kSwapBarrier, C::kConsumers);  // the last reads of staging are over
          if (split > 0) {
#pragma unroll
            for (int j = 0; j < kQuads; ++j) {
              const float* s = sum[i] + first + 4 * j;
              swap[((split - 1) * kQuads + j) * C::kStorers + thread] =
                  make_float4(s[0], s[1], s[2], s[3]);
            }
          }
          bar_sync(kSwapBarrier, C::kConsumers);
          if (split == 0) {
#pragma unroll
            for (int other = 0; other < C::kSplits - 1; ++other) {
#pragma unroll
              for (int j = 0; j < kQuads; ++j) {
                const float4 v = swap[(other * kQuads + j) * C::kStorers + thread];
                float* s = sum[i] + first + 4 * j;
                s[0] += v.x;
                s[1] += v.y;
                s[2] += v.z;
                s[3] += v.w;
              }
            }
          }
        }
      }
      if (split > 0) continue;
    }
    float (&flat)[C::kBlocks * C::kSums] = reinterpret_cast<float (&)[C::kBlocks * C::kSums]>(sum);
    if (!add_partial_sums<C::kStorers>(work, p.partials, p.flags, threadIdx.x, flat)) continue;

    // y: the rows of a row group x kStagedTokens at a time, transposed through shared memory, where a
    // piece of 16 bytes has the 8 rows g of one word and half.
    constexpr int kRowBytes = 128 * C::kBlocks, kPieces = 8 * C::kBlocks;
    uint8_t* out = staging + row_group * kRowBytes * C::kStagedTokens;
    const T* bias = static_cast<const T*>(p.bias);
    T* y = static_cast<T*>(p.y);
    const bool in_vectors = p.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
    const int thread = threadIdx.x % 128;
    const int n_group = n0 + row_group * 64 * C::kBlocks;
    float bias_of[C::kBlocks][2];
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = n0 + first_row / 64 * 64 + marlin_row<C::kSparse>(first_word + i, g, half);
        bias_of[i][half] = bias != nullptr && n < p.N ? as_float(bias[n]) : 0.f;
      }
    }
#pragma unroll
    for (int first = 0; first < C::kTokens; first += C::kStagedTokens) {
      bar_sync(2 + row_group, 128);  // the last reads of `out` are over
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < C::kStagedTokens; j += 16) {
          uint32_t packed[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float* s = sum[i] + (first + j) / 2 + q * 2;
            packed[q] = bits_of_pair(typename HalfFormat<T>::Pair{
                from_float<T>(s[0] + bias_of[i][q % 2]), from_float<T>(s[1] + bias_of[i][q % 2])});
          }
          const int token = j + lane / 16 * 8 + lane % 8;
          const int piece = (warp * C::kBlocks + i) * 2 + lane / 8 % 2;
          stmatrix_x4_trans(shared_address(out + token * kRowBytes + ((piece ^ (token & 7)) * 16)),
                            packed[0], packed[1], packed[2], packed[3]);
        }
      }
      bar_sync(2 + row_group, 128);
      const int piece = thread % kPieces, n = n_group + piece * 8;
      if (n < p.N) {
#pragma unroll 4
        for (int token = thread / kPieces; token < C::kStagedTokens; token += 128 / kPieces) {
          const int m = m0 + first + token;
          if (m >= p.M) break;
          const uint8_t* row = out + token * kRowBytes;
          Elems<T, 8> values;
          if constexpr (C::kSparse) {  // 8 rows of one g
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int from = piece / 8 * 8 + i % 4 * 2 + i / 4;
              values.values[i] =
                  *reinterpret_cast<const T*>(row + ((from ^ (token & 7)) * 16) + piece % 8 * 2);
            }
          } else {
            values = *reinterpret_cast<const Elems<T, 8>*>(row + ((piece ^ (token & 7)) * 16));
          }
          T* to = y + int64_t{m} * p.N + n;
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
    }
  }
#else
  __trap();  // compiled for another architecture than sm_90a
#endif
}

template <typename C>
TilePlan marlin_plan(const MatmulMarlinArgs& args, int n_multiprocessors) {
  return plan_tiles(args.M, args.N, args.K, C::kTokens, C::kRows, C::kStageK, n_multiprocessors);
}

template <typename T, typename C, MarlinScales kScales>
cudaError_t launch_marlin_config(const MatmulMarlinArgs& args, void* scratch, int n_multiprocessors,
                                 cudaStream_t stream) {
  constexpr bool kHasZero = kScales == MarlinScales::kZeros;
  const int64_t padded_n = (args.N + 63) / 64 * 64, n_groups = args.K / args.group_size;
  MarlinParams p = {};
  p.plan = marlin_plan<C>(args, n_multiprocessors);
  p.bias = args.bias;
  p.y = args.y;
  p.flags = static_cast<uint64_t*>(scratch);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + kFlagBytes);
  p.scale_dtype = args.scale_dtype;
  p.zero_point_dtype = args.zero_point_dtype;
  p.M = static_cast<int>(args.M);
  p.N = static_cast<int>(args.N);
  p.group_size = args.group_size;
  p.constant_weights = args.constant_weights;
  p.is_one_group = n_groups == 1;
  p.stage_groups = args.group_size < C::kStageK && n_groups > 1 ? C::kStageK / args.group_size : 1;
  while (C::kTiles >> p.tiles_per_group_log2 > p.stage_groups) ++p.tiles_per_group_log2;
  const auto element_bytes = [](DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; };
  p.scale_bytes = C::kRows * element_bytes(args.scale_dtype);
  p.zero_bytes = kHasZero ? C::kRows * element_bytes(args.zero_point_dtype) : 0;
  const int stage_bytes = (C::kXBytes + C::kQBytes + C::kMetaBytes +
                           p.stage_groups * (p.scale_bytes + p.zero_bytes) + 1023) &
                          ~1023;
  constexpr int kOtherBytes = 1024 + C::kStagingBytes;
  p.n_ring = std::min((kSharedLimit - kOtherBytes) / (stage_bytes + 16), 16);
  if (p.n_ring < 2) return cudaErrorInvalidValue;
  const int shared = kOtherBytes + p.n_ring * (stage_bytes + 16);

  CUtensorMap x_map, q_map, meta_map = {}, scale_map, zero_map = {};
  const auto group_map = [&](CUtensorMap* map, const void* data, DType dtype) {
    const int bytes = element_bytes(dtype);
    return encode_matrix(
        map, data, bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
        bytes, n_groups, padded_n * bytes, p.stage_groups, C::kBoxRows * bytes,
        CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  if (!encode_tokens(&x_map, args.x, args.dtype, args.M, args.K, C::kTokens) ||
      !encode_matrix(&q_map, args.qdata, CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, args.K / C::kTileK,
                     padded_n * 8, C::kTiles, C::kBoxRows * 8, CU_TENSOR_MAP_SWIZZLE_NONE) ||
      (C::kSparse &&
       !encode_matrix(&meta_map, args.meta, CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, args.K / 32,
                      padded_n * 4, C::kTiles, C::kBoxRows * 4, CU_TENSOR_MAP_SWIZZLE_NONE)) ||
      !group_map(&scale_map, args.scale, args.scale_dtype) ||
      (kHasZero && !group_map(&zero_map, args.zero_point, args.zero_point_dtype))) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = matmul_marlin_wgmma_kernel<T, C, kScales>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  // A dependent launch that has to wait for the weights as well: 35 us for 29, plain.
  if (!args.constant_weights) {
    kernel<<<p.plan.grid, C::kThreads, shared, stream>>>(x_map, q_map, meta_map, scale_map,
                                                         zero_map, p);
    return cudaGetLastError();
  }
  return launch_dependent(kernel, p.plan.grid, C::kThreads, shared, stream, x_map, q_map, meta_map,
                          scale_map, zero_map, p);
}

template <typename T, typename C>
cudaError_t launch_marlin_scales(const MatmulMarlinArgs& args, void* scratch, int n_multiprocessors,
                                 cudaStream_t stream) {
  if constexpr (!C::kSparse) {
    if (args.zero_point != nullptr) {
      return launch_marlin_config<T, C, MarlinScales::kZeros>(args, scratch, n_multiprocessors,
                                                              stream);
    }
  }
  if constexpr (C::kTokens < 256) {
    if (args.scale_dtype != args.dtype || args.K == args.group_size) {
      return launch_marlin_config<T, C, MarlinScales::kAny>(args, scratch, n_multiprocessors,
                                                            stream);
    }
    return args.group_size >= C::kStageK ? launch_marlin_config<T, C, MarlinScales::kOneAStage>(
                                               args, scratch, n_multiprocessors, stream)
                                         : launch_marlin_config<T, C, MarlinScales::kSimple>(
                                               args, scratch, n_multiprocessors, stream);
  } else {
    return cudaErrorInvalidValue;  // with_config has these tiles for zero points only
  }
}

}  // namespace cuda_int4
