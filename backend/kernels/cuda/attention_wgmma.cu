// attention_wgmma -- y = softmax(cap(q @ k.T * scale) + mask) @ v for many queries, on sm_90a
//
//   operand  dtype           shape             order in memory                           align
//   q, k, v  f16 | bf16      [B, H, S|T, D]    last dimension contiguous, strides % 8    16 B
//   mask     bool | of q     [B, Hq, S, T]     any strides, 0 where broadcast            dtype
//   input_pos  i32 | i64     [S] | [B, S]      contiguous; in the place of a mask        dtype
//   y (out)  dtype of q      [B, Hq, S, D]     strides % 8                               16 B
//   scratch  u32             the mask as bits and their summary: attention_tiles.cuh
//
// Requires  D % 8 == 0, D <= 256, device code for sm_90a   (checked by fits_attention_wgmma)
// Grid      a block of two warpgroups per 128 queries of one head, the last queries first
// Bytes     keys and values once per block, through L2 for the blocks and heads that share them
// Numerics  as attention_tiles.cu
// Source    FlashAttention-3 (Shah et al., 2024); own. A warpgroup asks for the scores of the next
//           tile and for the sums of this one together: the tensor cores have the sums while it
//           takes the softmax of the scores. Copies are cp.async, the swizzle is in the addresses
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_tiles.cuh"
#include "wgmma.cuh"

namespace cuda_int4 {

namespace {

constexpr int kSharedWithoutWgmma = 4096;

template <int kD_, int kKeys_, int kBlocksPerSm_>
struct WgmmaShape {
  static constexpr int kD = kD_, kKeys = kKeys_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 256, kBlockRows = 128;
  static constexpr int kColumns = kD < 128 ? kD : 128;  // of y, in one instruction
  static constexpr int kQueryTileBytes = kBlockRows * 128, kKeyTileBytes = kKeys * 128;
  static constexpr int kQueryBytes = kQueryTileBytes * (kD / 64);
  static constexpr int kKeyBytes = kKeyTileBytes * (kD / 64);
  static constexpr int kSharedBytes = 1024 + kQueryBytes + 4 * kKeyBytes;  // q, 2 x k, 2 x v
  static_assert(kD % kColumns == 0 && kKeys % 32 == 0, "whole instructions and words");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Rows of a [L, D] matrix to tiles of 64 columns; row i is zeros, and not read, unless bit i of
// `rows`.
template <typename T, typename Shape, int kRows>
__device__ __forceinline__ void load_rows(const T* from, int64_t stride, int D,
                                          const uint32_t (&rows)[kRows / 32], uint32_t to) {
  constexpr int kLanesPerRow = Shape::kD / 8, kStep = Shape::kThreads / kLanesPerRow;
  static_assert(32 % kStep == 0 && kStep % 8 == 0, "steps keep the place in swizzle and word");
  const int first = threadIdx.x / kLanesPerRow, d = threadIdx.x % kLanesPerRow * 8;
  from += first * stride + d;
  to += d / 64 * (kRows * 128) + first * 128 + (d / 8 % 8 ^ first % 8) * 16;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const bool copy = d < D && (rows[i / 32] >> (first + i % 32) & 1) != 0;
    cp_async_16_or_zero(to + i * 128, from, copy);
    from += kStep * stride;
  }
}

// What this thread copied is there for the wgmma of all threads.
__device__ __forceinline__ void wait_for_copies() {
  cp_async_wait<0>();
  fence_proxy_async();
  __syncthreads();
}

// Asks for scores = q @ k.T of the warpgroup's 64 rows.
template <typename T, typename Shape>
__device__ __forceinline__ void ask_scores(uint32_t queries, uint32_t keys,
                                           float (&scores)[Shape::kKeys / 8][4]) {
  wgmma_hold(scores);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < Shape::kD; d += 16) {
    const uint32_t a = queries + d / 64 * Shape::kQueryTileBytes + d % 64 * 2;
    const uint32_t b = keys + d / 64 * Shape::kKeyTileBytes + d % 64 * 2;
    wgmma_ss(scores, wgmma_operand(a, 16), wgmma_operand(b, 16), d != 0, T{});
  }
  wgmma_commit_group();
}

// Asks for sums += p @ v.
template <typename T, typename Shape>
__device__ __forceinline__ void ask_sums(
    const uint32_t (&p)[Shape::kKeys / 16][4], uint32_t values,
    float (&sums)[Shape::kD / Shape::kColumns][Shape::kColumns / 8][4]) {
#pragma unroll
  for (int part = 0; part < Shape::kD / Shape::kColumns; ++part) wgmma_hold(sums[part]);
  wgmma_fence();
#pragma unroll
  for (int key = 0; key < Shape::kKeys; key += 16) {
#pragma unroll
    for (int part = 0; part < Shape::kD / Shape::kColumns; ++part) {
      const uint32_t b = values + part * (Shape::kColumns / 64) * Shape::kKeyTileBytes + key * 128;
      wgmma_rs(sums[part], p[key / 16], wgmma_operand(b, Shape::kKeyTileBytes), T{});
    }
  }
  wgmma_commit_group();
}

template <typename T, int kKeys>
__device__ __forceinline__ void pack_probabilities(const float (&scores)[kKeys / 8][4],
                                                   uint32_t (&p)[kKeys / 16][4]) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    const float (&low)[4] = scores[2 * i], (&high)[4] = scores[2 * i + 1];
    p[i][0] = pack_pair<T>(low[0], low[1]);
    p[i][1] = pack_pair<T>(low[2], low[3]);
    p[i][2] = pack_pair<T>(high[0], high[1]);
    p[i][3] = pack_pair<T>(high[2], high[3]);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    attention_wgmma_kernel(AttentionKernelArgs p, MaskWords words) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kKeys = Shape::kKeys, kParts = Shape::kD / Shape::kColumns;
  extern __shared__ char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int S = static_cast<int>(p.S), D = static_cast<int>(p.D);
  const int n_heads = static_cast<int>(p.B * p.Hq);
  const int n_blocks = gridDim.x / n_heads;  // of a head
  const int row_begin = (n_blocks - 1 - static_cast<int>(blockIdx.x) / n_heads) * Shape::kBlockRows;
  const int head = static_cast<int>(blockIdx.x) % n_heads;
  const int h = head % static_cast<int>(p.Hq), b = head / static_cast<int>(p.Hq);
  const int h_kv = h / static_cast<int>(p.Hq / p.Hkv);
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1];
  const uint32_t queries = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t own_queries = queries + warp / 4 * 64 * 128;
  const uint32_t keys = queries + Shape::kQueryBytes, values = keys + 2 * Shape::kKeyBytes;
  const int row = row_begin + warp * 16 + lane / 4;  // and row + 8
  const SeenTiles<Shape> seen_tiles(p, words, b, h, row_begin, shared + Shape::kSharedBytes);

  const auto load_keys = [&](const SeenTile<kKeys>& tile, int buffer) {
    if (tile.index >= seen_tiles.n_tiles) return;
    load_rows<T, Shape, kKeys>(k + int64_t{tile.index} * kKeys * p.k_strides[2], p.k_strides[2], D,
                               tile.any, keys + buffer * Shape::kKeyBytes);
  };
  const auto load_values = [&](const SeenTile<kKeys>& tile, int buffer) {
    load_rows<T, Shape, kKeys>(v + int64_t{tile.index} * kKeys * p.v_strides[2], p.v_strides[2], D,
                               tile.any, values + buffer * Shape::kKeyBytes);
  };

  SeenTile<kKeys> tile = seen_tiles.next(seen_tiles.first_tile);
  uint32_t own_rows[Shape::kBlockRows / 32];  // those before S
#pragma unroll
  for (int i = 0; i < Shape::kBlockRows / 32; ++i) own_rows[i] = bits_before(row_begin + 32 * i, S);
  load_rows<T, Shape, Shape::kBlockRows>(static_cast<const T*>(p.q) + b * p.q_strides[0] +
                                             h * p.q_strides[1] +
                                             int64_t{row_begin} * p.q_strides[2],
                                         p.q_strides[2], D, own_rows, queries);
  load_keys(tile, 0);
  cp_async_commit();

  float top[2] = {-INFINITY, -INFINITY}, sum_p[2] = {}, rescale[2];
  float sums[kParts][Shape::kColumns / 8][4], scores[kKeys / 8][4];
  uint32_t probabilities[kKeys / 16][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int n = 0; n < Shape::kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[part][n][i] = 0.f;
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
  }

  wait_for_copies();
  if (tile.index < seen_tiles.n_tiles) {
    SeenTile<kKeys> next_tile = seen_tiles.next(tile.index + 1);
    load_values(tile, 0);
    load_keys(next_tile, 1);
    cp_async_commit();
    ask_scores<T, Shape>(own_queries, keys, scores);
    wgmma_wait_group<0>();
    wgmma_hold(scores);
    finish_scores<T, Shape>(p, seen_tiles, tile, b, h, row, scores);
    softmax_step(scores, top, sum_p, rescale);
    pack_probabilities<T, kKeys>(scores, probabilities);

    int buffer = 0;  // of `tile`; that of `next_tile` is the other
    while (next_tile.index < seen_tiles.n_tiles) {
      const SeenTile<kKeys> tile_after = seen_tiles.next(next_tile.index + 1);
      wait_for_copies();  // values of `tile`, keys of `next_tile`; all are done with those before
      load_values(next_tile, buffer ^ 1);
      load_keys(tile_after, buffer);
      cp_async_commit();
      ask_scores<T, Shape>(own_queries, keys + (buffer ^ 1) * Shape::kKeyBytes, scores);
      ask_sums<T, Shape>(probabilities, values + buffer * Shape::kKeyBytes, sums);
      wgmma_wait_group<1>();
      wgmma_hold(scores);
      finish_scores<T, Shape>(p, seen_tiles, next_tile, b, h, row, scores);
      softmax_step(scores, top, sum_p, rescale);
      wgmma_wait_group<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        wgmma_hold(sums[part]);
        rescale_sums(sums[part], rescale);
      }
      pack_probabilities<T, kKeys>(scores, probabilities);
      tile = next_tile;
      next_tile = tile_after;
      buffer ^= 1;
    }
    wait_for_copies();
    ask_sums<T, Shape>(probabilities, values + buffer * Shape::kKeyBytes, sums);
    wgmma_wait_group<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) wgmma_hold(sums[part]);
  }

  // Through shared memory, where the warp's queries were, to whole 16-byte pieces of y.
  char* own = shared + (queries - shared_address(shared)) + warp * 16 * 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_over_row(sum_p[half]);
    const float factor = total == 0.f ? 0.f : 1.f / total;
    const int own_row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < Shape::kD / 8; ++n) {
      const auto& sum = sums[n * 8 / Shape::kColumns][n % (Shape::kColumns / 8)];
      char* to = own + n / 8 * Shape::kQueryTileBytes + own_row * 128 + (n % 8 ^ own_row % 8) * 16;
      *reinterpret_cast<uint32_t*>(to + lane % 4 * 4) =
          pack_pair<T>(sum[2 * half] * factor, sum[2 * half + 1] * factor);
    }
  }
  __syncwarp();
  constexpr int kPieces = Shape::kD / 8;
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int own_row = i / kPieces, n = i % kPieces, s = row_begin + warp * 16 + own_row;
    if (s >= S || n * 8 >= D) continue;
    const char* from =
        own + n / 8 * Shape::kQueryTileBytes + own_row * 128 + (n % 8 ^ own_row % 8) * 16;
    T* y =
        static_cast<T*>(p.y) + b * p.y_strides[0] + h * p.y_strides[1] + s * p.y_strides[2] + n * 8;
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from);
  }
#else
  // Compiled without wgmma, and never launched: this much static shared memory is how the host knows.
  __shared__ volatile char not_this_one[kSharedWithoutWgmma];
  not_this_one[0] = 0;
#endif
}

// Whether the code that runs on this device has wgmma in it.
template <typename T, typename Shape>
bool has_kernel() {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, attention_wgmma_kernel<T, Shape>) != cudaSuccess) {
    cudaGetLastError();  // not ours to report: there are other kernels
    return false;
  }
  return attributes.sharedSizeBytes < kSharedWithoutWgmma;
}

template <typename T, typename Shape>
cudaError_t launch(const AttentionKernelArgs& args, cudaStream_t stream) {
  const MaskWords words = make_mask_words(args);
  cudaError_t code = launch_attention_mask_words(args, words, stream);
  if (code != cudaSuccess) return code;
  const auto kernel = attention_wgmma_kernel<T, Shape>;
  const int shared_bytes = Shape::kSharedBytes + static_cast<int>(tile_flag_bytes<Shape>(args));
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (code != cudaSuccess) return code;
  const int64_t n_blocks = ceil_div(args.S, Shape::kBlockRows) * args.B * args.Hq;
  kernel<<<static_cast<unsigned>(n_blocks), Shape::kThreads, shared_bytes, stream>>>(args, words);
  return cudaGetLastError();
}

// f(T{}, WgmmaShape) for the smallest kD that holds D.
template <typename T, typename F>
auto with_shape(const AttentionKernelArgs& args, F f) {
  if (args.D <= 64) return f(T{}, WgmmaShape<64, 64, 2>{});
  if (args.D <= 128) return f(T{}, WgmmaShape<128, 128, 1>{});
  return f(T{}, WgmmaShape<256, 64, 1>{});
}

template <typename F>
auto with_types(const AttentionKernelArgs& args, F f) {
  return args.dtype == DType::kFloat16 ? with_shape<__half>(args, f)
                                       : with_shape<__nv_bfloat16>(args, f);
}

}  // namespace

bool fits_attention_wgmma(const AttentionKernelArgs& args) {
  // Heads of 72 and 80 would be padded to 128: the smaller instructions of attention_tiles win. So
  // do its smaller blocks where there are few.
  const bool is_wasteful = args.D > 64 && args.D <= 80;
  const int64_t n_blocks = ceil_div(args.S, 128) * args.B * args.Hq;
  if (is_wasteful || args.D > 256 || !fits_attention_tiles(args) ||
      2 * n_blocks < device_attribute(cudaDevAttrMultiProcessorCount)) {
    return false;
  }
  const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return with_types(args, [&](auto type, auto shape) {
    using Shape = decltype(shape);
    return Shape::kSharedBytes + tile_flag_bytes<Shape>(args) <= most_shared &&
           has_kernel<decltype(type), Shape>();
  });
}

cudaError_t launch_attention_wgmma(const AttentionKernelArgs& args, cudaStream_t stream) {
  return with_types(args, [&](auto type, auto shape) {
    return launch<decltype(type), decltype(shape)>(args, stream);
  });
}

}  // namespace cuda_int4
