// What the kernels for many queries share: the mask as words of bits, which tiles of keys are seen,
// and the softmax of fragments. Fragments are those of mma.m16n8k16: lane (g, c) = (lane / 4,
// lane % 4) holds rows g and g + 8, columns 2c and 2c + 1 of each 8.
#pragma once

#include "attention.cuh"
#include "attention_parts.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

constexpr int kSummaryRows = 64;  // rows that share a summary
// Of 32 keys and kSummaryRows rows: bit t of `any`: some row sees key t; of `all`: each row does;
// of `adds`: the mask adds something other than 0 to the score of some row that sees it.
struct WordSummary {
  uint32_t any, all, adds, unused;
};

// The mask, without the dimensions that it broadcasts over: bits [n_b, n_h, n_s, n_words] and
// summaries [n_b, n_h, ceil(n_s / kSummaryRows), n_words]. Causality is part of it.
struct MaskWords {
  uint32_t* bits;  // nullptr: no mask; then causality is counted, not read
  WordSummary* summaries;
  int n_b, n_h, n_s, n_words;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline MaskWords make_mask_words(const AttentionKernelArgs& args) {
  MaskWords words = {};
  if (args.mask == nullptr) return words;
  words.n_b = static_cast<int>(args.mask_strides[0] == 0 ? 1 : args.B);
  words.n_h = static_cast<int>(args.mask_strides[1] == 0 ? 1 : args.Hq);
  words.n_s = static_cast<int>(args.mask_strides[2] == 0 && !args.is_causal ? 1 : args.S);
  words.n_words = static_cast<int>(ceil_div(args.T, 128) * 4);
  words.summaries = static_cast<WordSummary*>(args.scratch);
  words.bits = reinterpret_cast<uint32_t*>(words.summaries + int64_t{words.n_b} * words.n_h *
                                                                 ceil_div(words.n_s, kSummaryRows) *
                                                                 words.n_words);
  return words;
}

// attention_tiles.cu: fills them; nothing to do without a mask.
cudaError_t launch_attention_mask_words(const AttentionKernelArgs& args, const MaskWords& words,
                                        cudaStream_t stream);

// The next tile that some row of the block sees, and how.
template <int kKeys>
struct SeenTile {
  int index;
  uint32_t any[kKeys / 32];  // keys that some row sees, a bit each
  bool all, adds;
};

// Those of [begin, begin + 32) that come before `end`, a bit each.
__device__ __forceinline__ uint32_t bits_before(int begin, int end) {
  return end <= begin ? 0 : end - begin >= 32 ? 0xffffffffu : 0xffffffffu >> (32 - (end - begin));
}

// Shared memory for SeenTiles: a byte for each tile of keys, if there is a mask.
template <typename Shape>
int64_t tile_flag_bytes(const AttentionKernelArgs& args) {
  return args.mask == nullptr ? 0 : ceil_div(args.T, Shape::kKeys);
}

// The first key that some or every one of a block's rows sees, and the end of them.
struct BlockRange {
  int first_begin, last_begin, first_end, last_end;
};

// Of rows [row_begin, row_begin + kBlockRows) before S; all threads of the block together. Rows that
// see nothing have no say in first_begin and last_end.
template <typename Shape>
__device__ BlockRange find_block_range(const AttentionKernelArgs& p, int b, int row_begin) {
  const int S = static_cast<int>(p.S), T = static_cast<int>(p.T);
  const int end_row = min(row_begin + Shape::kBlockRows, S);
  if (p.input_pos == nullptr) {
    if (!p.is_causal) return {0, 0, T, T};
    return {0, 0, min(row_begin + 1, T), min(end_row, T)};
  }
  __shared__ BlockRange of_warps[Shape::kThreads / 32];
  BlockRange sum = {T, 0, T, 0};
  for (int row = row_begin + static_cast<int>(threadIdx.x); row < end_row; row += Shape::kThreads) {
    const KeyRange range = key_range(p, b, row);
    const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
    sum.last_begin = max(sum.last_begin, begin);
    sum.first_end = min(sum.first_end, end);
    if (begin >= end) continue;
    sum.first_begin = min(sum.first_begin, begin);
    sum.last_end = max(sum.last_end, end);
  }
  const auto take = [&](const BlockRange& other) {
    sum = {min(sum.first_begin, other.first_begin), max(sum.last_begin, other.last_begin),
           min(sum.first_end, other.first_end), max(sum.last_end, other.last_end)};
  };
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    take({__shfl_xor_sync(0xffffffffu, sum.first_begin, offset),
          __shfl_xor_sync(0xffffffffu, sum.last_begin, offset),
          __shfl_xor_sync(0xffffffffu, sum.first_end, offset),
          __shfl_xor_sync(0xffffffffu, sum.last_end, offset)});
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < Shape::kThreads / 32; ++w) take(of_warps[w]);
  return sum;
}

// What rows [row_begin, row_begin + kBlockRows) of one head see; rows past S count as seeing all.
template <typename Shape>
struct SeenTiles {
  static constexpr int kTileWords = Shape::kKeys / 32;
  // Of a tile: some row sees some key, each key is seen by some row, each by each row, and the mask
  // adds something to some score.
  static constexpr uint8_t kSome = 1, kEach = 2, kAll = 4, kAdds = 8;

  const AttentionKernelArgs& p;
  const uint32_t* bits;  // of row 0 of the head; nullptr: causality, positions and T alone decide
  const WordSummary* summaries;
  uint8_t* flags;  // shared memory, [n_tiles]; unused without bits
  int n_words, n_s, b;
  int first_tile, n_tiles;  // those from first_tile on and before n_tiles may be seen
  int row_begin;
  BlockRange range;

  // All threads of the block together; without a mask or positions nothing is read.
  __device__ SeenTiles(const AttentionKernelArgs& p, const MaskWords& words, int b, int h,
                       int row_begin, char* flags)
      : p(p),
        bits(nullptr),
        summaries(nullptr),
        flags(reinterpret_cast<uint8_t*>(flags)),
        n_words(words.n_words),
        n_s(words.n_s),
        b(b),
        row_begin(row_begin),
        range(find_block_range<Shape>(p, b, row_begin)) {
    n_tiles = (range.last_end + Shape::kKeys - 1) / Shape::kKeys;
    first_tile = min(range.first_begin / Shape::kKeys, n_tiles);
    if (words.bits == nullptr) return;
    const int64_t head = int64_t{words.n_b == 1 ? 0 : b} * words.n_h + (words.n_h == 1 ? 0 : h);
    bits = words.bits + head * n_s * n_words;
    summaries = words.summaries + head * ((n_s + kSummaryRows - 1) / kSummaryRows) * n_words;
    for (int index = threadIdx.x; index < n_tiles; index += Shape::kThreads) {
      uint32_t some = 0, each = 0xffffffffu, all = 0xffffffffu, adds = 0;
#pragma unroll
      for (int i = 0; i < kTileWords; ++i) {
        const WordSummary summary = summarize(index * kTileWords + i);
        some |= summary.any;
        each &= summary.any;
        all &= summary.all;
        adds |= summary.adds;
      }
      this->flags[index] =
          static_cast<uint8_t>((some != 0 ? kSome : 0) | (each == 0xffffffffu ? kEach : 0) |
                               (all == 0xffffffffu ? kAll : 0) | (adds != 0 ? kAdds : 0));
    }
    __syncthreads();
  }

  // A word of keys, over all rows of the block.
  __device__ __forceinline__ WordSummary summarize(int word) const {
    WordSummary sum = {0, 0xffffffffu, 0, 0};
#pragma unroll
    for (int r = 0; r < Shape::kBlockRows / kSummaryRows; ++r) {
      const int rows = n_s == 1 ? 0 : row_begin / kSummaryRows + r;
      if (rows * kSummaryRows >= n_s) continue;
      const WordSummary summary = summaries[static_cast<int64_t>(rows) * n_words + word];
      sum.any |= summary.any;
      sum.all &= summary.all;
      sum.adds |= summary.adds;
    }
    return sum;
  }

  // Which keys of tile `index` a row sees.
  __device__ __forceinline__ Elems<uint32_t, kTileWords> row_words(int row, int index) const {
    if (bits != nullptr) {
      const uint32_t* own = bits + static_cast<int64_t>(n_s == 1 ? 0 : min(row, n_s - 1)) * n_words;
      return reinterpret_cast<const Elems<uint32_t, kTileWords>*>(own)[index];
    }
    const KeyRange seen = key_range(p, b, min(row, static_cast<int>(p.S) - 1));
    Elems<uint32_t, kTileWords> words;
#pragma unroll
    for (int i = 0; i < kTileWords; ++i) {
      words.values[i] = bits_in_range(seen, index * Shape::kKeys + i * 32);
    }
    return words;
  }

  // The first seen tile from `index` on; whole warps.
  __device__ SeenTile<Shape::kKeys> next(int index) const {
    SeenTile<Shape::kKeys> tile = {};
    tile.index = index;
    if (bits == nullptr) {
      tile.all = true;
#pragma unroll
      for (int i = 0; i < kTileWords; ++i) {
        const int t0 = index * Shape::kKeys + i * 32;
        tile.any[i] = bits_before(t0, range.last_end) & ~bits_before(t0, range.first_begin);
        tile.all = tile.all && t0 >= range.last_begin && t0 + 32 <= range.first_end;
      }
      return tile;
    }
    for (tile.index = n_tiles; index < n_tiles; index += 32) {
      const int other = index + static_cast<int>(threadIdx.x) % 32;
      const uint32_t seen =
          __ballot_sync(0xffffffffu, other < n_tiles && (flags[other] & kSome) != 0);
      if (seen == 0) continue;
      tile.index = index + __ffs(static_cast<int>(seen)) - 1;
      break;
    }
    if (tile.index == n_tiles) return tile;
    const uint8_t flag = flags[tile.index];
    tile.all = (flag & kAll) != 0;
    tile.adds = (flag & kAdds) != 0;
#pragma unroll
    for (int i = 0; i < kTileWords; ++i) {
      tile.any[i] = (flag & kEach) != 0 ? 0xffffffffu : summarize(tile.index * kTileWords + i).any;
    }
    return tile;
  }
};

// Over the 4 lanes that share a row.
__device__ __forceinline__ float max_over_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float sum_over_row(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// One step of the online softmax of a lane's rows g and g + 8: scores become probabilities; what
// was summed under the old tops is to be multiplied by `rescale`.
template <int kCount>
__device__ __forceinline__ void softmax_step(float (&scores)[kCount][4], float (&top)[2],
                                             float (&sum_p)[2], float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float new_top = top[half];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      new_top = fmaxf(new_top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    new_top = max_over_row(new_top);
    const float reference = new_top == -INFINITY ? 0.f : new_top;  // not inf - inf
    rescale[half] = ex2_approx(top[half] - reference);
    top[half] = new_top;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = scores[n][2 * half + j];
        score = ex2_approx(score - reference);
        sum += score;
      }
    }
    sum_p[half] = sum_p[half] * rescale[half] + sum;
  }
}

template <int kCount>
__device__ __forceinline__ void rescale_sums(float (&sums)[kCount][4], const float (&rescale)[2]) {
  if (!__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) return;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= rescale[i / 2];
  }
}

// What 16 rows of products become before the softmax: scaled to units of log2, capped, with what
// the mask adds; minus infinity where unseen.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_scores(const AttentionKernelArgs& p,
                                              const SeenTiles<Shape>& seen_tiles,
                                              const SeenTile<Shape::kKeys>& tile, int b, int h,
                                              int row, float (&scores)[Shape::kKeys / 8][4]) {
  const float scale = p.scale * kLog2E, softcap = p.softcap * kLog2E;
#pragma unroll
  for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] *= scale;
  }
  if (softcap != 0.f) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = soft_capped(scores[n][i], softcap);
    }
  }
  if (tile.all && !tile.adds) return;
  const int c2 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8
    const int s = row + half * 8;
    const T* added = nullptr;
    if (tile.adds && s < p.S) added = static_cast<const T*>(find_mask_row<T>(p, b, h, s));
    const auto words = seen_tiles.row_words(s, tile.index);
#pragma unroll
    for (int w = 0; w < Shape::kKeys / 32; ++w) {
      const uint32_t seen = words.values[w] >> c2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * w + n][2 * half + j];
          const bool sees = (seen >> (8 * n + j) & 1) != 0;
          if (added != nullptr && sees) {
            const int64_t t = int64_t{tile.index} * Shape::kKeys + 32 * w + 8 * n + c2 + j;
            score += as_float(added[t * p.mask_strides[3]]) * kLog2E;
          }
          if (!sees) score = -INFINITY;
        }
      }
    }
  }
}

}  // namespace cuda_int4
