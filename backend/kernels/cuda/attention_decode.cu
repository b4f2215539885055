// attention_decode -- y = softmax(cap(q @ k.T * scale)) @ v for few queries at their positions on a
//                     long cache, in one launch (sm_90)
//
//   operand    dtype            shape           order in memory                           align
//   q          f16 | bf16       [B, Hq, S, D]   last dimension contiguous, strides % 8    16 B
//   k, v       of q | i8        [B, Hkv, T, D]  last dimension contiguous, strides % 8    16 B
//                                               (of i8 % 16)
//   k_scale    f32              [B, Hkv, T]     contiguous; with i8: k's value is k * k_scale   4 B
//   v_scale    f32              [B, Hkv, T]     contiguous                                4 B
//   input_pos  i32 | i64        [S] | [B, S]    contiguous; keys seen: pos - window < t <= pos
//   y (out)    dtype of q       [B, Hq, S, D]   strides % 8                               16 B
//
// Requires  D % 8 == 0 (i8: D % 16 == 0), D <= 512, S <= kMaxQueries, no mask   (checked by
//           fits_attention_decode)
// Grid      (item, rank) blocks of 4 warps; an item is kRows query rows of one key head (b, hkv),
//           counted over the query heads that share it, its blocks are one cluster. How many
//           depends on the shapes; how many of them work, on the positions: a graph that was
//           captured once is quick on a short context and has all multiprocessors read a long one.
//           A block takes a stretch of the keys, a group of kParts warps every n_groups-th tile of
//           16 of it, each warp 128 columns. At the end each block sends its sums to the blocks
//           that own a part of the rows, which add them up
// Bytes     keys and values once per item. Launched as a dependent: the first keys and values of
//           each block are asked into L2 before the wait. That is a hint on what the positions were
//           then; nothing is used that was read before it
// Numerics  scores, softmax and sums in fp32; exp(score - top) is rounded to the dtype for the
//           product with v, with i8 times v_scale * kValueFactor. The order of additions depends on
//           the shapes and positions alone. A row that sees nothing is 0. Keys outside of the
//           stretch from the first to the last that a row of the item sees are not read
// Source    flash-decoding (Dao et al., 2023); own
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <type_traits>

#include "attention.cuh"
#include "attention_parts.cuh"
#include "attention_split.cuh"
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;        // of a block: two blocks share a multiprocessor
constexpr int kMaxQueries = 16;  // S
constexpr int kMaxCluster = 16;
constexpr int kBlockTiles = 4;  // twice as many blocks work where each gets as many
[[maybe_unused]] constexpr int kPrefetchBytes = 32 << 10;  // of keys, and of values, of a block
// What v_scale is multiplied with when it goes into a probability: of the largest fp16 values' too
// the product is finite, and of small ones not below what fp16 holds well.
[[maybe_unused]] constexpr float kValueFactor = 64.f;

// Shared memory: the queries, what warps tell each other, ranges of rows, what the other blocks of
// the cluster send, and of each warp the tiles, where at last its sums are.
template <typename KV, int kD_, int kRowTiles_>
struct DecodeShape {
  static constexpr int kD = kD_, kRowTiles = kRowTiles_, kRows = 8 * kRowTiles;
  static constexpr bool kIsInt8 = sizeof(KV) == 1;
  static constexpr int kStages = kIsInt8 ? 5 : 3;          // tiles of a warp in flight or in use
  static constexpr int kParts = kD <= 128 ? 1 : kD / 128;  // warps that share a tile
  static constexpr int kGroups = kWarps / kParts;
  static constexpr int kColumns = kD / kParts;  // of each
  static constexpr int kQueryPitch = kD + 8;    // elements; rows fall on different banks
  static constexpr int kPitch = kColumns + 16 / static_cast<int>(sizeof(KV));
  static constexpr int kTileElems = kTileKeys * kPitch;
  static constexpr int kTileBytes = kTileElems * static_cast<int>(sizeof(KV));
  static constexpr int kScaleBytes = kIsInt8 ? 2 * kTileKeys * 4 : 0;
  static constexpr int kStageBytes = 2 * kTileBytes + kScaleBytes;
  static constexpr int kSumPitch = kColumns + 4;         // floats
  static constexpr bool kHoldsQueries = kRowTiles == 1;  // in registers
  static constexpr int kQueryBytes = kRows * kQueryPitch * 2;
  // Scores of a group's warps, twice for each group.
  static constexpr int kTurnBytes = kParts == 1 ? 0 : kParts * kRowTiles * 32 * 16;
  static constexpr int kTurnsBytes = 2 * kGroups * kTurnBytes;
  static constexpr int kRangeBytes = kRows * 8;
  // Top and sum of each row of each block, and the vectors of 4 sums that this block owns.
  static constexpr int kInboxStatsBytes = kMaxCluster * kRows * 8;
  static constexpr int kInboxBytes = kInboxStatsBytes + kRows * kD * 4 + kMaxCluster * 16;
  static constexpr int kBlockBytes = kQueryBytes + kTurnsBytes + kRangeBytes + kInboxBytes;
  static constexpr int kSumsBytes = kRows * kSumPitch * 4 + kRows * 8;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kWarpBytes = kRingBytes > kSumsBytes ? kRingBytes : kSumsBytes;
  static constexpr int kSharedBytes = kBlockBytes + kWarps * kWarpBytes;
  static_assert(kRows <= 32, "a lane for each row");
  static_assert(kHoldsQueries || kRowTiles % 2 == 0, "mma_scores takes row tiles in pairs");
  static_assert(kBlockBytes % 16 == 0 && kWarpBytes % 16 == 0, "tiles are aligned");
};

#if __CUDA_ARCH__ >= 900

// Where a block stands: its tiles, and how many blocks of the cluster have any. Powers of two: what a
// thread computes behind the wait is time of the chain, and a division is 20 to 100 instructions.
struct Stretch {
  int begin, end;  // the keys that some row of the item sees lie within
  int first_tile, last_tile, log2_active;

  __device__ Stretch(int begin, int end, int rank, int log2_ranks) : begin(begin), end(end) {
    const unsigned first = static_cast<unsigned>(begin) / kTileKeys;
    const unsigned n_tiles =
        end > begin ? (static_cast<unsigned>(end) + kTileKeys - 1) / kTileKeys - first : 0;
    log2_active = min(log2_ranks, 31 - __clz(static_cast<int>(n_tiles / kBlockTiles | 1)));
    first_tile = static_cast<int>(first + (n_tiles * rank >> log2_active));
    last_tile = static_cast<int>(first + (n_tiles * (rank + 1) >> log2_active));
    if (rank >> log2_active != 0) last_tile = first_tile;
  }
  __device__ bool operator==(const Stretch& other) const {
    return begin == other.begin && end == other.end;
  }
};

// What row `lane` of the item sees, without one nothing; positions are read anew at each call.
__device__ __forceinline__ int2 read_range(const AttentionKernelArgs& p, int b, int s,
                                           bool is_row) {
  const int T = static_cast<int>(p.T);
  if (!is_row) return {T, 0};
  if (p.input_pos == nullptr) return {0, p.is_causal ? min(s + 1, T) : T};
  const int64_t at = b * p.pos_stride + s;
  const int64_t pos =
      p.pos_is_int64 ? load_global_early_s64(static_cast<const int64_t*>(p.input_pos) + at)
                     : static_cast<int32_t>(
                           load_global_early_u32(static_cast<const int32_t*>(p.input_pos) + at));
  const int64_t begin = p.window > 0 && pos >= p.window ? pos - p.window + 1 : 0;
  if (pos < 0 || begin >= T) return {T, 0};
  return {static_cast<int>(begin), pos < T ? static_cast<int>(pos) + 1 : T};
}

// Bits of the tile's keys within begin .. end - 1.
__device__ __forceinline__ uint32_t tile_bits(int t0, int begin, int end) {
  const uint32_t before_end = end - t0 >= kTileKeys ? 0xffffu : (1u << (end - t0)) - 1;
  return begin <= t0 ? before_end : before_end & ~((1u << (begin - t0)) - 1);
}

// As load_tile, where all keys are to be copied and rows of keys and values lie one behind the other.
template <typename KV, typename Shape>
__device__ __forceinline__ void load_whole_tile(const KV* k, const KV* v, uint32_t tile) {
  constexpr int kElems = kElemsPer16Bytes<KV>, kLanesPerRow = Shape::kColumns / kElems;
  constexpr int kKeysPerStep = 32 / kLanesPerRow;
  const int first_key = threadIdx.x / kLanesPerRow, d = threadIdx.x % kLanesPerRow * kElems;
  k += first_key * Shape::kD + d;
  v += first_key * Shape::kD + d;
  tile += (first_key * Shape::kPitch + d) * static_cast<int>(sizeof(KV));
#pragma unroll
  for (int key = 0; key < kTileKeys; key += kKeysPerStep) {
    const uint32_t to = tile + key * Shape::kPitch * static_cast<int>(sizeof(KV));
    cp_async_16(to, k + key * Shape::kD);
    cp_async_16(to + Shape::kTileBytes, v + key * Shape::kD);
  }
}

// Those of 16 keys that have a bit, up to the last; the scales of keys behind it are 0.
template <typename Shape>
__device__ __forceinline__ void load_scales(const float* k_scale, const float* v_scale,
                                            uint32_t bits, uint32_t tile) {
  const int lane = threadIdx.x, key = lane % 4 * 4;
  if (lane >= kTileKeys / 2) return;  // 4 scales each
  const int n_keys = max(0, min(4, 32 - __clz(static_cast<int>(bits)) - key));
  cp_async_16_up_to(tile + 2 * Shape::kTileBytes + lane * 16, (lane < 4 ? k_scale : v_scale) + key,
                    n_keys * 4);
}

// As load_tile, for int8 keys and values.
template <typename Shape>
__device__ __forceinline__ void load_int8_tile(const int8_t* k, const int8_t* v, int64_t k_stride,
                                               int64_t v_stride, int n_columns, uint32_t bits,
                                               uint32_t tile) {
  constexpr int kLanesPerRow = Shape::kColumns / 16;  // 16 bytes each
  constexpr int kKeysPerStep = 32 / kLanesPerRow;
  const int lane = threadIdx.x, first_key = lane / kLanesPerRow, d = lane % kLanesPerRow * 16;
  k += first_key * k_stride + d;
  v += first_key * v_stride + d;
  bits = d < n_columns ? bits >> first_key : 0;
  tile += first_key * Shape::kPitch + d;
#pragma unroll
  for (int key = 0; key < kTileKeys; key += kKeysPerStep) {
    const bool copy = (bits >> key & 1) != 0;
    cp_async_16_or_zero(tile + key * Shape::kPitch, k, copy);
    cp_async_16_or_zero(tile + Shape::kTileBytes + key * Shape::kPitch, v, copy);
    k += kKeysPerStep * k_stride;
    v += kKeysPerStep * v_stride;
  }
}

// Bytes 0 and kSecond of four int8 (byte kFirst low, kSecond high) as two of T; exact.
template <int kFirst, int kSecond>
__device__ __forceinline__ uint32_t widen_pair(uint32_t bytes, __half) {
  // 0x64xx is 1024 + xx; xx is the byte with its sign bit turned over, that is the byte + 128.
  const uint32_t pair =
      __byte_perm(bytes ^ 0x80808080u, 0x64646464u, 0x4040 | kFirst | kSecond << 8);
  const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&pair), __half2half2(1152.f));
  return *reinterpret_cast<const uint32_t*>(&value);
}
template <int kFirst, int kSecond>
__device__ __forceinline__ uint32_t widen_pair(uint32_t bytes, __nv_bfloat16) {
  // 0x43xx is 128 + the low 7 bits, or with the sign bit alone 128 (0) or 256 (1).
  constexpr uint32_t kSelector = 0x4040 | kFirst | kSecond << 8;
  const uint32_t low = __byte_perm(bytes & 0x7f7f7f7fu, 0x43434343u, kSelector);
  const uint32_t sign = __byte_perm(bytes & 0x80808080u, 0x43434343u, kSelector);
  const __nv_bfloat162 value = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&low),
                                       *reinterpret_cast<const __nv_bfloat162*>(&sign));
  return *reinterpret_cast<const uint32_t*>(&value);
}

// The query fragments for int8 keys: lane (g, c) of a fragment of 16 columns takes 4c .. 4c + 3, as
// the bytes of the keys lie.
template <typename Shape>
struct Int8Queries {
  uint2 frag[Shape::kHoldsQueries ? Shape::kColumns / 16 : 1];
  const char* shared;  // the lane's first

  __device__ explicit Int8Queries(const char* first_column) {
    const int lane = threadIdx.x;
    shared = first_column + (lane / 4 * Shape::kQueryPitch + lane % 4 * 4) * 2;
    if constexpr (Shape::kHoldsQueries) {
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 16; ++i) frag[i] = read(0, i);
    }
  }
  __device__ __forceinline__ uint2 read(int n, int i) const {
    return *reinterpret_cast<const uint2*>(shared + n * 8 * Shape::kQueryPitch * 2 + i * 32);
  }
  __device__ __forceinline__ uint2 get(int n, int i) const {
    if constexpr (Shape::kHoldsQueries) return frag[i];
    return read(n, i);
  }
};

// As mma_scores, without the scales of the keys.
template <typename T, typename Shape>
__device__ __forceinline__ void mma_int8_scores(uint32_t k_tile, const Int8Queries<Shape>& queries,
                                                float (&scores)[Shape::kRowTiles][4]) {
  const int lane = threadIdx.x;
  const uint32_t k_at = k_tile + lane % 16 * Shape::kPitch + lane / 16 * 16;
  float odd[Shape::kRowTiles][4];
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = odd[n][i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < Shape::kColumns / 16; i += 2) {
    uint32_t bytes[4];  // keys g and g + 8 of 16 columns, the same of the next 16
    ldmatrix_x4(bytes, k_at + i * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = bytes[2 * half], high = bytes[2 * half + 1];
      const uint32_t k[4] = {widen_pair<0, 1>(low, T{}), widen_pair<0, 1>(high, T{}),
                             widen_pair<2, 3>(low, T{}), widen_pair<2, 3>(high, T{})};
#pragma unroll
      for (int n = 0; n < Shape::kRowTiles; ++n) {
        const uint2 q = queries.get(n, i + half);
        mma_m16n8k16(half == 0 ? scores[n] : odd[n], k, {q.x, q.y}, T{});
      }
    }
  }
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
  }
}

// As mma_sums, but sums[n][m] has columns 16m + 2g and 16m + 2g + 1.
template <typename T, typename Shape>
__device__ __forceinline__ void mma_int8_sums(
    uint32_t v_tile, const uint32_t (&p)[Shape::kRowTiles][2],
    float (&sums)[Shape::kRowTiles][Shape::kColumns / 16][4]) {
  const int lane = threadIdx.x;
  const uint32_t v_at = v_tile + lane % 16 * Shape::kPitch + lane / 16 * 16;
#pragma unroll
  for (int m = 0; m < Shape::kColumns / 16; m += 2) {
    uint32_t bytes[4];  // columns 2g, 2g + 1 of keys 2c, 2c + 1; the same of keys + 8; the next 16
    ldmatrix_x4_trans(bytes, v_at + m * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = bytes[2 * half], high = bytes[2 * half + 1];
      const uint32_t v[4] = {widen_pair<0, 2>(low, T{}), widen_pair<1, 3>(low, T{}),
                             widen_pair<0, 2>(high, T{}), widen_pair<1, 3>(high, T{})};
#pragma unroll
      for (int n = 0; n < Shape::kRowTiles; ++n) mma_m16n8k16(sums[n][m + half], v, p[n], T{});
    }
  }
}

struct Merged {
  float top, sum_p;
  float4 total;
};

// The sums of the block's groups for columns d to d + 3 of a row, rescaled to the highest top.
template <typename Shape>
__device__ __forceinline__ Merged merge_groups(const char* warps, int row, int d) {
  Merged merged = {-INFINITY, 0.f, {}};
  constexpr int kStatsAt = Shape::kRows * Shape::kSumPitch * 4;
  const char* first = warps + d / Shape::kColumns * Shape::kWarpBytes;
  float2 stats[Shape::kGroups];
#pragma unroll
  for (int g = 0; g < Shape::kGroups; ++g) {
    const char* warp = first + g * Shape::kParts * Shape::kWarpBytes;
    stats[g] = reinterpret_cast<const float2*>(warp + kStatsAt)[row];
    merged.top = fmaxf(merged.top, stats[g].x);
  }
#pragma unroll
  for (int g = 0; g < Shape::kGroups; ++g) {
    const char* warp = first + g * Shape::kParts * Shape::kWarpBytes;
    const float weight = ex2_approx(stats[g].x - (merged.top == -INFINITY ? 0.f : merged.top));
    const float4 sums =
        *reinterpret_cast<const float4*>(warp + (row * Shape::kSumPitch + d % Shape::kColumns) * 4);
    merged.sum_p += weight * stats[g].y;
    merged.total.x += weight * sums.x;
    merged.total.y += weight * sums.y;
    merged.total.z += weight * sums.z;
    merged.total.w += weight * sums.w;
  }
  return merged;
}

// Columns d to d + 3 of row `row` of the item, over the sum of its probabilities.
template <typename T, typename Shape>
__device__ __forceinline__ void store_columns(const AttentionKernelArgs& p, int b, int first_head,
                                              int r, int d, const float4& total, float sum_p) {
  const int h = p.S == 1 ? r : r / static_cast<int>(p.S),
            s = p.S == 1 ? 0 : r % static_cast<int>(p.S);
  T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + (first_head + h) * p.y_strides[1] +
         s * p.y_strides[2];
  store_row<T>(y + d, total, Shape::kIsInt8 ? sum_p * kValueFactor : sum_p);
}

// The sums of the cluster's first n_active blocks to y: each sends each vector of 4 sums to the
// block that owns it, which adds them up in a tree over the blocks.
template <typename T, typename Shape>
__device__ __forceinline__ void combine_cluster(const AttentionKernelArgs& p, const char* warps,
                                                char* inbox, int b, int first_head, int row_begin,
                                                int n_rows, int rank, int log2_active) {
  constexpr int kVectors = Shape::kD / 4, kThreads = 32 * kWarps;
  static_assert(kVectors >= kMaxCluster, "the vectors of a row are enough to send its top to all");
  const int D = static_cast<int>(p.D), tid = threadIdx.y * 32 + threadIdx.x;
  const int n_active = 1 << log2_active;
  const int n_vectors = n_rows * kVectors, n_own = n_vectors >> log2_active;
  const uint32_t own_inbox = shared_address(inbox);
  cluster_wait();  // the others have started: their memory is there
#pragma unroll 1
  for (int i = tid; i < n_vectors; i += kThreads) {
    const int row = i / kVectors, d = i % kVectors * 4, owner = i % n_active;
    const Merged merged = merge_groups<Shape>(warps, row, d);
    const uint32_t at = own_inbox + Shape::kInboxStatsBytes;
    store_cluster(address_in_rank(at + (rank * n_own + (i >> log2_active)) * 16, owner),
                  merged.total);
    if (d < 4 * n_active) {
      store_cluster(address_in_rank(own_inbox + (row * kMaxCluster + rank) * 8, d / 4),
                    float2{merged.top, merged.sum_p});
    }
  }
  cluster_arrive();
  cluster_wait();
  const auto* stats = reinterpret_cast<const float2*>(inbox);
  const auto* sums = reinterpret_cast<const float4*>(inbox + Shape::kInboxStatsBytes);
#pragma unroll 1
  for (int i = tid; i - static_cast<int>(threadIdx.x) < n_vectors; i += kThreads) {  // whole warps
    const int own = i >> log2_active, from = i % n_active;
    const int vector = own * n_active + rank, row = vector / kVectors, d = vector % kVectors * 4;
    float2 part = {-INFINITY, 0.f};
    float4 total = {};
    if (i < n_vectors) {
      part = stats[row * kMaxCluster + from];
      total = sums[from * n_own + own];
    }
    float top = part.x;
    for (int offset = 1; offset < n_active; offset *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    }
    const float weight = ex2_approx(part.x - (top == -INFINITY ? 0.f : top));
    float sum_p = weight * part.y;
    total.x *= weight;
    total.y *= weight;
    total.z *= weight;
    total.w *= weight;
    for (int offset = 1; offset < n_active; offset *= 2) {
      sum_p += __shfl_xor_sync(0xffffffffu, sum_p, offset);
      total.x += __shfl_xor_sync(0xffffffffu, total.x, offset);
      total.y += __shfl_xor_sync(0xffffffffu, total.y, offset);
      total.z += __shfl_xor_sync(0xffffffffu, total.z, offset);
      total.w += __shfl_xor_sync(0xffffffffu, total.w, offset);
    }
    if (from == 0 && i < n_vectors && d < D) {
      store_columns<T, Shape>(p, b, first_head, row_begin + row, d, total, sum_p);
    }
  }
}

#endif  // __CUDA_ARCH__ >= 900

template <typename T, typename KV, typename Shape>
__global__ void __launch_bounds__(32 * kWarps)
    attention_decode_kernel(const __grid_constant__ AttentionKernelArgs p, int rep,
                            int n_row_blocks) {
#if __CUDA_ARCH__ >= 900
  constexpr int kRowTiles = Shape::kRowTiles, kRows = Shape::kRows, kColumns = Shape::kColumns;
  extern __shared__ __align__(16) char shared[];
  griddepcontrol_launch_dependents();
  cluster_arrive_relaxed();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int group = warp / Shape::kParts, part = warp % Shape::kParts;
  const int S = static_cast<int>(p.S), D = static_cast<int>(p.D), T_keys = static_cast<int>(p.T);
  const int rank = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.z);
  const int log2_ranks = 31 - __clz(static_cast<int>(gridDim.x));
  int h_kv = static_cast<int>(blockIdx.y), row_begin = 0;  // among the rows of (b, h_kv)
  if (n_row_blocks > 1) {
    row_begin = h_kv % n_row_blocks * kRows;
    h_kv /= n_row_blocks;
  }
  const int first_head = h_kv * rep;
  const int n_rows = min(kRows, rep * S - row_begin);
  const int s_of_lane = S == 1 ? 0 : (row_begin + lane) % S;

  char* turns_at = shared + Shape::kQueryBytes;
  auto* ranges = reinterpret_cast<int2*>(turns_at + Shape::kTurnsBytes);
  char* inbox = turns_at + Shape::kTurnsBytes + Shape::kRangeBytes;
  char* warps = shared + Shape::kBlockBytes;
  char* own = warps + warp * Shape::kWarpBytes;
  const uint32_t ring = shared_address(own);

  const int first_column = part * kColumns;
  const KV* k = static_cast<const KV*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1];
  const KV* v = static_cast<const KV*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1];

  int2 range = read_range(p, b, s_of_lane, lane < n_rows);
  const auto stretch_of = [&](const int2& of_lane) {
    return Stretch(__reduce_min_sync(0xffffffffu, of_lane.x),
                   __reduce_max_sync(0xffffffffu, of_lane.y), rank, log2_ranks);
  };
  Stretch stretch = stretch_of(range);
  if (warp == 0 && lane < 2 && kPrefetchBytes > 0 && stretch.first_tile < stretch.last_tile) {
    const int64_t stride = (lane == 0 ? p.k_strides : p.v_strides)[2];
    if (stride == D) {
      const int t0 = stretch.first_tile * kTileKeys;
      const int64_t n_bytes =
          int64_t{min(stretch.last_tile * kTileKeys, T_keys) - t0} * D * int64_t{sizeof(KV)};
      prefetch_l2_bulk((lane == 0 ? k : v) + t0 * stride,
                       static_cast<uint32_t>(n_bytes < kPrefetchBytes ? n_bytes : kPrefetchBytes));
    }
  }

  griddepcontrol_wait();
  const int2 range_now = read_range(p, b, s_of_lane, lane < n_rows);
#pragma unroll 1
  for (int i = warp * 32 + lane; i < kRows * (Shape::kD / 8); i += 32 * kWarps) {
    const int row = i / (Shape::kD / 8), d = i % (Shape::kD / 8) * 8, r = row_begin + row;
    const bool copy = row < n_rows && d < D;
    const int h = S == 1 ? r : r / S, s = S == 1 ? 0 : r % S;
    const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] +
                 (first_head + h) * p.q_strides[1] + s * p.q_strides[2] + d;
    cp_async_16_or_zero(shared_address(shared) + (row * Shape::kQueryPitch + d) * 2, copy ? q : p.q,
                        copy);
  }
  cp_async_commit();

  k += first_column;
  v += first_column;
  const float scale = p.scale * kLog2E, softcap = p.softcap * kLog2E;
  const int64_t first_scale = (int64_t{b} * p.Hkv + h_kv) * T_keys;
  const bool is_dense =
      p.k_strides[2] == Shape::kD && p.v_strides[2] == Shape::kD && D == Shape::kD;
  int to_load = 0;
  const auto load_next = [&](int stage) {
    if (to_load < stretch.last_tile) {
      const int t0 = to_load * kTileKeys;
      const uint32_t tile = ring + stage * Shape::kStageBytes;
      const KV* tile_k = k + t0 * p.k_strides[2];
      const KV* tile_v = v + t0 * p.v_strides[2];
      uint32_t bits = 0xffff;
      if (is_dense && t0 >= stretch.begin && t0 + kTileKeys <= stretch.end) {
        load_whole_tile<KV, Shape>(tile_k, tile_v, tile);
      } else {
        bits = tile_bits(t0, stretch.begin, stretch.end);
        if constexpr (Shape::kIsInt8) {
          load_int8_tile<Shape>(tile_k, tile_v, p.k_strides[2], p.v_strides[2], D - first_column,
                                bits, tile);
        } else {
          load_tile<T, Shape>(tile_k, tile_v, p.k_strides[2], p.v_strides[2], D - first_column,
                              bits, tile);
        }
      }
      if constexpr (Shape::kIsInt8) {
        const int64_t at = first_scale + t0;
        load_scales<Shape>(p.k_scale + at, p.v_scale + at, bits, tile);
      }
    }
    to_load += Shape::kGroups;
    cp_async_commit();  // an empty group too: the count of groups is the count of calls
  };
  // First by the positions that were there before the wait, mostly those of now. Loops, as the first
  // pass through code is bound by its fetching.
  while (true) {
    to_load = stretch.first_tile + group;
#pragma unroll 1
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) load_next(stage);
    const Stretch stretch_now = stretch_of(range_now);
    if (stretch_now == stretch) break;
    stretch = stretch_now;
    cp_async_wait<0>();
    __syncwarp();
  }
  // The whole block; it has arrived, and nobody waits for it.
  if (rank >> stretch.log2_active != 0) {
    cp_async_wait<0>();
    return;
  }
  range = range_now;
  if (warp == 0 && lane < kRows) ranges[lane] = range;
  // Every row sees the tiles within.
  const int all_begin = __reduce_max_sync(0xffffffffu, lane < n_rows ? range.x : 0);
  const int all_end = __reduce_min_sync(0xffffffffu, lane < n_rows ? range.y : T_keys);

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
  cp_async_wait<Shape::kStages - 1>();
  __syncthreads();
  using Queries =
      std::conditional_t<Shape::kIsInt8, Int8Queries<Shape>, ::cuda_int4::Queries<Shape>>;
  const Queries queries = [&] {
    if constexpr (Shape::kIsInt8) {
      return Queries(shared + first_column * 2);
    } else {
      return Queries(shared_address(shared) + first_column * 2);
    }
  }();

  int turn = 0, stage = 0;
  for (int tile = stretch.first_tile + group; tile < stretch.last_tile; tile += Shape::kGroups) {
    load_next(stage == 0 ? Shape::kStages - 1 : stage - 1);  // where the last tile was
    cp_async_wait<Shape::kStages - 1>();
    __syncwarp();
    const uint32_t k_tile = ring + stage * Shape::kStageBytes;
    const char* scales = own + stage * Shape::kStageBytes + 2 * Shape::kTileBytes;
    const int t0 = tile * kTileKeys;
    float scores[kRowTiles][4];
    if constexpr (Shape::kIsInt8) {
      mma_int8_scores<T, Shape>(k_tile, queries, scores);
    } else {
      mma_scores<T, Shape>(k_tile, queries, scores);
    }
    if constexpr (Shape::kParts > 1) {
      // Two places in turn: nobody writes again before all have read.
      add_parts<Shape>(reinterpret_cast<float4*>(turns_at + (group * 2 + turn) * Shape::kTurnBytes),
                       part, group, scores);
      turn ^= 1;
    }
    float key_scale[2] = {scale, scale};  // of keys g, g + 8
    if constexpr (Shape::kIsInt8) {
      key_scale[0] *= reinterpret_cast<const float*>(scales)[lane / 4];
      key_scale[1] *= reinterpret_cast<const float*>(scales)[lane / 4 + 8];
    }
    const bool all_seen = t0 >= all_begin && t0 + kTileKeys <= all_end;
    uint32_t probabilities[kRowTiles][2];
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      float rescale[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float* score = &scores[n][j];  // [0] at key g, [2] at key g + 8
        score[0] *= key_scale[0];
        score[2] *= key_scale[1];
        if (softcap != 0.f) {
          score[0] = soft_capped(score[0], softcap);
          score[2] = soft_capped(score[2], softcap);
        }
        if (!all_seen) {
          const int2 seen = ranges[8 * n + lane % 4 * 2 + j];
          const int t = t0 + lane / 4;
          if (t < seen.x || t >= seen.y) score[0] = -INFINITY;
          if (t + 8 < seen.x || t + 8 >= seen.y) score[2] = -INFINITY;
        }
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
          for (int i = 0; i < 4; ++i) sums[n][m][i] *= rescale[i % 2];
        }
      }
      if constexpr (Shape::kIsInt8) {
        const float* value_scale = reinterpret_cast<const float*>(scales) + kTileKeys + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // The scale of a key that no row sees may be NaN.
          const float scaled = scores[n][i] * (value_scale[i / 2 * 8] * kValueFactor);
          scores[n][i] = scores[n][i] == 0.f ? 0.f : scaled;
        }
      }
      probabilities[n][0] = movmatrix_trans(pack_pair<T>(scores[n][0], scores[n][1]));
      probabilities[n][1] = movmatrix_trans(pack_pair<T>(scores[n][2], scores[n][3]));
    }
    if constexpr (Shape::kIsInt8) {
      mma_int8_sums<T, Shape>(k_tile + Shape::kTileBytes, probabilities, sums);
    } else {
      mma_sums<T, Shape>(k_tile + Shape::kTileBytes, probabilities, sums);
    }
    __syncwarp();  // the next turn loads over this tile
    stage = stage == Shape::kStages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncwarp();

  auto* own_sums = reinterpret_cast<float*>(own);
  auto* own_stats = reinterpret_cast<float2*>(own_sums + kRows * Shape::kSumPitch);
  constexpr int kColumnStep = Shape::kIsInt8 ? 2 : 1, kSecondColumn = Shape::kIsInt8 ? 1 : 8;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float total = sum_over_keys(sum_p[n][j]);
      const int row = 8 * n + lane % 4 * 2 + j;
      if (lane < 4) own_stats[row] = {top[n][j], total};
      float* to = own_sums + row * Shape::kSumPitch + lane / 4 * kColumnStep;
#pragma unroll
      for (int m = 0; m < kColumns / 16; ++m) {
        to[16 * m] = sums[n][m][j];
        to[16 * m + kSecondColumn] = sums[n][m][2 + j];
      }
    }
  }
  __syncthreads();
  if (stretch.log2_active > 0) {
    combine_cluster<T, Shape>(p, warps, inbox, b, first_head, row_begin, n_rows, rank,
                              stretch.log2_active);
    return;
  }
  constexpr int kVectors = Shape::kD / 4;
#pragma unroll 1
  for (int i = warp * 32 + lane; i < n_rows * kVectors; i += 32 * kWarps) {
    const int row = i / kVectors, d = i % kVectors * 4;
    if (d >= D) continue;
    const Merged merged = merge_groups<Shape>(warps, row, d);
    store_columns<T, Shape>(p, b, first_head, row_begin + row, d, merged.total, merged.sum_p);
  }
#endif
}

// ---- host ----

// f(T{}, KV{}, DecodeShape) for the smallest kD that holds D, and 8, 16 or 32 rows an item.
template <typename T, typename KV, typename F>
auto with_rows(const AttentionKernelArgs& args, F f) {
  const int64_t rows = args.Hq / args.Hkv * args.S;
  const auto with_columns = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    if (args.D <= 64) return f(T{}, KV{}, DecodeShape<KV, 64, kTiles>{});
    if (args.D <= 128) return f(T{}, KV{}, DecodeShape<KV, 128, kTiles>{});
    if (args.D <= 256) return f(T{}, KV{}, DecodeShape<KV, 256, kTiles>{});
    return f(T{}, KV{}, DecodeShape<KV, 512, kTiles>{});
  };
  if (rows <= 8) return with_columns(std::integral_constant<int, 1>{});
  if (rows <= 16) return with_columns(std::integral_constant<int, 2>{});
  return with_columns(std::integral_constant<int, 4>{});
}

template <typename F>
auto with_types(const AttentionKernelArgs& args, F f) {
  const bool is_int8 = args.k_scale != nullptr;
  if (args.dtype == DType::kFloat16) {
    return is_int8 ? with_rows<__half, int8_t>(args, f) : with_rows<__half, __half>(args, f);
  }
  return is_int8 ? with_rows<__nv_bfloat16, int8_t>(args, f)
                 : with_rows<__nv_bfloat16, __nv_bfloat16>(args, f);
}

constexpr int kMaxDevices = 64;

// The largest cluster of this kernel that the current device runs; 0: none, it has no code for it.
// Asked once per device.
template <typename T, typename KV, typename Shape>
int largest_cluster() {
  static std::atomic<int> known[kMaxDevices];  // the answer + 1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
  if (const int answer = known[device].load(std::memory_order_relaxed); answer != 0) {
    return answer - 1;
  }
  const auto kernel = attention_decode_kernel<T, KV, Shape>;
  cudaFuncAttributes attributes = {};
  int answer = 0;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Shape::kSharedBytes) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess) {
    for (int size = kMaxCluster; size >= 1 && answer == 0; size /= 2) {
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(size));
      config.blockDim = dim3(32, kWarps);
      config.dynamicSmemBytes = Shape::kSharedBytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      int n_clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&n_clusters, kernel, &config) == cudaSuccess &&
          n_clusters > 0) {
        answer = size;
      }
    }
  }
  cudaGetLastError();  // a no is an answer
  known[device].store(answer + 1, std::memory_order_relaxed);
  return answer;
}

template <typename T, typename KV, typename Shape>
cudaError_t launch(const AttentionKernelArgs& args, cudaStream_t stream) {
  const int64_t rep = args.Hq / args.Hkv, rows = rep * args.S;
  const int n_row_blocks = static_cast<int>((rows + Shape::kRows - 1) / Shape::kRows);
  const int64_t n_items = args.B * args.Hkv * n_row_blocks;
  const int64_t n_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most_useful = args.T / (kTileKeys * kBlockTiles);
  int n_ranks = largest_cluster<T, KV, Shape>();
  while (n_ranks > 1 && (n_ranks * n_items > n_sms || n_ranks > most_useful)) n_ranks /= 2;
  const auto kernel = attention_decode_kernel<T, KV, Shape>;
  const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                Shape::kSharedBytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(static_cast<unsigned>(n_ranks), static_cast<unsigned>(args.Hkv * n_row_blocks),
                  static_cast<unsigned>(args.B));
  return launch_dependent_clusters(kernel, grid, static_cast<unsigned>(n_ranks), dim3(32, kWarps),
                                   Shape::kSharedBytes, stream, args, static_cast<int>(rep),
                                   n_row_blocks);
}

bool fits_int8(const AttentionKernelArgs& args) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return args.k_scale == nullptr ||
         (args.D % 16 == 0 && args.T % 4 == 0 && aligned(args.k_scale) && aligned(args.v_scale));
}

}  // namespace

bool fits_attention_decode(const AttentionKernelArgs& args) {
  constexpr int64_t kMaxGridYZ = 65535, kMaxKeys = (int64_t{1} << 31) - 64;
  return args.mask == nullptr && args.S <= kMaxQueries && args.T <= kMaxKeys &&
         is_tensor_core_ready(args) && fits_int8(args) && args.B <= kMaxGridYZ &&
         args.Hq * args.S <= kMaxGridYZ &&
         with_types(args, [](auto type, auto kv_type, auto shape) {
           return largest_cluster<decltype(type), decltype(kv_type), decltype(shape)>() > 0;
         });
}

cudaError_t launch_attention_decode(const AttentionKernelArgs& args, cudaStream_t stream) {
  return with_types(args, [&](auto type, auto kv_type, auto shape) {
    return launch<decltype(type), decltype(kv_type), decltype(shape)>(args, stream);
  });
}

}  // namespace cuda_int4
