// attention_tiles -- y = softmax(cap(q @ k.T * scale) + mask) @ v for many queries, on tensor cores
//
//   operand  dtype           shape             order in memory                           align
//   q, k, v  f16 | bf16      [B, H, S|T, D]    last dimension contiguous, strides % 8    16 B
//   mask     bool | of q     [B, Hq, S, T]     any strides, 0 where broadcast            dtype
//   input_pos  i32 | i64     [S] | [B, S]      contiguous; in the place of a mask        dtype
//   y (out)  dtype of q      [B, Hq, S, D]     strides % 8                               16 B
//   scratch  u32             the mask as bits and their summary: attention_tiles.cuh
//
// Requires  D % 8 == 0, D <= 512   (checked by fits_attention_tiles)
// Grid      a block of 4 warps (8 above D = 256) per kBlockRows queries of one head, the last
//           queries first: with a causal mask they see the most keys. A warp has kRowTiles * 16
//           rows; above D = 256 two warps share rows, each for half of the columns of y
// Bytes     keys and values once per block, through L2 for the blocks and heads that share them
// Numerics  scores, softmax and sums in fp32; exp(score - top) is rounded to the dtype for the
//           product with v. A row that sees nothing is 0. Keys that no query of the block sees have
//           no effect, whatever lies there, and cost no time where whole tiles are unseen
// Source    FlashAttention-2 (Dao, 2023); own. The mask goes to bits once, in a kernel before: read
//           by every head it would cost more than keys and values
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_tiles.cuh"

namespace cuda_int4 {

namespace {

constexpr int kRowWarps = 4;       // warps of a block with different rows
constexpr int kMaskThreads = 256;  // 64 rows x 4 words

// Blocks (4 words, kSummaryRows rows, b * n_h + h).
template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    attention_mask_words(AttentionKernelArgs p, MaskWords words) {
  __shared__ WordSummary parts[kMaskThreads / 32][4];
  const int tid = threadIdx.x, word = blockIdx.x * 4 + tid % 4;
  const int s = blockIdx.y * kSummaryRows + tid / 4;
  const int b = blockIdx.z / words.n_h, h = blockIdx.z % words.n_h;
  uint32_t seen = 0, adds = 0;
  if (s < words.n_s) {
    const void* row = find_mask_row<T>(p, b, h, s);
    seen = seen_keys<T, 32>(p, row, key_range(p, b, s), int64_t{word} * 32, &adds);
    words.bits[(int64_t{blockIdx.z} * words.n_s + s) * words.n_words + word] = seen;
  }
  WordSummary sum = {seen, s < words.n_s ? seen : 0xffffffffu, adds, 0};
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    sum.any |= __shfl_xor_sync(0xffffffffu, sum.any, offset);
    sum.all &= __shfl_xor_sync(0xffffffffu, sum.all, offset);
    sum.adds |= __shfl_xor_sync(0xffffffffu, sum.adds, offset);
  }
  if (tid % 32 < 4) parts[tid / 32][tid % 32] = sum;
  __syncthreads();
  if (tid >= 4) return;
#pragma unroll
  for (int w = 1; w < kMaskThreads / 32; ++w) {
    sum.any |= parts[w][tid].any;
    sum.all &= parts[w][tid].all;
    sum.adds |= parts[w][tid].adds;
  }
  words.summaries[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * words.n_words + word] = sum;
}

template <int kD_, int kRowTiles_, int kColumnWarps_, int kKeys_>
struct TileShape {
  static constexpr int kD = kD_, kRowTiles = kRowTiles_, kColumnWarps = kColumnWarps_;
  static constexpr int kKeys = kKeys_;  // of a tile
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kBlockRows = 16 * kRowWarps * kRowTiles;
  static constexpr int kPitch = kD + 8;  // elements; rows fall on different banks for ldmatrix
  static constexpr int kColumns = kD / kColumnWarps;  // of y, of a warp
  static constexpr int kTileElems = kKeys * kPitch;
  static constexpr int kSharedBytes = (kBlockRows * kPitch + 4 * kTileElems) * 2;  // q, 2 x (k, v)
  static constexpr int kLanesPerRow = kD <= 64 ? 8 : kD <= 128 ? 16 : kD <= 256 ? 32 : 64;
  static_assert(kBlockRows % kSummaryRows == 0, "a block's rows are whole summaries");
  static_assert(kColumns % 16 == 0 && kKeys % 32 == 0, "whole fragments and words");
};

// Rows of a [L, D] matrix to shared memory; row i is zeros, and not read, unless bit i of `rows`.
template <typename T, typename Shape, int kRows>
__device__ __forceinline__ void load_rows(const T* from, int64_t stride, int D,
                                          const uint32_t (&rows)[kRows / 32], uint32_t to) {
  constexpr int kStep = Shape::kThreads / Shape::kLanesPerRow;
  static_assert(32 % kStep == 0, "the rows of a step are within one word");
  const int first = threadIdx.x / Shape::kLanesPerRow;
  const int d = threadIdx.x % Shape::kLanesPerRow * 8;
  if (d >= Shape::kD) return;
  from += first * stride + d;
  to += (first * Shape::kPitch + d) * 2;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const bool copy = d < D && (rows[i / 32] >> (first + i % 32) & 1) != 0;
    cp_async_16_or_zero(to + i * Shape::kPitch * 2, from, copy);
    from += kStep * stride;
  }
}

// scores[r][n] = q rows 16r.. of the warp x keys 8n..
template <typename T, typename Shape>
__device__ __forceinline__ void mma_scores(uint32_t queries, uint32_t keys,
                                           float (&scores)[Shape::kRowTiles][Shape::kKeys / 8][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t q_at = queries + (lane % 16 * Shape::kPitch + lane / 16 * 8) * 2;
  const uint32_t k_at = keys + ((lane % 8 + lane / 16 * 8) * Shape::kPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[r][n][i] = 0.f;
    }
  }
#pragma unroll
  for (int d = 0; d < Shape::kD; d += 16) {
    uint32_t q[Shape::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      ldmatrix_x4(q[r], q_at + (r * 16 * Shape::kPitch + d) * 2);
    }
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; n += 2) {
      uint32_t k[4];
      ldmatrix_x4(k, k_at + (n * 8 * Shape::kPitch + d) * 2);
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        mma_m16n8k16(scores[r][n], q[r], {k[0], k[1]}, T{});
        mma_m16n8k16(scores[r][n + 1], q[r], {k[2], k[3]}, T{});
      }
    }
  }
}

// sums[r][n] += p[rows 16r..] @ v[columns 8n.. of the warp]
template <typename T, typename Shape>
__device__ __forceinline__ void mma_sums(
    const float (&scores)[Shape::kRowTiles][Shape::kKeys / 8][4], uint32_t values,
    float (&sums)[Shape::kRowTiles][Shape::kColumns / 8][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t v_at =
      values + ((lane % 8 + lane / 8 % 2 * 8) * Shape::kPitch + lane / 16 * 8) * 2;
#pragma unroll
  for (int key = 0; key < Shape::kKeys; key += 16) {
    uint32_t p[Shape::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      const float (&low)[4] = scores[r][key / 8], (&high)[4] = scores[r][key / 8 + 1];
      p[r][0] = pack_pair<T>(low[0], low[1]);
      p[r][1] = pack_pair<T>(low[2], low[3]);
      p[r][2] = pack_pair<T>(high[0], high[1]);
      p[r][3] = pack_pair<T>(high[2], high[3]);
    }
#pragma unroll
    for (int n = 0; n < Shape::kColumns / 8; n += 2) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, v_at + (key * Shape::kPitch + n * 8) * 2);
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        mma_m16n8k16(sums[r][n], p[r], {v[0], v[1]}, T{});
        mma_m16n8k16(sums[r][n + 1], p[r], {v[2], v[3]}, T{});
      }
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_tiles_kernel(AttentionKernelArgs p, MaskWords words) {
  constexpr int kKeys = Shape::kKeys;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Shape::kColumnWarps * 16 * Shape::kRowTiles;
  const int warp_column = warp % Shape::kColumnWarps * Shape::kColumns;
  const int S = static_cast<int>(p.S), D = static_cast<int>(p.D);
  const int n_heads = static_cast<int>(p.B * p.Hq);
  const int n_blocks = gridDim.x / n_heads;  // of a head
  const int row_begin = (n_blocks - 1 - static_cast<int>(blockIdx.x) / n_heads) * Shape::kBlockRows;
  const int head = static_cast<int>(blockIdx.x) % n_heads;
  const int h = head % static_cast<int>(p.Hq), b = head / static_cast<int>(p.Hq);
  const int h_kv = h / static_cast<int>(p.Hq / p.Hkv);
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1];
  const uint32_t queries = shared_address(shared);
  const uint32_t tiles = queries + Shape::kBlockRows * Shape::kPitch * 2;
  const SeenTiles<Shape> seen_tiles(p, words, b, h, row_begin, shared + Shape::kSharedBytes);

  const auto load_keys_and_values = [&](const SeenTile<kKeys>& tile, int buffer) {
    const int64_t t0 = int64_t{tile.index} * kKeys;
    const uint32_t to = tiles + buffer * 2 * Shape::kTileElems * 2;
    load_rows<T, Shape, kKeys>(k + t0 * p.k_strides[2], p.k_strides[2], D, tile.any, to);
    load_rows<T, Shape, kKeys>(v + t0 * p.v_strides[2], p.v_strides[2], D, tile.any,
                               to + Shape::kTileElems * 2);
  };

  SeenTile<kKeys> tile = seen_tiles.next(seen_tiles.first_tile);
  uint32_t own_rows[Shape::kBlockRows / 32];  // those before S
#pragma unroll
  for (int i = 0; i < Shape::kBlockRows / 32; ++i) own_rows[i] = bits_before(row_begin + 32 * i, S);
  load_rows<T, Shape, Shape::kBlockRows>(static_cast<const T*>(p.q) + b * p.q_strides[0] +
                                             h * p.q_strides[1] +
                                             int64_t{row_begin} * p.q_strides[2],
                                         p.q_strides[2], D, own_rows, queries);
  if (tile.index < seen_tiles.n_tiles) load_keys_and_values(tile, 0);
  cp_async_commit();

  float top[Shape::kRowTiles][2], sum_p[Shape::kRowTiles][2];
  float sums[Shape::kRowTiles][Shape::kColumns / 8][4];
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    top[r][0] = top[r][1] = -INFINITY;
    sum_p[r][0] = sum_p[r][1] = 0.f;
#pragma unroll
    for (int n = 0; n < Shape::kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][n][i] = 0.f;
    }
  }

  for (int buffer = 0; tile.index < seen_tiles.n_tiles; buffer ^= 1) {
    const SeenTile<kKeys> next_tile = seen_tiles.next(tile.index + 1);
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and all are done with the one before
    if (next_tile.index < seen_tiles.n_tiles) load_keys_and_values(next_tile, buffer ^ 1);
    cp_async_commit();

    const uint32_t keys = tiles + buffer * 2 * Shape::kTileElems * 2;
    float scores[Shape::kRowTiles][kKeys / 8][4];
    mma_scores<T, Shape>(queries + warp_row * Shape::kPitch * 2, keys, scores);
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      finish_scores<T, Shape>(p, seen_tiles, tile, b, h, row_begin + warp_row + 16 * r + lane / 4,
                              scores[r]);
      float rescale[2];
      softmax_step(scores[r], top[r], sum_p[r], rescale);
      rescale_sums(sums[r], rescale);
    }
    mma_sums<T, Shape>(scores, keys + (Shape::kTileElems + warp_column) * 2, sums);
    tile = next_tile;
  }

  // Through shared memory, where the queries were, to whole 16-byte pieces of y.
  cp_async_wait<0>();
  __syncthreads();
  T* own = reinterpret_cast<T*>(shared) + warp_row * Shape::kPitch + warp_column;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_over_row(sum_p[r][half]);
      const float factor = total == 0.f ? 0.f : 1.f / total;
      T* row = own + (16 * r + 8 * half + lane / 4) * Shape::kPitch + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kColumns / 8; ++n) {
        *reinterpret_cast<uint32_t*>(row + 8 * n) =
            pack_pair<T>(sums[r][n][2 * half] * factor, sums[r][n][2 * half + 1] * factor);
      }
    }
  }
  __syncwarp();
  constexpr int kPieces = Shape::kColumns / 8;
  for (int i = lane; i < 16 * Shape::kRowTiles * kPieces; i += 32) {
    const int row = i / kPieces, d = i % kPieces * 8, s = row_begin + warp_row + row;
    if (s >= S || warp_column + d >= D) continue;
    T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + h * p.y_strides[1] + s * p.y_strides[2] +
           warp_column + d;
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(own + row * Shape::kPitch + d);
  }
}

// ---- host ----

template <typename T, typename Shape>
cudaError_t launch(const AttentionKernelArgs& args, const MaskWords& words, cudaStream_t stream) {
  const auto kernel = attention_tiles_kernel<T, Shape>;
  const int shared_bytes = Shape::kSharedBytes + static_cast<int>(tile_flag_bytes<Shape>(args));
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (code != cudaSuccess) return code;
  const int64_t n_blocks = ceil_div(args.S, Shape::kBlockRows) * args.B * args.Hq;
  kernel<<<static_cast<unsigned>(n_blocks), Shape::kThreads, shared_bytes, stream>>>(args, words);
  return cudaGetLastError();
}

// f(TileShape) for the smallest kD that holds D; 32 rows a warp where that leaves work for all.
template <typename F>
auto with_shape(const AttentionKernelArgs& args, F f) {
  const int n_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool is_large = args.B * args.Hq * ceil_div(args.S, 128) >= n_sms &&
                        TileShape<128, 2, 1, 64>::kSharedBytes <= most_shared;
  if (args.D > 256) return f(TileShape<512, 1, 2, 32>{});
  if (args.D > 128) return f(TileShape<256, 1, 1, 32>{});
  if (args.D > 96) return is_large ? f(TileShape<128, 2, 1, 64>{}) : f(TileShape<128, 1, 1, 64>{});
  if (args.D > 80) return is_large ? f(TileShape<96, 2, 1, 64>{}) : f(TileShape<96, 1, 1, 64>{});
  if (args.D > 64) return is_large ? f(TileShape<80, 2, 1, 64>{}) : f(TileShape<80, 1, 1, 64>{});
  return is_large ? f(TileShape<64, 2, 1, 64>{}) : f(TileShape<64, 1, 1, 64>{});
}

template <typename T>
cudaError_t launch_of_dtype(const AttentionKernelArgs& args, cudaStream_t stream) {
  const MaskWords words = make_mask_words(args);
  const cudaError_t code = launch_attention_mask_words(args, words, stream);
  if (code != cudaSuccess) return code;
  return with_shape(args,
                    [&](auto shape) { return launch<T, decltype(shape)>(args, words, stream); });
}

}  // namespace

cudaError_t launch_attention_mask_words(const AttentionKernelArgs& args, const MaskWords& words,
                                        cudaStream_t stream) {
  if (words.bits == nullptr || args.T == 0) return cudaSuccess;
  const dim3 grid(words.n_words / 4, static_cast<unsigned>(ceil_div(words.n_s, kSummaryRows)),
                  words.n_b * words.n_h);
  if (args.dtype == DType::kFloat16) {
    attention_mask_words<__half><<<grid, kMaskThreads, 0, stream>>>(args, words);
  } else {
    attention_mask_words<__nv_bfloat16><<<grid, kMaskThreads, 0, stream>>>(args, words);
  }
  return cudaGetLastError();
}

bool fits_attention_tiles(const AttentionKernelArgs& args) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30, kMaxGridYZ = 65535;
  const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return is_tensor_core_ready(args) && args.S < kMaxBlocks && args.T < kMaxBlocks &&
         ceil_div(args.S, kSummaryRows) <= kMaxGridYZ && args.B * args.Hq <= kMaxGridYZ &&
         with_shape(
             args,
             [&](auto shape) {
               using Shape = decltype(shape);
               return Shape::kSharedBytes + tile_flag_bytes<Shape>(args) <= most_shared;
             });
}

uint64_t attention_tiles_scratch_bytes(const AttentionKernelArgs& args) {
  if (args.mask == nullptr) return 0;
  const MaskWords words = make_mask_words(args);
  const int64_t n_heads = int64_t{words.n_b} * words.n_h;
  return static_cast<uint64_t>(n_heads * words.n_words) *
         (ceil_div(words.n_s, kSummaryRows) * sizeof(WordSummary) + words.n_s * sizeof(uint32_t));
}

cudaError_t launch_attention_tiles(const AttentionKernelArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::kFloat16) return launch_of_dtype<__half>(args, stream);
  return launch_of_dtype<__nv_bfloat16>(args, stream);
}

}  // namespace cuda_int4
