// matmul_w4a16_wgmma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g]
//                                 + bias[n],  g = k / group_size
//
//   operand     dtype               shape          order in memory                              align
//   x           f16 | bf16          [M, K]         row-major                                    16 B
//   qdata       u8                  [N, K/2]       row-major; even k in the low nibble          16 B
//   scale       f16 | bf16 | f32    [N, n_groups]  row-major                                    dtype
//   zero_point  of scale | f32      [N, n_groups]  row-major; absent means 8                    dtype
//   bias        dtype of x          [N]            contiguous; absent means 0                   2 B
//   y (out)     dtype of x          [M, N]         row-major                                    2 B
//   scratch     flags, f32          wgmma_scratch_bytes; neither cleared before nor after       64 B
//
// Requires  sm_90a; K % 32 == 0; group_size in {32, 64, 128, 256} or K; M, N, K < 2^31
// Grid      persistent, one block a multiprocessor: y^T = W x^T in tiles of kRows weight rows x kTokens
//           rows of x. Whole tiles while there are enough for all blocks; what is left is cut into
//           equal ranges of k (stream-K), where the block with a tile's last k adds up the others'
//           partial sums, in the order of k. It only ever waits for blocks of lower index.
// Block     2 or 4 consumer warpgroups (wgmma, weights from registers) and one producer warpgroup: one
//           thread feeds a ring of stages (codes and x, by the copy engine), three warps stage the
//           scales and, up to 32 rows of x, permute x in shared memory
// Bytes     reads qdata and scales once per kTokens rows of x, x once per kRows weight rows (L2);
//           bound by memory and by decoding up to M = 64, by the tensor cores above
// Numerics  weights rounded once to the dtype of x (w4a16_fragments.cuh), scales of another dtype once
//           more; fp32 sums, one rounding at the store. Same inputs on the same GPU, same bits
// Source    direct; PTX ISA, wgmma and cp.async.bulk.tensor; stream-K: Osama et al., 2023
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch_dependent.cuh"
#include "matmul_w4a16.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "w4a16_fragments.cuh"
#include "wgmma_tiles.cuh"

#pragma nv_diag_suppress 177  // below sm_90a the kernel is empty, and what it calls unused

namespace cuda_int4 {

namespace {

constexpr int kChunkK = 32;        // codes of a row in 16 bytes
constexpr int kUnitK = 64;         // k of one 128-byte row of x in shared memory
constexpr int kGroups = 4;         // of a weight row, staged together
constexpr int kScaleThreads = 96;  // producers that stage scales and permute x
// kWarpgroups of consumers with 64 weight rows each; kTokens rows of x; kStageK per stage of the ring.
// kPermuted: each lane decodes 16 bytes of codes of its own, and the producers permute x in shared memory
// to match. Else the four lanes of a row read the same 16 bytes, and each takes its bytes of them: a
// quarter more instructions, and x as it is.
template <int kWarpgroups_, int kTokens_, int kStageK_, bool kPermuted_>
struct Config {
  static constexpr int kWarpgroups = kWarpgroups_, kTokens = kTokens_, kStageK = kStageK_;
  static constexpr bool kPermuted = kPermuted_;
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kConsumers = kWarpgroups * 128;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kSums = kTokens / 2;  // per thread
  static constexpr int kXBytes = kTokens * kStageK * 2;
  static constexpr int kQRowBytes = kStageK / 2;
  // Threads of a warp that hand scales over. One is enough behind a __syncwarp, but racecheck does not
  // follow that; in tiles of 256 all 32 cost two spilled registers in the main loop, 2 to 13 %.
#ifdef CUDA_INT4_COMPUTE_SANITIZER
  static constexpr int kArriving = 32;
#else
  static constexpr int kArriving = kTokens == 256 ? 1 : 32;
#endif
  static constexpr int kQBytes = kRows * kQRowBytes;
  static constexpr int kStagedTokens = kWarpgroups == 4 || kTokens == 32 ? 32 : 64;
  static constexpr int kStagingBytes = kWarpgroups * kStagedTokens * 128;
  // Of 61440 or 64512 in all, as launched with 96 or 168 a thread: more than that would hang. Fewer for
  // producers, and the scales that they fetch ahead are spilled, that is, waited for.
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? (kTokens > 64 ? 224 : 216)
                                            : kPermuted      ? 96
                                                             : 104;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? (kTokens > 64 ? 56 : 72)
                                            : kPermuted      ? 96
                                                             : 64;
};

struct Params {
  const void* scale;
  const void* zero_point;
  const void* bias;
  void* y;
  float* partials;
  uint64_t* flags;
  DType scale_dtype, zero_point_dtype;
  TilePlan plan;
  int M, N, n_groups;
  int n_ring;
  int stages_per_scales, scales_mask;  // stages of kGroups groups, a power of 2, and that minus 1;
                                       // both INT32_MAX if a row is one group
  int chunks_per_group_log2;           // 31 if a row is one group
  bool constant_weights;               // ExecutionContext
};

// Rows of 128, 64 or 32 bytes as the copy engine swizzles them: the 16-byte column of a row is xored
// with this.
template <int kRowBytes>
__device__ __forceinline__ int swizzle_of(int row) {
  if (kRowBytes == 128) return row & 7;
  if (kRowBytes == 64) return (row >> 1) & 3;
  return (row >> 2) & 1;
}

// The bits of elements index, index + step, .. while row, row + row_step, .. is below rows; 0 after.
template <typename Bits, int kCount>
__device__ __forceinline__ void load_bits_of(const void* data, int64_t index, int64_t step, int row,
                                             int rows, int row_step, uint32_t (&bits)[kCount]) {
  const Bits* from = static_cast<const Bits*>(data) + index;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bits[i] = row + i * row_step < rows ? from[i * step] : Bits{0};
  }
}

template <int kCount>
__device__ __forceinline__ void load_bits(const void* data, int64_t index, int64_t step,
                                          DType dtype, int row, int rows, int row_step,
                                          uint32_t (&bits)[kCount]) {
  if (dtype == DType::kFloat32) {
    load_bits_of<uint32_t>(data, index, step, row, rows, row_step, bits);
  } else {
    load_bits_of<uint16_t>(data, index, step, row, rows, row_step, bits);
  }
}

__device__ __forceinline__ float float_of_bits(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
}

// What the consumers need of a group's scale and zero point, as it lies in shared memory: for fp16 or
// bf16 weights with zero points, and without them.
template <typename T, bool kHasZero>
struct Staged {
  using Group = GroupScale<T>;
  static constexpr int kBytes = 16;
  static __device__ __forceinline__ void store(uint8_t* to, float scale, float zero, bool split) {
    const Group group = group_scale<T>(scale, zero, split);
    *reinterpret_cast<uint4*>(to) =
        make_uint4(bits_of_pair(group.minus_low), bits_of_pair(group.minus_high),
                   bits_of_pair(group.scale), bits_of_pair(group.rest));
  }
  static __device__ __forceinline__ Group load(const uint8_t* from, bool) {
    using Pair = typename HalfFormat<T>::Pair;
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    return {pair_of_bits<Pair>(bits.x), pair_of_bits<Pair>(bits.y), pair_of_bits<Pair>(bits.z),
            pair_of_bits<Pair>(bits.w)};
  }
};

template <typename T>
struct Staged<T, false> {
  using Group = SymmetricScale<T>;
  using Pair = typename HalfFormat<T>::Pair;
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ void store(uint8_t* to, float scale, float, bool) {
    const T value = from_float<T>(scale);
    *reinterpret_cast<uint32_t*>(to) = bits_of_pair(Pair{value, value});
  }
  static __device__ __forceinline__ Group load(const uint8_t* from, bool split) {
    return symmetric_scale<T>(*reinterpret_cast<const uint32_t*>(from), split);
  }
};

// 8 rows of x and 128 k, in two halves of 64 k, to the order of the codes in consumers' registers:
// lane t of a row holds k = 32t .. 32t+31, and takes from its word i the k's 0, 4 | 1, 5 of slice 2i
// and 2, 6 | 3, 7 of slice 2i + 1. Lanes are 8 rows x 4 words i.
__device__ __forceinline__ void permute_tokens(uint8_t* x, int half_bytes, int lane) {
  const int row = lane % 8, i = lane / 8;
  auto at = [&](int column) {  // 16 bytes: k = 8 * column ..
    return reinterpret_cast<uint4*>(x + column / 8 * half_bytes + row * 128 +
                                    (((column % 8) ^ row) * 16));
  };
  uint4 from[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) from[t] = *at(4 * t + i);
  __syncwarp();
  uint32_t to[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    to[0][t] = __byte_perm(from[t].x, from[t].z, 0x5410);
    to[1][t] = __byte_perm(from[t].x, from[t].z, 0x7632);
    to[2][t] = __byte_perm(from[t].y, from[t].w, 0x5410);
    to[3][t] = __byte_perm(from[t].y, from[t].w, 0x7632);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) *at(4 * i + j) = make_uint4(to[j][0], to[j][1], to[j][2], to[j][3]);
}

template <typename T, typename C, bool kHasZero>
__global__ void __launch_bounds__(C::kThreads, 1)
    matmul_w4a16_wgmma_kernel(const __grid_constant__ CUtensorMap x_map,
                              const __grid_constant__ CUtensorMap q_map, const Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_bytes[];
  using StagedScale = Staged<T, kHasZero>;
  using Group = typename StagedScale::Group;
  constexpr int kScaleBytes = StagedScale::kBytes;
  constexpr int kScaleRowBytes = (kGroups + 1) * kScaleBytes;  // one more: no bank conflicts
  constexpr int kScaleBlockBytes = C::kRows * kScaleRowBytes;
  constexpr int kStageBytes = C::kXBytes + C::kQBytes;
  uint8_t* ring = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
  uint8_t* scales = ring + p.n_ring * kStageBytes;
  uint8_t* staging = scales + 2 * kScaleBlockBytes;
  const uint32_t ring_address = shared_address(ring);
  const uint32_t scales_full = shared_address(staging) + C::kStagingBytes;
  const uint32_t scales_empty = scales_full + 16;
  const uint32_t full = scales_empty + 16;
  const uint32_t empty = full + p.n_ring * 8;
  const uint32_t permuted = empty + p.n_ring * 8;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.n_ring; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, C::kConsumers / 32);
      mbarrier_init(permuted + 8 * i, kScaleThreads);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(scales_full + 8 * i, kScaleThreads / 32 * C::kArriving);
      mbarrier_init(scales_empty + 8 * i, C::kConsumers / 32 * C::kArriving);
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

  if (warpgroup == C::kWarpgroups) {  // ---- producers ----
    if constexpr (C::kProducerRegisters != 96) setmaxnreg_dec<C::kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) {
        prefetch_tensormap(&x_map);
        prefetch_tensormap(&q_map);
        bool may_read_x = !p.constant_weights;
        if (may_read_x) griddepcontrol_wait();
        while (work.next()) {
          const int m0 = work.tile % p.plan.tiles_m * C::kTokens;
          const int n0 = work.tile / p.plan.tiles_m * C::kRows;
          for (int stage = work.k_begin; stage < work.k_end; ++stage) {
            spin_until(empty + 8 * slot, phase ^ 1);
            const uint32_t barrier = full + 8 * slot, at = ring_address + slot * kStageBytes;
            mbarrier_arrive_expect_tx(barrier, C::kXBytes + C::kQBytes);
            cp_async_bulk_tensor_2d(at + C::kXBytes, &q_map, stage * C::kQRowBytes, n0, barrier);
            if (!may_read_x) {
              griddepcontrol_wait();
              may_read_x = true;
            }
#pragma unroll
            for (int unit = 0; unit < C::kStageK / kUnitK; ++unit) {
              cp_async_bulk_tensor_2d(at + unit * C::kTokens * 128, &x_map,
                                      stage * C::kStageK + unit * kUnitK, m0, barrier);
            }
            advance();
          }
        }
      }
    } else {  // scales and zero points, as the consumers want them
      if (!p.constant_weights) griddepcontrol_wait();
      const int thread = threadIdx.x - C::kConsumers - 32;
      int scale_slot = 0;
      uint32_t scale_phase = 0;
      // Thread i takes group i % kGroups of the rows i / kGroups, + kRowStep, + 2 * kRowStep ..
      constexpr int kRowStep = kScaleThreads / kGroups;
      constexpr int kItems = (C::kRows + kRowStep - 1) / kRowStep;
      const int my_row = thread / kGroups, my_group = thread % kGroups;
      uint32_t scale[kItems], zero[kHasZero ? kItems : 1];
      auto fetch = [&](int n0, int block) {
        const int group = block * kGroups + my_group;
        const int rows = group < p.n_groups ? min(p.N - n0, C::kRows) : 0;
        const int64_t index = int64_t{n0 + my_row} * p.n_groups + group;
        const int64_t step = int64_t{kRowStep} * p.n_groups;
        load_bits(p.scale, index, step, p.scale_dtype, my_row, rows, kRowStep, scale);
        if (kHasZero) {
          load_bits(p.zero_point, index, step, p.zero_point_dtype, my_row, rows, kRowStep, zero);
        }
      };
      auto publish = [&] {
        spin_until(scales_empty + 8 * scale_slot, scale_phase ^ 1);
        uint8_t* to = scales + scale_slot * kScaleBlockBytes + my_row * kScaleRowBytes +
                      my_group * kScaleBytes;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (my_row + i * kRowStep < C::kRows) {
            StagedScale::store(
                to + i * kRowStep * kScaleRowBytes, float_of_bits(scale[i], p.scale_dtype),
                kHasZero ? float_of_bits(zero[kHasZero ? i : 0], p.zero_point_dtype) : 8.f,
                C::kPermuted);
          }
        }
        __syncwarp();
        if (lane < C::kArriving) mbarrier_arrive(scales_full + 8 * scale_slot);
        scale_slot ^= 1;
        scale_phase ^= scale_slot ^ 1;
      };
      while (work.next()) {
        const int n0 = work.tile / p.plan.tiles_m * C::kRows;
        int block = work.k_begin / p.stages_per_scales;
        const int last = (work.k_end - 1) / p.stages_per_scales;
        fetch(n0, block);
        if (!C::kPermuted) {
          for (;;) {
            publish();
            if (++block > last) break;
            fetch(n0, block);
          }
        } else {
          for (int k = work.k_begin; k < work.k_end; ++k) {
            if (k == work.k_begin || (k & p.scales_mask) == 0) {
              publish();
              if (++block <= last) fetch(n0, block);
            }
            spin_until(full + 8 * slot, phase);
            for (int i = warp - 1; i < C::kTokens / 8; i += kScaleThreads / 32) {
              permute_tokens(ring + slot * kStageBytes + i * 8 * 128, C::kTokens * 128, lane);
            }
            fence_proxy_async();
            mbarrier_arrive(permuted + 8 * slot);
            advance();
          }
        }
      }
    }
    return;
  }

  // ---- consumers ----
  if constexpr (C::kConsumerRegisters != 96) setmaxnreg_inc<C::kConsumerRegisters>();
  griddepcontrol_wait();                          // scratch and y may be in use by kernels ahead
  if (threadIdx.x == 0) p.flags[blockIdx.x] = 0;  // scratch may never have been written
  constexpr int kSlices = 2;                      // of 16 k, between two commits
  constexpr int kSteps = C::kStageK / 16 / kSlices;
  static_assert(kSteps % 2 == 0, "two fragment buffers take turns");
  static_assert(C::kStageK <= kChunkK * kGroups, "scales change between stages only");
  static_assert(!C::kPermuted || C::kStageK == 128, "permute_tokens");
  const int g = lane / 4, t = lane % 4;
  const uint32_t selector = fragment_selector(t);
  const int first_row = warpgroup * 64 + warp * 16 + g;
  const int swizzle = swizzle_of<C::kQRowBytes>(g);
  const uint8_t* q_lane = ring + C::kXBytes + first_row * C::kQRowBytes;
  const uint8_t* scale_lane = scales + first_row * kScaleRowBytes;
  int scale_slot = 1;
  uint32_t scale_phase = 1;
  bool has_scales = false;

  float sum[C::kSums];
  uint32_t frag[2][kSlices][4];
  uint4 codes[2];  // of rows g and g + 8: 32 k of the row's, or of this lane's
  Group group[2];
  auto load_codes = [&](int k, int step) {  // of stage k of the tile, in slot `slot`
    if (C::kPermuted && step > 0) return;
    const int chunk = C::kPermuted ? t : step;
    const int group_slot =
        ((k * (C::kStageK / kChunkK) + chunk) >> p.chunks_per_group_log2) & (kGroups - 1);
    const uint8_t* q = q_lane + slot * kStageBytes + ((chunk ^ swizzle) * 16);
    const uint8_t* from = scale_lane + scale_slot * kScaleBlockBytes + group_slot * kScaleBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes[half] = *reinterpret_cast<const uint4*>(q + half * 8 * C::kQRowBytes);
      group[half] = StagedScale::load(from + half * 8 * kScaleRowBytes, C::kPermuted);
    }
  };
  // Waits for stage k; a tile's first stage and every stages_per_scales-th bring new scales.
  auto wait_stage = [&](int k, bool is_first) {
    if (is_first || (k & p.scales_mask) == 0) {
      __syncwarp();
      if (has_scales && lane < C::kArriving) mbarrier_arrive(scales_empty + 8 * scale_slot);
      has_scales = true;
      scale_slot ^= 1;
      scale_phase ^= scale_slot ^ 1;
      spin_until(scales_full + 8 * scale_slot, scale_phase);
    }
    spin_until(full + 8 * slot, phase);
    if (C::kPermuted) spin_until(permuted + 8 * slot, phase);
  };

  while (work.next()) {
    const int m0 = work.tile % p.plan.tiles_m * C::kTokens;
    const int n0 = work.tile / p.plan.tiles_m * C::kRows;
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sum[i] = 0.f;
    wait_stage(work.k_begin, true);
    load_codes(work.k_begin, 0);
    int previous = -1;  // the stage whose slot is not yet given back
    for (int k = work.k_begin; k < work.k_end; ++k) {
      // the shuffle tells the compiler that this is one value per warp: 20 instructions less per stage
      const uint32_t x_descriptor =
          __shfl_sync(0xffffffffu, descriptor_of(ring_address + slot * kStageBytes), 0);
      const int current = slot;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t (&a)[kSlices][4] = frag[step % 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 c = codes[half];
          if constexpr (C::kPermuted) {
            const uint32_t word = step == 0 ? c.x : step == 1 ? c.y : step == 2 ? c.z : c.w;
            fragments_of_word<T>(word, group[half], a[0][half], a[0][half + 2], a[1][half],
                                 a[1][half + 2]);
          } else {
            fragment_of_codes<T>(c.x, c.y, selector, group[half], a[0][half], a[0][half + 2]);
            fragment_of_codes<T>(c.z, c.w, selector, group[half], a[1][half], a[1][half + 2]);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const int slice = step * kSlices + s;  // of the stage
          const int offset = slice / 4 * C::kTokens * 128 + slice % 4 * 32;
          Wgmma<C::kTokens>::template run<T>(sum, a[s], x_descriptor + (offset >> 4));
        }
        wgmma_commit_group();
        // What the next step decodes is under way before the wait for the step before.
        if (step + 1 < kSteps) {
          load_codes(k, step + 1);
        } else {
          advance();
          if (k + 1 < work.k_end) {
            wait_stage(k + 1, false);
            load_codes(k + 1, 0);
          }
        }
        wgmma_wait_group<1>();
        if (step == 0 && previous >= 0 && lane == 0) mbarrier_arrive(empty + 8 * previous);
      }
      previous = current;
    }
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(empty + 8 * previous);

    if (!add_partial_sums<C::kConsumers>(work, p.partials, p.flags, threadIdx.x, sum)) continue;

    // y: 64 rows x kStagedTokens at a time, transposed through shared memory.
    uint8_t* out = staging + warpgroup * C::kStagedTokens * 128;
    const T* bias = static_cast<const T*>(p.bias);
    T* y = static_cast<T*>(p.y);
    const bool in_vectors = p.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
    const int thread = threadIdx.x % 128;
    const int n_block = n0 + warpgroup * 64;
    float bias_of[2] = {0.f, 0.f};
    if (bias != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = n_block + warp * 16 + g + half * 8;
        if (n < p.N) bias_of[half] = as_float(bias[n]);
      }
    }
#pragma unroll
    for (int first = 0; first < C::kTokens; first += C::kStagedTokens) {
      bar_sync(2 + warpgroup, 128);  // the last reads of `out` are over
#pragma unroll
      for (int j = 0; j < C::kStagedTokens; j += 16) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* s = sum + (first + j) / 2 + i * 2;
          packed[i] = bits_of_pair(typename HalfFormat<T>::Pair{
              from_float<T>(s[0] + bias_of[i % 2]), from_float<T>(s[1] + bias_of[i % 2])});
        }
        const int token = j + lane / 16 * 8 + lane % 8, column = warp * 2 + lane / 8 % 2;
        stmatrix_x4_trans(shared_address(out + token * 128 + ((column ^ (token & 7)) * 16)),
                          packed[0], packed[1], packed[2], packed[3]);
      }
      bar_sync(2 + warpgroup, 128);
      const int column = thread % 8, n = n_block + column * 8;
      if (n < p.N) {
#pragma unroll 4
        for (int token = thread / 8; token < C::kStagedTokens; token += 16) {
          const int m = m0 + first + token;
          if (m >= p.M) break;
          const Elems<T, 8> values = *reinterpret_cast<const Elems<T, 8>*>(
              out + token * 128 + ((column ^ (token & 7)) * 16));
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
TilePlan plan_of(const MatmulW4A16Args& args, int n_multiprocessors) {
  return plan_tiles(args.M, args.N, args.K, C::kTokens, C::kRows, C::kStageK, n_multiprocessors);
}

template <typename T, typename C, bool kHasZero>
cudaError_t launch_config(const MatmulW4A16Args& args, void* scratch, int n_multiprocessors,
                          cudaStream_t stream) {
  Params p = {};
  p.plan = plan_of<C>(args, n_multiprocessors);
  p.scale = args.scale;
  p.zero_point = args.zero_point;
  p.bias = args.bias;
  p.y = args.y;
  p.flags = static_cast<uint64_t*>(scratch);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + kFlagBytes);
  p.scale_dtype = args.scale_dtype;
  p.zero_point_dtype = args.zero_point_dtype;
  p.M = static_cast<int>(args.M);
  p.N = static_cast<int>(args.N);
  p.n_groups = static_cast<int>(args.K / args.group_size);
  p.constant_weights = args.constant_weights;
  const int group_size = static_cast<int>(args.group_size);
  p.stages_per_scales = p.scales_mask = INT32_MAX;
  p.chunks_per_group_log2 = 31;
  if (p.n_groups > 1) {
    p.stages_per_scales = group_size * kGroups / C::kStageK;
    p.scales_mask = p.stages_per_scales - 1;
    p.chunks_per_group_log2 = 0;
    while (kChunkK << p.chunks_per_group_log2 < group_size) ++p.chunks_per_group_log2;
  }
  constexpr int kStageBytes = C::kXBytes + C::kQBytes + 3 * 8;
  constexpr int kOtherBytes =
      1024 + 2 * C::kRows * (kGroups + 1) * Staged<T, kHasZero>::kBytes + C::kStagingBytes + 4 * 8;
  p.n_ring = std::min((kSharedLimit - kOtherBytes) / kStageBytes, 12);
  const int shared = kOtherBytes + p.n_ring * kStageBytes;

  CUtensorMap x_map, q_map;
  constexpr CUtensorMapSwizzle kQSwizzle =
      C::kQRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  if (!encode_tokens(&x_map, args.x, args.dtype, args.M, args.K, C::kTokens) ||
      !encode_matrix(&q_map, args.qdata, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.N, args.K / 2,
                     C::kRows, C::kQRowBytes, kQSwizzle)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = matmul_w4a16_wgmma_kernel<T, C, kHasZero>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  // A dependent launch that has to wait for the weights as well: 35 us for 29, plain.
  if (!args.constant_weights) {
    kernel<<<p.plan.grid, C::kThreads, shared, stream>>>(x_map, q_map, p);
    return cudaGetLastError();
  }
  return launch_dependent(kernel, p.plan.grid, C::kThreads, shared, stream, x_map, q_map, p);
}

// Calls f with the configuration for this shape. What each is worth: kernels/README.md.
template <typename F>
auto with_config(const MatmulW4A16Args& args, F f) {
  const bool is_wide = args.N >= 8192;
  if (args.M <= 32 && is_wide) {
    // With more scales than that to stage, the producers have no time to permute x as well.
    const bool has_few_scales = args.group_size >= 128 && args.zero_point == nullptr;
    return has_few_scales ? f(Config<4, 32, 128, true>()) : f(Config<4, 32, 128, false>());
  }
  if (args.M <= 32) return f(Config<2, 32, 128, false>());
  if (args.M <= 64) {
    return is_wide ? f(Config<4, 64, 128, false>()) : f(Config<2, 64, 128, false>());
  }
  // A row of x costs a tenth more in tiles of 128, which waste fewer of them.
  const int64_t tokens_128 = (args.M + 127) / 128 * 128, tokens_256 = (args.M + 255) / 256 * 256;
  const bool is_small = args.M <= 256 && args.N <= 4096 && args.K <= 8192;
  if (11 * tokens_128 < 10 * tokens_256 || is_small) {
    return f(Config<2, 128, 128, false>());
  }
  return f(Config<2, 256, 64, false>());
}

template <typename T>
cudaError_t launch(const MatmulW4A16Args& args, void* scratch, int n_multiprocessors,
                   cudaStream_t stream) {
  return with_config(args, [&](auto config) {
    using C = decltype(config);
    if constexpr (!C::kPermuted) {  // which is never chosen for weights with zero points
      if (args.zero_point != nullptr) {
        return launch_config<T, C, true>(args, scratch, n_multiprocessors, stream);
      }
    }
    return launch_config<T, C, false>(args, scratch, n_multiprocessors, stream);
  });
}

}  // namespace

bool can_matmul_w4a16_wgmma(const MatmulW4A16Args& args) {
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.M < INT32_MAX &&
         args.N < INT32_MAX && args.K < INT32_MAX &&
         (args.M / 32 + 1) * (args.N / 64 + 1) < INT32_MAX && encode_tiled() != nullptr;
}

uint64_t matmul_w4a16_wgmma_scratch_bytes(const MatmulW4A16Args& args, int n_multiprocessors) {
  return with_config(args, [&](auto config) {
    using C = decltype(config);
    return tile_scratch_bytes(plan_of<C>(args, n_multiprocessors), C::kTokens, C::kRows);
  });
}

cudaError_t launch_matmul_w4a16_wgmma(const MatmulW4A16Args& args, void* scratch,
                                      int n_multiprocessors, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return launch<__half>(args, scratch, n_multiprocessors, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(args, scratch, n_multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
