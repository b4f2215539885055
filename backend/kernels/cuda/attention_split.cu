// attention_split -- y = softmax(q @ k.T * scale + mask) @ v for few queries on a long cache
//
//   operand  dtype           shape             order in memory                           align
//   q, k, v  f16 | bf16      [B, H, S|T, D]    last dimension contiguous, strides % 8    16 B
//   mask     bool | of q     [B, Hq, S, T]     any strides, 0 where broadcast            dtype
//   y (out)  dtype of q      [B, Hq, S, D]     contiguous                                16 B
//   scratch  f32             sums [B*Hq*S, n_splits, D], then (top, sum) [B*Hq*S, n_splits, 2]
//
// Requires  D % 8 == 0, D <= 512, S <= kMaxQueries   (checked by fits_attention_split)
// Grid      (item, split) blocks of (32, n_warps) threads; an item is kRows query rows of one key
//           head (b, hkv), counted over all the query heads that share it. Warp w of split i takes the
//           16-key tiles (n * n_splits + i) * n_warps + w: any stretch of keys is spread over all
//           warps. A second kernel adds the splits up, one block to a row.
// Bytes     keys and values once per item. The mask of a tile is looked at first: keys that no row of
//           the item sees are not read, so a cache costs what is seen of it
// Numerics  scores, softmax and sums in fp32; exp(score - top) is rounded to the dtype for the
//           product with v; the order of additions is fixed. A row that sees nothing is 0. Keys that
//           no row of the item sees have no effect, whatever lies there
// Source    flash-decoding (Dao et al., 2023); own. Transposed products, scores [keys, rows] =
//           k @ q.T and y.T = v.T @ p.T, let 8 rows fill a tensor core instruction where the usual
//           order wants 16, and halve the registers of the sums: 8 rows of D = 512 fit one warp
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.cuh"
#include "attention_parts.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kTileKeys = 16;    // mma_m of the scores, mma_k of the sums
constexpr int kStages = 3;       // tiles of a warp in flight or in use
constexpr int kChunkTiles = 32;  // tiles whose mask is looked at together, one to a lane
constexpr int kMaxQueries = 32;
constexpr int kMaxWarps = 4;
constexpr int kMaxSplits = 256;
constexpr int kCombineThreads = 256;

struct SplitPlan {
  int n_splits, n_row_blocks, n_warps;
  float* sums;    // [B*Hq*S, n_splits, D]
  float2* stats;  // [B*Hq*S, n_splits]: top in units of log2, sum of exp2(score - top)
};

struct RowMask {       // of one query row
  const void* values;  // key 0 of its mask; nullptr without one
  int bits_row;        // whose bits are its own
};

// One warp's shared memory, and the block's queries.
template <int kD, int kRows>
struct SplitShared {
  static constexpr int kPitch = kD + 8;  // elements; rows fall on different banks for ldmatrix
  static constexpr int kTileElems = kTileKeys * kPitch;
  static constexpr int kQueryBytes = kRows * kPitch * 2;
  static constexpr int kTableBytes = kRows * sizeof(RowMask);
  static constexpr int kRingBytes = kStages * 2 * kTileElems * 2;
  static constexpr int kBitsBytes = kChunkTiles * kMaxQueries * 2;
  static constexpr int kWarpBytes = kRingBytes + kBitsBytes;
  static constexpr int kBlockBytes = kQueryBytes + kTableBytes;  // and kWarpBytes a warp
  static constexpr int kSumPitch = kD + 4;  // floats, for the sums that take the ring's place
  static_assert(kRows <= kMaxQueries, "the bits of every row have a place");
  static_assert(kRows * kSumPitch * 4 <= kRingBytes, "the sums fit where the tiles were");
};

// Which mask row a query row reads: 0 for all, s, or the row's own number in its block.
struct MaskRows {
  int count;
  bool by_query, by_row;

  __device__ MaskRows(const AttentionKernelArgs& p, int n_rows) {
    by_row = p.mask != nullptr && p.mask_strides[1] != 0;
    by_query = !by_row && p.S > 1 && (p.is_causal || (p.mask != nullptr && p.mask_strides[2] != 0));
    count = by_row ? n_rows : by_query ? static_cast<int>(p.S) : 1;
  }
  __device__ int of(int row_in_block, int s) const {
    return by_row ? row_in_block : by_query ? s : 0;
  }
};

// 16 keys and values from k and v on; those whose bit is 0 become zeros and are not read. A lane
// keeps its place d within rows and goes down them.
template <typename T, int kD>
__device__ __forceinline__ void load_tile(const T* k, const T* v, int64_t k_stride,
                                          int64_t v_stride, int D, uint32_t bits, uint32_t tile) {
  using Shared = SplitShared<kD, 8>;
  constexpr int kLanesPerRow = kD / 8 < 32 ? kD / 8 : 32;  // 16 bytes each
  constexpr int kKeysPerStep = 32 / kLanesPerRow;
  const int first_key = threadIdx.x / kLanesPerRow, d = threadIdx.x % kLanesPerRow * 8;
  k += first_key * k_stride + d;
  v += first_key * v_stride + d;
  bits >>= first_key;
  tile += (first_key * Shared::kPitch + d) * 2;
#pragma unroll
  for (int key = 0; key < kTileKeys; key += kKeysPerStep) {
#pragma unroll
    for (int more = 0; more < kD; more += kLanesPerRow * 8) {
      const bool copy = (bits >> key & 1) != 0 && d + more < D;
      const uint32_t to = tile + (key * Shared::kPitch + more) * 2;
      cp_async_16_or_zero(to, k + more, copy);
      cp_async_16_or_zero(to + Shared::kTileElems * 2, v + more, copy);
    }
    k += kKeysPerStep * k_stride;
    v += kKeysPerStep * v_stride;
  }
}

// scores[keys g, g + 8][rows 8n + 2c, 8n + 2c + 1] of lane (g, c) = (lane / 4, lane % 4).
template <typename T, int kD, int kRowTiles>
__device__ __forceinline__ void mma_scores(uint32_t k_tile, uint32_t queries,
                                           float (&scores)[kRowTiles][4]) {
  using Shared = SplitShared<kD, 8 * kRowTiles>;
  const int lane = threadIdx.x;
  const uint32_t k_at = k_tile + (lane % 16 * Shared::kPitch + lane / 16 * 8) * 2;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
  }
  if constexpr (kRowTiles == 1) {  // two sums, so that one product does not wait for the last
    const uint32_t q_at = queries + (lane % 8 * Shared::kPitch + lane / 8 * 8) * 2;
    float odd[4] = {};
#pragma unroll
    for (int d = 0; d < kD; d += 32) {
      uint32_t k0[4], k1[4], q[4];
      ldmatrix_x4(q, q_at + d * 2);
      ldmatrix_x4(k0, k_at + d * 2);
      ldmatrix_x4(k1, k_at + d * 2 + 32);
      mma_m16n8k16(scores[0], k0, {q[0], q[1]}, T{});
      mma_m16n8k16(odd, k1, {q[2], q[3]}, T{});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][i] += odd[i];
  } else {
    const uint32_t q_at =
        queries + ((lane % 8 + lane / 16 * 8) * Shared::kPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int d = 0; d < kD; d += 16) {
      uint32_t k[4];
      ldmatrix_x4(k, k_at + d * 2);
#pragma unroll
      for (int n = 0; n < kRowTiles; n += 2) {
        uint32_t q[4];
        ldmatrix_x4(q, q_at + (n * 8 * Shared::kPitch + d) * 2);
        mma_m16n8k16(scores[n], k, {q[0], q[1]}, T{});
        mma_m16n8k16(scores[n + 1], k, {q[2], q[3]}, T{});
      }
    }
  }
}

// sums[d = 16m + g, g + 8][rows] += v.T @ p.T
template <typename T, int kD, int kRowTiles>
__device__ __forceinline__ void mma_sums(uint32_t v_tile, const uint32_t (&p)[kRowTiles][2],
                                         float (&sums)[kRowTiles][kD / 16][4]) {
  using Shared = SplitShared<kD, 8 * kRowTiles>;
  const int lane = threadIdx.x;
  const uint32_t v_at =
      v_tile + ((lane % 8 + lane / 16 * 8) * Shared::kPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int m = 0; m < kD / 16; ++m) {
    uint32_t v[4];
    ldmatrix_x4_trans(v, v_at + m * 32);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) mma_m16n8k16(sums[n][m], v, p[n], T{});
  }
}

__device__ __forceinline__ float max_over_keys(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__device__ __forceinline__ float sum_over_keys(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sums of the block's warps, rescaled to the highest top, to scratch or, with one split, to y.
template <typename T, int kD, int kRows>
__device__ void merge_warps(const AttentionKernelArgs& p, const SplitPlan& plan, char* warps,
                            int64_t first_row, int n_rows, int split) {
  using Shared = SplitShared<kD, kRows>;
  constexpr int kVectors = kD / 4;
  const int n_warps = blockDim.y, D = static_cast<int>(p.D);
  for (int i = threadIdx.y * 32 + threadIdx.x; i < n_rows * kVectors; i += n_warps * 32) {
    const int row = i / kVectors, d = i % kVectors * 4;
    float top = -INFINITY, sum_p = 0.f, total[4] = {};
    for (int w = 0; w < n_warps; ++w) {
      const auto* stats =
          reinterpret_cast<const float2*>(warps + w * Shared::kWarpBytes + Shared::kRingBytes);
      top = fmaxf(top, stats[row].x);
    }
    for (int w = 0; w < n_warps; ++w) {
      const char* warp = warps + w * Shared::kWarpBytes;
      const float2 stats = reinterpret_cast<const float2*>(warp + Shared::kRingBytes)[row];
      if (stats.y == 0.f) continue;  // that warp saw nothing
      const float weight = ex2_approx(stats.x - (top == -INFINITY ? 0.f : top));
      const float4 sums =
          *reinterpret_cast<const float4*>(warp + (row * Shared::kSumPitch + d) * 4);
      sum_p += weight * stats.y;
      total[0] += weight * sums.x;
      total[1] += weight * sums.y;
      total[2] += weight * sums.z;
      total[3] += weight * sums.w;
    }
    if (plan.n_splits == 1) {
      const float factor = sum_p == 0.f ? 0.f : 1.f / sum_p;
      if (d < D) {
        const uint2 out = {pack_pair<T>(total[0] * factor, total[1] * factor),
                           pack_pair<T>(total[2] * factor, total[3] * factor)};
        *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + (first_row + row) * D + d) = out;
      }
    } else {
      const int64_t at = (first_row + row) * plan.n_splits + split;
      if (d == 0) plan.stats[at] = {top, sum_p};
      if (d < D && sum_p != 0.f) {
        *reinterpret_cast<float4*>(plan.sums + at * D + d) = {total[0], total[1], total[2],
                                                              total[3]};
      }
    }
  }
}

template <typename T, int kD, int kRowTiles>
__global__ void __launch_bounds__(32 * kMaxWarps)
    attention_split_kernel(AttentionKernelArgs p, SplitPlan plan) {
  constexpr int kRows = 8 * kRowTiles;
  using Shared = SplitShared<kD, kRows>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x, warp = threadIdx.y, n_warps = blockDim.y;
  const int S = static_cast<int>(p.S), D = static_cast<int>(p.D);
  const int split = static_cast<int>(blockIdx.x) % plan.n_splits;
  const int item = static_cast<int>(blockIdx.x) / plan.n_splits;
  const int row_begin = item % plan.n_row_blocks * kRows;  // among the rows of (b, h_kv)
  const int b_h = item / plan.n_row_blocks;
  const int h_kv = b_h % static_cast<int>(p.Hkv), b = b_h / static_cast<int>(p.Hkv);
  const int rep = static_cast<int>(p.Hq / p.Hkv);
  const int n_rows = min(kRows, rep * S - row_begin);

  char* warps = shared + Shared::kQueryBytes + Shared::kTableBytes;
  char* own = warps + warp * Shared::kWarpBytes;
  const uint32_t queries = shared_address(shared), ring = shared_address(own);
  auto* row_table = reinterpret_cast<RowMask*>(shared + Shared::kQueryBytes);
  auto* bits = reinterpret_cast<uint16_t*>(own + Shared::kRingBytes);  // [kChunkTiles][mask rows]

  for (int i = warp * 32 + lane; i < kRows * (kD / 8); i += n_warps * 32) {
    const int row = i / (kD / 8), d = i % (kD / 8) * 8, r = row_begin + row;
    const bool copy = row < n_rows && d < D;
    const T* q = static_cast<const T*>(p.q);
    if (copy)
      q += b * p.q_strides[0] + (h_kv * rep + r / S) * p.q_strides[1] + r % S * p.q_strides[2] + d;
    cp_async_16_or_zero(queries + (row * Shared::kPitch + d) * 2, q, copy);
  }
  cp_async_commit();

  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1];
  const MaskRows mask_rows(p, n_rows);
  const bool adds_mask = p.mask != nullptr && !p.mask_is_bool;
  const float scale = p.scale * kLog2E;

  if (warp == 0 && lane < kRows) {
    const int r = row_begin + min(lane, n_rows - 1);
    row_table[lane] = {find_mask_row<T>(p, b, h_kv * rep + r / S, r % S),
                       mask_rows.of(min(lane, n_rows - 1), r % S)};
  }

  // Of this lane's two rows in each row tile:
  float top[kRowTiles][2], sum_p[kRowTiles][2], sums[kRowTiles][kD / 16][4];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[n][i] = -INFINITY;
      sum_p[n][i] = 0.f;
    }
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][m][i] = 0.f;
    }
  }

  const int64_t end = p.is_causal && p.S < p.T ? p.S : p.T;
  const int64_t n_tiles = (end + kTileKeys - 1) / kTileKeys;
  const int64_t tile_step = int64_t{plan.n_splits} * n_warps;
  int64_t first_tile = int64_t{split} * n_warps + warp;
  bool is_first_chunk = true;
  do {
    // Lane i looks at tile i of the chunk.
    const int64_t own_tile = first_tile + lane * tile_step;
    uint32_t any_row = 0;
    if (own_tile < n_tiles) {
      for (int u = 0; u < mask_rows.count; ++u) {
        const int r = row_begin + u;  // only where each row has its own mask
        const int s = mask_rows.by_row ? r % S : mask_rows.by_query ? u : 0;
        const int h = h_kv * rep + (mask_rows.by_row ? r / S : 0);
        const uint32_t seen =
            seen_keys<T, kTileKeys>(p, find_mask_row<T>(p, b, h, s), s, own_tile * kTileKeys);
        bits[lane * mask_rows.count + u] = static_cast<uint16_t>(seen);
        any_row |= seen;
      }
    }
    __syncwarp();
    uint32_t to_do = __ballot_sync(0xffffffffu, any_row != 0), to_load = to_do;
    const auto load_next = [&](int stage) {
      if (to_load != 0) {
        const int i = __ffs(static_cast<int>(to_load)) - 1;
        to_load &= to_load - 1;
        const int64_t t0 = (first_tile + i * tile_step) * kTileKeys;
        load_tile<T, kD>(k + t0 * p.k_strides[2], v + t0 * p.v_strides[2], p.k_strides[2],
                         p.v_strides[2], D, __shfl_sync(0xffffffffu, any_row, i),
                         ring + stage * 2 * Shared::kTileElems * 2);
      }
      cp_async_commit();  // an empty group too: the count of groups is the count of calls
    };
    for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);
    if (is_first_chunk) {
      cp_async_wait<kStages - 1>();  // the queries
      __syncthreads();
      is_first_chunk = false;
    }
    for (int stage = 0; to_do != 0; stage = stage == kStages - 1 ? 0 : stage + 1) {
      const int i = __ffs(static_cast<int>(to_do)) - 1;
      to_do &= to_do - 1;
      load_next(stage == 0 ? kStages - 1 : stage - 1);  // where the last tile was
      const int64_t t0 = (first_tile + i * tile_step) * kTileKeys;
      float added[kRowTiles][4] = {};
      uint32_t seen[kRowTiles][2];
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const RowMask row_mask = row_table[8 * n + lane % 4 * 2 + j];
          seen[n][j] = bits[i * mask_rows.count + row_mask.bits_row] >> (lane / 4);
          if (adds_mask) {
            const T* row = static_cast<const T*>(row_mask.values);
            const int64_t t = t0 + lane / 4;
            if ((seen[n][j] & 1) != 0) added[n][j] = as_float(row[t * p.mask_strides[3]]) * kLog2E;
            if ((seen[n][j] & 0x100) != 0) {
              added[n][2 + j] = as_float(row[(t + 8) * p.mask_strides[3]]) * kLog2E;
            }
          }
        }
      }
      cp_async_wait<kStages - 1>();
      __syncwarp();

      const uint32_t k_tile = ring + stage * 2 * Shared::kTileElems * 2;
      float scores[kRowTiles][4];
      mma_scores<T, kD, kRowTiles>(k_tile, queries, scores);
      uint32_t probabilities[kRowTiles][2];
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        float rescale[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* score = &scores[n][j];  // [0] at key g, [2] at key g + 8
          score[0] = (seen[n][j] & 1) != 0 ? score[0] * scale + added[n][j] : -INFINITY;
          score[2] = (seen[n][j] & 0x100) != 0 ? score[2] * scale + added[n][2 + j] : -INFINITY;
          const float new_top = max_over_keys(fmaxf(top[n][j], fmaxf(score[0], score[2])));
          const float reference = new_top == -INFINITY ? 0.f : new_top;  // not inf - inf
          rescale[j] = ex2_approx(top[n][j] - reference);
          top[n][j] = new_top;
          score[0] = ex2_approx(score[0] - reference);
          score[2] = ex2_approx(score[2] - reference);
          sum_p[n][j] = sum_p[n][j] * rescale[j] + score[0] + score[2];
        }
        if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
          for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[n][m][j] *= rescale[j % 2];
          }
        }
        probabilities[n][0] = movmatrix_trans(pack_pair<T>(scores[n][0], scores[n][1]));
        probabilities[n][1] = movmatrix_trans(pack_pair<T>(scores[n][2], scores[n][3]));
      }
      mma_sums<T, kD, kRowTiles>(k_tile + Shared::kTileElems * 2, probabilities, sums);
      __syncwarp();  // the next turn loads over this tile
    }
    first_tile += kChunkTiles * tile_step;
  } while (first_tile < n_tiles);
  cp_async_wait<0>();
  __syncwarp();

  auto* own_sums = reinterpret_cast<float*>(own);
  auto* own_stats = reinterpret_cast<float2*>(own + Shared::kRingBytes);
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float total = sum_over_keys(sum_p[n][j]);
      const int row = 8 * n + lane % 4 * 2 + j;
      if (lane < 4) own_stats[row] = {top[n][j], total};
#pragma unroll
      for (int m = 0; m < kD / 16; ++m) {
        own_sums[row * Shared::kSumPitch + 16 * m + lane / 4] = sums[n][m][j];
        own_sums[row * Shared::kSumPitch + 16 * m + lane / 4 + 8] = sums[n][m][2 + j];
      }
    }
  }
  __syncthreads();
  merge_warps<T, kD, kRows>(p, plan, warps, int64_t{b_h} * rep * S + row_begin, n_rows, split);
}

// y of one row from its splits.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    attention_split_combine(AttentionKernelArgs p, SplitPlan plan) {
  __shared__ float weights[kMaxSplits];
  __shared__ float partial[kCombineThreads / 32];
  __shared__ float4 group_sums[kCombineThreads];
  const int tid = threadIdx.x, D = static_cast<int>(p.D), n_splits = plan.n_splits;
  const int64_t row = blockIdx.x;

  const float2 stats =
      tid < n_splits ? plan.stats[row * n_splits + tid] : make_float2(-INFINITY, 0.f);
  float top = warp_max(stats.y != 0.f ? stats.x : -INFINITY);
  if (tid % 32 == 0) partial[tid / 32] = top;
  __syncthreads();
  top = warp_max(partial[tid % (kCombineThreads / 32)]);
  const float weight = stats.y != 0.f ? ex2_approx(stats.x - (top == -INFINITY ? 0.f : top)) : 0.f;
  weights[tid] = weight;
  const float share = warp_sum(weight * stats.y);
  __syncthreads();
  if (tid % 32 == 0) partial[tid / 32] = share;

  const int n_vectors = D / 4, n_groups = min(kCombineThreads / n_vectors, n_splits);
  const int group = tid / n_vectors, d = tid % n_vectors * 4;
  float4 total = {};
  if (group < n_groups) {
#pragma unroll 4
    for (int split = group; split < n_splits; split += n_groups) {
      if (weights[split] == 0.f) continue;  // nothing was written there
      const float4 sums =
          *reinterpret_cast<const float4*>(plan.sums + (row * n_splits + split) * D + d);
      total.x += weights[split] * sums.x;
      total.y += weights[split] * sums.y;
      total.z += weights[split] * sums.z;
      total.w += weights[split] * sums.w;
    }
    group_sums[tid] = total;
  }
  __syncthreads();
  if (tid >= n_vectors) return;
  float sum_p = 0.f;
#pragma unroll
  for (int w = 0; w < kCombineThreads / 32; ++w) sum_p += partial[w];
  for (int g = 1; g < n_groups; ++g) {
    const float4 sums = group_sums[g * n_vectors + tid];
    total.x += sums.x;
    total.y += sums.y;
    total.z += sums.z;
    total.w += sums.w;
  }
  const float factor = sum_p == 0.f ? 0.f : 1.f / sum_p;
  const uint2 out = {pack_pair<T>(total.x * factor, total.y * factor),
                     pack_pair<T>(total.z * factor, total.w * factor)};
  *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + row * D + d) = out;
}

// ---- host ----

// Query rows of an item for these sizes: more rows a pass where there are many, as registers allow.
int choose_row_tiles(const AttentionKernelArgs& args) {
  const int64_t rows = args.Hq / args.Hkv * args.S;
  if (rows <= 8 || args.D > 256) return 1;
  return args.D > 128 ? 2 : 4;
}

template <int kD, int kRowTiles>
SplitPlan make_plan_of(const AttentionKernelArgs& args) {
  using Shared = SplitShared<kD, 8 * kRowTiles>;
  SplitPlan plan = {};
  const int per_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int n_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  // Two blocks to a multiprocessor where they fit; 1 KB of each is the driver's.
  const int half = per_sm / 2 - 1024 < per_block ? per_sm / 2 - 1024 : per_block;
  int n_warps = (half - Shared::kBlockBytes) / Shared::kWarpBytes;
  int blocks_per_sm = 2;
  if (n_warps < 1) {
    n_warps = (per_block - Shared::kBlockBytes) / Shared::kWarpBytes;
    blocks_per_sm = 1;
  }
  if (n_warps < 1) return plan;
  plan.n_warps = n_warps < kMaxWarps ? n_warps : kMaxWarps;
  const int64_t rows = args.Hq / args.Hkv * args.S, kRows = 8 * kRowTiles;
  const int64_t n_row_blocks = (rows + kRows - 1) / kRows;
  const int64_t n_items = args.B * args.Hkv * n_row_blocks;
  const int64_t block_keys = kTileKeys * plan.n_warps;
  int64_t n_splits = int64_t{blocks_per_sm} * n_sms / n_items;
  const int64_t most = (args.T + block_keys - 1) / block_keys;
  if (n_splits > most) n_splits = most;
  if (n_splits > kMaxSplits) n_splits = kMaxSplits;
  plan.n_splits = n_splits < 1 ? 1 : static_cast<int>(n_splits);
  plan.n_row_blocks = static_cast<int>(n_row_blocks);
  return plan;
}

template <typename T, int kD, int kRowTiles>
cudaError_t launch(const AttentionKernelArgs& args, const SplitPlan& plan, cudaStream_t stream) {
  using Shared = SplitShared<kD, 8 * kRowTiles>;
  const int shared_bytes = Shared::kBlockBytes + plan.n_warps * Shared::kWarpBytes;
  const auto kernel = attention_split_kernel<T, kD, kRowTiles>;
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (code != cudaSuccess) return code;
  const int64_t n_blocks = args.B * args.Hkv * plan.n_row_blocks * plan.n_splits;
  kernel<<<static_cast<unsigned>(n_blocks), dim3(32, plan.n_warps), shared_bytes, stream>>>(args,
                                                                                            plan);
  if (plan.n_splits > 1) {
    const int64_t n_rows = args.B * args.Hq * args.S;
    attention_split_combine<T>
        <<<static_cast<unsigned>(n_rows), kCombineThreads, 0, stream>>>(args, plan);
  }
  return cudaGetLastError();
}

// f(Size<kD>, Size<kRowTiles>) for the smallest kD that holds D.
template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

template <typename F>
auto with_sizes(const AttentionKernelArgs& args, F f) {
  const int row_tiles = choose_row_tiles(args);
  if (args.D <= 64) return row_tiles == 1 ? f(Size<64>{}, Size<1>{}) : f(Size<64>{}, Size<4>{});
  if (args.D <= 128) return row_tiles == 1 ? f(Size<128>{}, Size<1>{}) : f(Size<128>{}, Size<4>{});
  if (args.D <= 256) return row_tiles == 1 ? f(Size<256>{}, Size<1>{}) : f(Size<256>{}, Size<2>{});
  return f(Size<512>{}, Size<1>{});
}

SplitPlan make_plan(const AttentionKernelArgs& args) {
  return with_sizes(args, [&](auto d, auto row_tiles) {
    return make_plan_of<decltype(d)::value, decltype(row_tiles)::value>(args);
  });
}

uint64_t sums_bytes(const AttentionKernelArgs& args, const SplitPlan& plan) {
  return static_cast<uint64_t>(args.B * args.Hq * args.S * args.D) * plan.n_splits * sizeof(float);
}

template <typename T>
cudaError_t choose_sizes(const AttentionKernelArgs& args, const SplitPlan& plan,
                         cudaStream_t stream) {
  return with_sizes(args, [&](auto d, auto row_tiles) {
    return launch<T, decltype(d)::value, decltype(row_tiles)::value>(args, plan, stream);
  });
}

}  // namespace

bool fits_attention_split(const AttentionKernelArgs& args) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  return args.S <= kMaxQueries && is_tensor_core_ready(args) &&
         args.B * args.Hq * args.S <= kMaxBlocks && make_plan(args).n_warps > 0;
}

uint64_t attention_split_scratch_bytes(const AttentionKernelArgs& args) {
  const SplitPlan plan = make_plan(args);
  if (plan.n_splits == 1) return 0;
  return sums_bytes(args, plan) +
         static_cast<uint64_t>(args.B * args.Hq * args.S) * plan.n_splits * sizeof(float2);
}

cudaError_t launch_attention_split(const AttentionKernelArgs& args, cudaStream_t stream) {
  SplitPlan plan = make_plan(args);
  plan.sums = static_cast<float*>(args.scratch);
  plan.stats = reinterpret_cast<float2*>(static_cast<char*>(args.scratch) + sums_bytes(args, plan));
  if (args.dtype == DType::kFloat16) return choose_sizes<__half>(args, plan, stream);
  return choose_sizes<__nv_bfloat16>(args, plan, stream);
}

}  // namespace cuda_int4
