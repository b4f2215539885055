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

// What rows [row_begin, row_begin + kBlockRows) of one head see; rows past S count as seeing all.
template <typename Shape>
struct SeenTiles {
  using Tile = SeenTile<Shape::kKeys>;

  const uint32_t* bits;  // of row 0 of the head; nullptr: causality and T alone decide
  const WordSummary* summaries;
  int n_words, n_s, n_tiles, row_begin, T;
  int end;  // of the keys that the last row may see
  bool is_causal;

  __device__ SeenTiles(const AttentionKernelArgs& p, const MaskWords& words, int b, int h,
                       int row_begin)
      : bits(nullptr),
        summaries(nullptr),
        n_words(words.n_words),
        n_s(words.n_s),
        row_begin(row_begin),
        T(static_cast<int>(p.T)),
        is_causal(p.is_causal) {
    const int last_row = min(row_begin + Shape::kBlockRows, static_cast<int>(p.S)) - 1;
    end = is_causal ? min(last_row + 1, T) : T;
    n_tiles = (end + Shape::kKeys - 1) / Shape::kKeys;
    if (words.bits == nullptr) return;
    const int64_t head = int64_t{words.n_b == 1 ? 0 : b} * words.n_h + (words.n_h == 1 ? 0 : h);
    bits = words.bits + head * n_s * n_words;
    summaries = words.summaries + head * ((n_s + kSummaryRows - 1) / kSummaryRows) * n_words;
  }

  __device__ __forceinline__ uint32_t row_word(int row, int word) const {
    if (bits == nullptr) return bits_before(word * 32, is_causal ? min(row + 1, T) : T);
    return bits[static_cast<int64_t>(n_s == 1 ? 0 : min(row, n_s - 1)) * n_words + word];
  }

  __device__ Tile next(int index) const {
    Tile tile = {};
    tile.all = true;
    for (; index < n_tiles; ++index) {
      uint32_t some = 0;
      tile.all = true;
      tile.adds = false;
#pragma unroll
      for (int i = 0; i < Shape::kKeys / 32; ++i) {
        const int word = index * (Shape::kKeys / 32) + i;
        tile.any[i] = 0;
        if (bits == nullptr) {
          const int first_end = is_causal ? min(row_begin + 1, T) : T;  // of the first row's keys
          tile.any[i] = bits_before(word * 32, end);
          tile.all = tile.all && bits_before(word * 32, first_end) == 0xffffffffu;
        } else {
#pragma unroll
          for (int r = 0; r < Shape::kBlockRows / kSummaryRows; ++r) {
            const int rows = n_s == 1 ? 0 : row_begin / kSummaryRows + r;
            if (rows * kSummaryRows >= n_s) continue;
            const WordSummary summary = summaries[static_cast<int64_t>(rows) * n_words + word];
            tile.any[i] |= summary.any;
            tile.all = tile.all && summary.all == 0xffffffffu;
            tile.adds = tile.adds || summary.adds != 0;
          }
        }
        some |= tile.any[i];
      }
      if (some != 0) break;
    }
    tile.index = index;
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
#pragma unroll
    for (int w = 0; w < Shape::kKeys / 32; ++w) {
      const int word = tile.index * (Shape::kKeys / 32) + w;
      const uint32_t seen = seen_tiles.row_word(s, word) >> c2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * w + n][2 * half + j];
          const bool sees = (seen >> (8 * n + j) & 1) != 0;
          if (added != nullptr && sees) {
            const int64_t t = int64_t{word} * 32 + 8 * n + c2 + j;
            score += as_float(added[t * p.mask_strides[3]]) * kLog2E;
          }
          if (!sees) score = -INFINITY;
        }
      }
    }
  }
}

}  // namespace cuda_int4
