// attention_split -- y = softmax(cap(q @ k.T * scale) + mask) @ v for few queries on a long cache
//
//   operand  dtype           shape             order in memory                           align
//   q, k, v  f16 | bf16      [B, H, S|T, D]    last dimension contiguous, strides % 8    16 B
//   mask     bool | of q     [B, Hq, S, T]     any strides, 0 where broadcast            dtype
//   input_pos  i32 | i64     [S] | [B, S]      contiguous; in the place of a mask        dtype
//   y (out)  dtype of q      [B, Hq, S, D]     strides % 8                               16 B
//   scratch  f32             sums [B*Hq*S, n_splits, D], then (top, sum) [B*Hq*S, n_splits, 2]
//
// Requires  D % 8 == 0, D <= 512, S <= kMaxQueries   (checked by fits_attention_split)
// Grid      (item, split) blocks of up to 4 warps; an item is kRows query rows of one key head
//           (b, hkv), counted over all the query heads that share it. A group of kParts warps takes
//           16-key tiles, each warp 128 columns of them: tile n_groups * split + group, and so on
//           in steps of all groups, so that any stretch of keys is spread over the machine. A
//           second kernel adds the splits up. Both are launched as dependents
// Bytes     keys and values once per item. The mask of a tile is looked at first: keys that no row
//           of the item sees are not read, so a cache costs what is seen of it
// Numerics  scores, softmax and sums in fp32; exp(score - top) is rounded to the dtype for the
//           product with v; the order of additions is fixed. A row that sees nothing is 0. Keys
//           that no row of the item sees have no effect, whatever lies there
// Source    flash-decoding (Dao et al., 2023); own
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.cuh"
#include "attention_parts.cuh"
#include "attention_split.cuh"
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kStages = 3;         // tiles of a warp in flight or in use
constexpr int kMaxWarps = 4;       // of a block
constexpr int kMaxQueries = 32;    // S
constexpr int kMaskEntries = 256;  // (tile, mask row) pairs whose bits a warp holds
constexpr int kMaxSplits = 128;
constexpr int kCombineWarps = 8;
constexpr int kCombineColumns = 128;  // of a block: 4 to a lane

struct SplitPlan {
  int n_splits, n_row_blocks, n_groups;
  float* sums;    // [B*Hq*S, n_splits, D]
  float2* stats;  // [B*Hq*S, n_splits]: top in units of log2, sum of exp2(score - top)
};

struct RowMask {       // of one query row
  const void* values;  // key 0 of its mask; nullptr without one
  int bits_row;        // whose bits are its own
};

// Shared memory: the queries, a table of masks, what warps tell each other, and the tiles, bits and
// at last the sums of each warp.
template <int kD_, int kRowTiles_>
struct SplitShape {
  static constexpr int kD = kD_, kRowTiles = kRowTiles_, kRows = 8 * kRowTiles;
  static constexpr int kParts = kD <= 128 ? 1 : kD / 128;  // warps that share a tile
  static constexpr int kColumns = kD / kParts;             // of each
  static constexpr int kQueryPitch = kD + 8;  // elements; rows fall on different banks for ldmatrix
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kTileElems = kTileKeys * kPitch;
  static constexpr int kSumPitch = kColumns + 4;         // floats
  static constexpr bool kHoldsQueries = kRowTiles == 1;  // in registers
  static constexpr int kQueryBytes = kRows * kQueryPitch * 2;
  // Scores of a group's warps, twice for each group; they take the queries' place where those are
  // in registers.
  static constexpr int kTurnBytes = kParts == 1 ? 0 : kParts * kRowTiles * 32 * 16;
  static constexpr int kTurnsBytes = 2 * (kMaxWarps / kParts) * kTurnBytes;
  static constexpr int kTableBytes = kRows * static_cast<int>(sizeof(RowMask));
  static constexpr int kBlockBytes = kQueryBytes + (kHoldsQueries ? 0 : kTurnsBytes) + kTableBytes;
  static constexpr int kRingBytes = kStages * 2 * kTileElems * 2;
  static constexpr int kWarpBytes = kRingBytes + kMaskEntries * 2;
  static_assert(!kHoldsQueries || kTurnsBytes <= kQueryBytes, "scores fit where queries were");
  static_assert(kRows <= kMaxQueries, "the bits of every row have a place");
  static_assert(kRows * kSumPitch * 4 <= kRingBytes, "the sums fit where the tiles were");
  static_assert(kRows * 8 <= kMaskEntries * 2, "top and sum of rows fit where the bits were");
};

// Which mask row a query row reads: 0 for all, s, or the row's own number in its block.
struct MaskRows {
  int count;
  bool by_query, by_row;

  __device__ MaskRows(const AttentionKernelArgs& p, int n_rows) {
    by_row = p.mask != nullptr && p.mask_strides[1] != 0;
    by_query =
        !by_row && p.S > 1 &&
        (p.is_causal || p.input_pos != nullptr || (p.mask != nullptr && p.mask_strides[2] != 0));
    count = by_row ? n_rows : by_query ? static_cast<int>(p.S) : 1;
  }
  __device__ int of(int row_in_block, int s) const {
    return by_row ? row_in_block : by_query ? s : 0;
  }
};

// The sums of the block's groups, rescaled to the highest top, to scratch or, with one split, to y.
template <typename T, typename Shape>
__device__ __forceinline__ void merge_groups(const AttentionKernelArgs& p, const SplitPlan& plan,
                                             const char* warps, int64_t first_row, int n_rows,
                                             int split) {
  constexpr int kVectors = Shape::kD / 4;
  const int D = static_cast<int>(p.D), tid = threadIdx.y * 32 + threadIdx.x;
  for (int i = tid; i < n_rows * kVectors; i += blockDim.y * 32) {
    const int row = i / kVectors, d = i % kVectors * 4, part = d / Shape::kColumns;
    if (d >= D) continue;
    float top = -INFINITY, sum_p = 0.f;
    float4 total = {};
    const char* warp = warps + part * Shape::kWarpBytes;
    for (int g = 0; g < plan.n_groups; ++g, warp += Shape::kParts * Shape::kWarpBytes) {
      top = fmaxf(top, reinterpret_cast<const float2*>(warp + Shape::kRingBytes)[row].x);
    }
    warp = warps + part * Shape::kWarpBytes;
    for (int g = 0; g < plan.n_groups; ++g, warp += Shape::kParts * Shape::kWarpBytes) {
      const float2 stats = reinterpret_cast<const float2*>(warp + Shape::kRingBytes)[row];
      const float weight = ex2_approx(stats.x - (top == -INFINITY ? 0.f : top));
      const float4 sums = *reinterpret_cast<const float4*>(
          warp + (row * Shape::kSumPitch + d % Shape::kColumns) * 4);
      sum_p += weight * stats.y;
      total.x += weight * sums.x;
      total.y += weight * sums.y;
      total.z += weight * sums.z;
      total.w += weight * sums.w;
    }
    if (plan.n_splits == 1) {
      store_row<T>(find_y_row<T>(p, first_row + row) + d, total, sum_p);
    } else {
      const int64_t at = (first_row + row) * plan.n_splits + split;
      if (d == 0) plan.stats[at] = {top, sum_p};
      *reinterpret_cast<float4*>(plan.sums + at * D + d) = total;
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(32 * kMaxWarps)
    attention_split_kernel(AttentionKernelArgs p, SplitPlan plan) {
  constexpr int kRowTiles = Shape::kRowTiles, kRows = Shape::kRows, kColumns = Shape::kColumns;
  extern __shared__ __align__(16) char shared[];
  griddepcontrol_launch_dependents();  // the combine kernel waits for the end of this one
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int group = warp / Shape::kParts, part = warp % Shape::kParts;
  const int S = static_cast<int>(p.S), D = static_cast<int>(p.D);
  const int split = static_cast<int>(blockIdx.x) % plan.n_splits;
  const int item = static_cast<int>(blockIdx.x) / plan.n_splits;
  const int row_begin = item % plan.n_row_blocks * kRows;  // among the rows of (b, h_kv)
  const int b_h = item / plan.n_row_blocks;
  const int h_kv = b_h % static_cast<int>(p.Hkv), b = b_h / static_cast<int>(p.Hkv);
  const int rep = static_cast<int>(p.Hq / p.Hkv);
  const int n_rows = min(kRows, rep * S - row_begin);

  char* warps = shared + Shape::kBlockBytes;
  char* own = warps + warp * Shape::kWarpBytes;
  const uint32_t ring = shared_address(own);
  auto* bits = reinterpret_cast<uint16_t*>(own + Shape::kRingBytes);  // [tile][mask row]
  auto* row_table = reinterpret_cast<RowMask*>(shared + Shape::kBlockBytes - Shape::kTableBytes);
  auto* turns = reinterpret_cast<float4*>(shared + (Shape::kHoldsQueries ? 0 : Shape::kQueryBytes));
  const MaskRows mask_rows(p, n_rows);
  if (warp == 0 && lane < kRows) {
    const int row = min(lane, n_rows - 1), r = row_begin + row;
    row_table[lane] = {find_mask_row<T>(p, b, h_kv * rep + r / S, r % S), mask_rows.of(row, r % S)};
  }

  griddepcontrol_wait();
  for (int row = warp; row < kRows; row += blockDim.y) {
    const int r = row_begin + row;
    const T* q = static_cast<const T*>(p.q);
    if (row < n_rows) {
      q += b * p.q_strides[0] + (h_kv * rep + r / S) * p.q_strides[1] + r % S * p.q_strides[2];
    }
    for (int d = lane * 8; d < Shape::kD; d += 256) {
      cp_async_16_or_zero(shared_address(shared) + (row * Shape::kQueryPitch + d) * 2, q + d,
                          row < n_rows && d < D);
    }
  }
  cp_async_commit();

  const int first_column = part * kColumns;
  const T* k =
      static_cast<const T*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1] + first_column;
  const T* v =
      static_cast<const T*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1] + first_column;
  const bool adds_mask = p.mask != nullptr && !p.mask_is_bool;
  const float scale = p.scale * kLog2E, softcap = p.softcap * kLog2E;
  KeyRange range = {p.T, 0};  // from the first key that a query of b sees to the last
  for (int s = 0; s < (p.input_pos != nullptr ? S : 1); ++s) {
    // Without positions the last query sees all that others do.
    const KeyRange seen = key_range(p, b, p.input_pos != nullptr ? s : S - 1);
    if (seen.begin < seen.end) range = {min(range.begin, seen.begin), max(range.end, seen.end)};
  }
  const int64_t n_tiles = (range.end + kTileKeys - 1) / kTileKeys;
  const int64_t tile_step = int64_t{plan.n_splits} * plan.n_groups;
  const int chunk_tiles = min(32, kMaskEntries / mask_rows.count);
  int64_t first_tile = range.begin < range.end
                           ? range.begin / kTileKeys + int64_t{split} * plan.n_groups + group
                           : n_tiles;

  // Lane i looks at tile i of the chunk: which of its keys any row sees.
  const auto look_at_masks = [&] {
    const int64_t tile = first_tile + lane * tile_step;
    uint32_t any_row = 0;
    if (tile < n_tiles && lane < chunk_tiles) {
      for (int u = 0; u < mask_rows.count; ++u) {
        const int r = row_begin + u;  // only where each row has its own mask
        const int s = mask_rows.by_row ? r % S : mask_rows.by_query ? u : 0;
        const int h = h_kv * rep + (mask_rows.by_row ? r / S : 0);
        const uint32_t seen = seen_keys<T, kTileKeys>(p, find_mask_row<T>(p, b, h, s),
                                                      key_range(p, b, s), tile * kTileKeys);
        bits[lane * mask_rows.count + u] = static_cast<uint16_t>(seen);
        any_row |= seen;
      }
    }
    __syncwarp();
    return any_row;
  };
  uint32_t any_row = look_at_masks();
  uint32_t to_do = __ballot_sync(0xffffffffu, any_row != 0), to_load = to_do;
  const auto load_next = [&](int stage) {
    if (to_load != 0) {
      const int i = __ffs(static_cast<int>(to_load)) - 1;
      to_load &= to_load - 1;
      const int64_t t0 = (first_tile + i * tile_step) * kTileKeys;
      load_tile<T, Shape>(k + t0 * p.k_strides[2], v + t0 * p.v_strides[2], p.k_strides[2],
                          p.v_strides[2], D - first_column, __shfl_sync(0xffffffffu, any_row, i),
                          ring + stage * 2 * Shape::kTileElems * 2);
    }
    cp_async_commit();  // an empty group too: the count of groups is the count of calls
  };
  const auto load_first = [&] {
    for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);
  };
  load_first();

  float top[kRowTiles][2], sum_p[kRowTiles][2], sums[kRowTiles][kColumns / 16][4];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    top[n][0] = top[n][1] = -INFINITY;
    sum_p[n][0] = sum_p[n][1] = 0.f;
#pragma unroll
    for (int m = 0; m < kColumns / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][m][i] = 0.f;
    }
  }
  cp_async_wait<kStages - 1>();
  __syncthreads();
  const Queries<Shape> queries(shared_address(shared) + first_column * 2);
  if (Shape::kHoldsQueries && Shape::kParts > 1) __syncthreads();  // scores go there from now on

  int turn = 0;
  while (true) {
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

      const uint32_t k_tile = ring + stage * 2 * Shape::kTileElems * 2;
      float scores[kRowTiles][4];
      mma_scores<T, Shape>(k_tile, queries, scores);
      if constexpr (Shape::kParts > 1) {
        // Two places in turn: nobody writes again before all have read.
        add_parts<Shape>(turns + (group * 2 + turn) * (Shape::kTurnBytes / 16), part, group,
                         scores);
        turn ^= 1;
      }
      uint32_t probabilities[kRowTiles][2];
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        float rescale[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* score = &scores[n][j];  // [0] at key g, [2] at key g + 8
          score[0] *= scale;
          score[2] *= scale;
          if (softcap != 0.f) {
            score[0] = soft_capped(score[0], softcap);
            score[2] = soft_capped(score[2], softcap);
          }
          score[0] = (seen[n][j] & 1) != 0 ? score[0] + added[n][j] : -INFINITY;
          score[2] = (seen[n][j] & 0x100) != 0 ? score[2] + added[n][2 + j] : -INFINITY;
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
          for (int m = 0; m < kColumns / 16; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[n][m][j] *= rescale[j % 2];
          }
        }
        probabilities[n][0] = movmatrix_trans(pack_pair<T>(scores[n][0], scores[n][1]));
        probabilities[n][1] = movmatrix_trans(pack_pair<T>(scores[n][2], scores[n][3]));
      }
      mma_sums<T, Shape>(k_tile + Shape::kTileElems * 2, probabilities, sums);
      __syncwarp();  // the next turn loads over this tile
    }
    first_tile += chunk_tiles * tile_step;
    if (first_tile >= n_tiles) break;
    any_row = look_at_masks();
    to_do = to_load = __ballot_sync(0xffffffffu, any_row != 0);
    load_first();
  }
  cp_async_wait<0>();
  __syncwarp();

  auto* own_sums = reinterpret_cast<float*>(own);
  auto* own_stats = reinterpret_cast<float2*>(own + Shape::kRingBytes);
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float total = sum_over_keys(sum_p[n][j]);
      const int row = 8 * n + lane % 4 * 2 + j;
      if (lane < 4) own_stats[row] = {top[n][j], total};
#pragma unroll
      for (int m = 0; m < kColumns / 16; ++m) {
        own_sums[row * Shape::kSumPitch + 16 * m + lane / 4] = sums[n][m][j];
        own_sums[row * Shape::kSumPitch + 16 * m + lane / 4 + 8] = sums[n][m][2 + j];
      }
    }
  }
  __syncthreads();
  merge_groups<T, Shape>(p, plan, warps, int64_t{b_h} * rep * S + row_begin, n_rows, split);
}

// y of kCombineColumns columns of a row from its splits; blocks (row, columns). Sums and stats are
// asked for together: those of splits that saw nothing are 0.
template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps)
    attention_split_combine(AttentionKernelArgs p, SplitPlan plan) {
  constexpr int kChunks = kMaxSplits / 32, kPerChunk = 32 / kCombineWarps;
  __shared__ float4 warp_sums[kCombineWarps][32];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int D = static_cast<int>(p.D), n_splits = plan.n_splits;
  const int64_t row = blockIdx.x;
  const int d = blockIdx.y * kCombineColumns + lane * 4;
  griddepcontrol_wait();

  float2 stats[kChunks];  // of split 32 * chunk + lane
  float4 sums[kChunks][kPerChunk];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int split = 32 * chunk + lane;
    stats[chunk] = split < n_splits ? plan.stats[row * n_splits + split] : float2{-INFINITY, 0.f};
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      const int from = 32 * chunk + i * kCombineWarps + warp;
      sums[chunk][i] = {};
      if (from < n_splits && d < D) {
        sums[chunk][i] =
            *reinterpret_cast<const float4*>(plan.sums + (row * n_splits + from) * D + d);
      }
    }
  }
  float top = -INFINITY;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) top = fmaxf(top, stats[chunk].x);
  top = warp_max(top);
  const float reference = top == -INFINITY ? 0.f : top;
  float sum_p = 0.f;
  float4 total = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const float weight = ex2_approx(stats[chunk].x - reference);
    sum_p += weight * stats[chunk].y;
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      const float w = __shfl_sync(0xffffffffu, weight, i * kCombineWarps + warp);
      total.x += w * sums[chunk][i].x;
      total.y += w * sums[chunk][i].y;
      total.z += w * sums[chunk][i].z;
      total.w += w * sums[chunk][i].w;
    }
  }
  sum_p = warp_sum(sum_p);
  warp_sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || d >= D) return;
#pragma unroll
  for (int w = 1; w < kCombineWarps; ++w) {
    total.x += warp_sums[w][lane].x;
    total.y += warp_sums[w][lane].y;
    total.z += warp_sums[w][lane].z;
    total.w += warp_sums[w][lane].w;
  }
  store_row<T>(find_y_row<T>(p, row) + d, total, sum_p);
}

// ---- host ----

// f(SplitShape) for the smallest kD that holds D, and 8 or 32 rows an item.
template <typename F>
auto with_shape(const AttentionKernelArgs& args, F f) {
  const bool few = args.Hq / args.Hkv * args.S <= 8;
  if (args.D <= 64) return few ? f(SplitShape<64, 1>{}) : f(SplitShape<64, 4>{});
  if (args.D <= 128) return few ? f(SplitShape<128, 1>{}) : f(SplitShape<128, 4>{});
  if (args.D <= 256) return few ? f(SplitShape<256, 1>{}) : f(SplitShape<256, 4>{});
  return few ? f(SplitShape<512, 1>{}) : f(SplitShape<512, 4>{});
}

template <typename Shape>
SplitPlan make_plan_of(const AttentionKernelArgs& args) {
  SplitPlan plan = {};
  const int per_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int n_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  constexpr int kMostGroups = kMaxWarps / Shape::kParts;
  constexpr int kGroupBytes = Shape::kParts * Shape::kWarpBytes;
  // Two blocks to a multiprocessor where they fit; 1 KB of each is the driver's.
  const int half = per_sm / 2 - 1024 < per_block ? per_sm / 2 - 1024 : per_block;
  int n_groups = (half - Shape::kBlockBytes) / kGroupBytes, blocks_per_sm = 2;
  if (half < Shape::kBlockBytes + kGroupBytes) {
    if (per_block < Shape::kBlockBytes + kGroupBytes) return plan;
    n_groups = (per_block - Shape::kBlockBytes) / kGroupBytes;
    blocks_per_sm = 1;
  }
  plan.n_groups = n_groups < kMostGroups ? n_groups : kMostGroups;
  const int64_t rows = args.Hq / args.Hkv * args.S;
  const int64_t n_row_blocks = (rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t n_items = args.B * args.Hkv * n_row_blocks;
  const int64_t block_keys = kTileKeys * plan.n_groups;
  int64_t n_splits = int64_t{blocks_per_sm} * n_sms / n_items;
  const int64_t most = (args.T + block_keys - 1) / block_keys;
  if (n_splits > most) n_splits = most;
  if (n_splits > kMaxSplits) n_splits = kMaxSplits;
  plan.n_splits = n_splits < 1 ? 1 : static_cast<int>(n_splits);
  plan.n_row_blocks = static_cast<int>(n_row_blocks);
  return plan;
}

template <typename T, typename Shape>
cudaError_t launch(const AttentionKernelArgs& args, const SplitPlan& plan, cudaStream_t stream) {
  const int n_warps = plan.n_groups * Shape::kParts;
  const int shared_bytes = Shape::kBlockBytes + n_warps * Shape::kWarpBytes;
  const auto kernel = attention_split_kernel<T, Shape>;
  cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (code != cudaSuccess) return code;
  const int64_t n_blocks = args.B * args.Hkv * plan.n_row_blocks * plan.n_splits;
  code = launch_dependent(kernel, static_cast<unsigned>(n_blocks), dim3(32, n_warps), shared_bytes,
                          stream, args, plan);
  if (code != cudaSuccess || plan.n_splits == 1) return code;
  // The same split of L1 as the kernel before, so that it can start beside it: 0.1 to 0.5 us on an
  // H200.
  code = cudaFuncSetAttribute(attention_split_combine<T>,
                              cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
  if (code != cudaSuccess) return code;
  const dim3 grid(static_cast<unsigned>(args.B * args.Hq * args.S),
                  static_cast<unsigned>((args.D + kCombineColumns - 1) / kCombineColumns));
  return launch_dependent(attention_split_combine<T>, grid, dim3(32, kCombineWarps), 0, stream,
                          args, plan);
}

SplitPlan make_plan(const AttentionKernelArgs& args) {
  return with_shape(args, [&](auto shape) { return make_plan_of<decltype(shape)>(args); });
}

uint64_t sums_bytes(const AttentionKernelArgs& args, const SplitPlan& plan) {
  return static_cast<uint64_t>(args.B * args.Hq * args.S * args.D) * plan.n_splits * sizeof(float);
}

template <typename T>
cudaError_t launch_of_dtype(const AttentionKernelArgs& args, const SplitPlan& plan,
                            cudaStream_t stream) {
  return with_shape(args,
                    [&](auto shape) { return launch<T, decltype(shape)>(args, plan, stream); });
}

}  // namespace

bool fits_attention_split(const AttentionKernelArgs& args) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  return args.S <= kMaxQueries && is_tensor_core_ready(args) &&
         args.B * args.Hq * args.S <= kMaxBlocks && make_plan(args).n_groups > 0;
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
  if (args.dtype == DType::kFloat16) return launch_of_dtype<__half>(args, plan, stream);
  return launch_of_dtype<__nv_bfloat16>(args, plan, stream);
}

}  // namespace cuda_int4
