// Persistent wgmma kernels (sm_90a) of y^T = W x^T: which tiles a block computes, how tiles cut along K
// are added up, how y leaves, and the tensor maps that the copy engine reads by.
//
// A tile is some weight rows by some rows of x (tokens), and its reduction is cut into stages. Whole
// tiles while there are enough for all blocks; what is left is cut into equal ranges of stages (stream-K),
// where the block with a tile's last stage adds up the others' partial sums, in the order of k. It only
// ever waits for blocks of lower index, and all blocks are resident: one a multiprocessor.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "numeric.cuh"
#include "ptx.cuh"
#include "w4a16_fragments.cuh"

namespace cuda_int4 {

constexpr int kFlagBytes = 8192;
constexpr int kMaxBlocks = kFlagBytes / 8;
constexpr int kSharedLimit = 227 * 1024;
// What a block writes to its flag when its partial sums are there. Scratch is not cleared: these are 64
// bits that nothing writes by accident, and who waits for them puts 0 in their place, so that the next
// launch does not find them. A kernel that clears flags first costs 0.4 to 1.1 us a call.
constexpr uint64_t kPublished = 0xB5297A4D3F84D5E7u;

// ---- the division of work ----

struct TilePlan {
  int tiles_m, n_tiles, stages_per_tile;
  int grid, whole_waves;  // of tiles that one block computes alone

  uint64_t n_cut_tiles() const { return n_tiles - uint64_t(whole_waves) * grid; }
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline TilePlan plan_tiles(int64_t M, int64_t N, int64_t K, int tile_tokens, int tile_rows,
                           int stage_k, int n_multiprocessors) {
  TilePlan plan = {};
  plan.tiles_m = ceil_div(M, tile_tokens);
  plan.n_tiles = plan.tiles_m * ceil_div(N, tile_rows);
  plan.stages_per_tile = ceil_div(K, stage_k);
  plan.grid = std::min(n_multiprocessors, kMaxBlocks);
  plan.whole_waves = plan.n_tiles / plan.grid;
  if (plan.whole_waves == 0) {
    // Few tiles: the same number of blocks to each, if that keeps nine in ten multiprocessors busy.
    const int blocks_per_tile = std::min(plan.grid / plan.n_tiles, plan.stages_per_tile);
    const int blocks = plan.n_tiles * blocks_per_tile;
    if (10 * blocks >= 9 * plan.grid || blocks_per_tile == plan.stages_per_tile) plan.grid = blocks;
    if (plan.grid == plan.n_tiles) plan.whole_waves = 1;
  } else if (plan.n_tiles % plan.grid != 0) {
    --plan.whole_waves;  // the last whole wave and the rest are cut together
  }
  return plan;
}

// Flags, then one tile of partial sums per block.
inline uint64_t tile_scratch_bytes(const TilePlan& plan, int tile_tokens, int tile_rows) {
  const uint64_t tile_bytes = uint64_t(tile_rows) * tile_tokens * sizeof(float);
  return kFlagBytes + (plan.n_cut_tiles() == 0 ? 0 : plan.grid * tile_bytes);
}

// The pieces of work of one block, in order: whole tiles, then its range of the rest from the end.
struct Schedule {
  int wave = 0, waves, block, grid, stages;
  int64_t first_tile, begin, cursor;

  __device__ __forceinline__ explicit Schedule(const TilePlan& plan)
      : waves(plan.whole_waves), block(blockIdx.x), grid(gridDim.x), stages(plan.stages_per_tile) {
    first_tile = int64_t{waves} * grid;
    units = (plan.n_tiles - first_tile) * stages;
    begin = begin_of(block);
    cursor = begin_of(block + 1);
  }
  int64_t units;
  __device__ __forceinline__ int64_t begin_of(int b) const { return units * b / grid; }

  // Stages [k_begin, k_end) of `tile`.
  int tile, k_begin, k_end;
  __device__ __forceinline__ bool next() {
    if (wave < waves) {
      tile = wave++ * grid + block;
      k_begin = 0;
      k_end = stages;
      return true;
    }
    if (cursor <= begin) return false;
    const int64_t rest_tile = (cursor - 1) / stages, start = rest_tile * stages;
    tile = static_cast<int>(first_tile + rest_tile);
    k_end = static_cast<int>(cursor - start);
    k_begin = begin > start ? static_cast<int>(begin - start) : 0;
    cursor = start + k_begin;
    return true;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Called by kThreads threads of a block, thread 0 to kThreads - 1, with their sums of a range of k of
// work.tile; barrier 1 is theirs. True: the sums are whole now. False: another block has them.
template <int kThreads, int kSums>
__device__ __forceinline__ bool add_partial_sums(const Schedule& work, float* partials,
                                                 uint64_t* flags, int thread, float (&sum)[kSums]) {
  constexpr int kQuads = kSums / 4;
  if (work.k_end < work.stages) {  // the block with the last stage of this tile adds this up
    float4* partial =
        reinterpret_cast<float4*>(partials) + int64_t{blockIdx.x} * kQuads * kThreads + thread;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float* s = sum + 4 * i;
      __stcg(partial + i * kThreads, make_float4(s[0], s[1], s[2], s[3]));
    }
    bar_sync(1, kThreads);
    if (thread == 0) st_release_gpu(flags + blockIdx.x, kPublished);
    return false;
  }
  if (work.k_begin == 0) return true;
  const int64_t start = (work.tile - work.first_tile) * work.stages;
  int first = work.block - 1;  // of the blocks that hold the rest
  while (work.begin_of(first) > start) --first;
  for (int b = first + thread; b < work.block; b += kThreads) {
    while (ld_acquire_gpu(flags + b) != kPublished) {
    }
    flags[b] = 0;  // as it must be when the next launch begins
  }
  bar_sync(1, kThreads);
  for (int b = work.block - 1; b >= first; --b) {
    const float4* partial =
        reinterpret_cast<const float4*>(partials) + int64_t{b} * kQuads * kThreads + thread;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float4 v = __ldcg(partial + i * kThreads);
      float* s = sum + 4 * i;
      s[0] += v.x;
      s[1] += v.y;
      s[2] += v.z;
      s[3] += v.w;
    }
  }
  return true;
}

// ---- operands ----

__device__ __forceinline__ void spin_until(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Matrix descriptor of the B operand: rows of 128 bytes, 128-byte swizzle, 8 rows 1024 bytes apart. The
// high word is the same for all.
constexpr uint32_t kDescriptorHigh = (1u << 30) | (1024 >> 4);
__device__ __forceinline__ uint32_t descriptor_of(uint32_t shared) {
  return (1u << 16) | ((shared & 0x3FFFF) >> 4);
}
__device__ __forceinline__ uint64_t whole_descriptor(uint32_t low) {
  return (uint64_t{kDescriptorHigh} << 32) | low;
}

// The instruction of each width, by number.
template <int kTokens>
struct Wgmma;
#define CUDA_INT4_WGMMA(n)                                                                \
  template <>                                                                             \
  struct Wgmma<n> {                                                                       \
    template <typename T>                                                                 \
    static __device__ __forceinline__ void run(float (&d)[n / 2], const uint32_t (&a)[4], \
                                               uint32_t b) {                              \
      wgmma_m64n##n##k16(d, a, whole_descriptor(b), T());                                 \
    }                                                                                     \
  };
CUDA_INT4_WGMMA(32)
CUDA_INT4_WGMMA(64)
CUDA_INT4_WGMMA(128)
CUDA_INT4_WGMMA(256)
#undef CUDA_INT4_WGMMA

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// ---- tensor maps ----

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that nothing links libcuda; nullptr: it is too old.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

// A row-major matrix [rows, row_bytes] in boxes of box_rows x box_bytes, at most 256 elements each way.
// Rows and `data` at 16 bytes; what a box has beyond the matrix arrives as 0.
inline bool encode_matrix(CUtensorMap* map, const void* data, CUtensorMapDataType type,
                          int element_bytes, int64_t rows, int64_t row_bytes, int box_rows,
                          int box_bytes, CUtensorMapSwizzle swizzle) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes / element_bytes),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes / element_bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t strides[2] = {1, 1};
  return encode_tiled()(map, type, 2, const_cast<void*>(data), sizes, pitch, box, strides,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// x [M, K] of 16-bit elements in boxes of tile_tokens x 64, as the B operand of wgmma.
inline bool encode_tokens(CUtensorMap* map, const void* x, DType dtype, int64_t M, int64_t K,
                          int tile_tokens) {
  return encode_matrix(
      map, x,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, M, K * 2, tile_tokens, 128, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace cuda_int4
