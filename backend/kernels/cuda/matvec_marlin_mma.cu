// matvec_marlin_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g] + bias[n],
//                      g = k / group_size; M = 1..16 on tensor cores
//
//   operand     dtype               shape           order in memory                            align
//   x           f16 | bf16          [M, K]          row-major                                  dtype
//   qdata       u8 (32-bit words)   [K/16, 8*Np]    marlin.v1: ../marlin.h                     16 B
//   scale       f16 | bf16 | f32    [n_groups, Np]  marlin.v1                                  16 B
//   zero_point  of scale | f32      [n_groups, Np]  as scale; absent means 8                   16 B
//   bias        dtype of x          [N]             contiguous; absent means 0                 dtype
//   y (out)     dtype of x          [M, N]          row-major                                  dtype
//   scratch     f32, flags          matvec_marlin_mma_scratch_bytes; never cleared             16 B
//
// Requires  M <= 16, K % 32 == 0, group_size 32, 64, 128, 256 or K  (checked by validate_linear)
// Grid      (splits, blocks) blocks of (32, warps_k, tiles_n) threads. A strip is tiles_n times 64 rows
//           of w, a unit 64 k of a strip. Either a cluster of `splits` blocks has one strip and shares
//           out its units, or (stream) each block has a range of the units of all strips, one behind
//           the other, and the block with the last k of a strip adds up the others' sums; it only
//           waits for blocks of lower index. choose_plan sets the numbers
// Bytes     reads qdata, scales and zero points once, and x once a block or, where it does not fit into
//           shared memory, once a strip; bound by qdata
// Numerics  sums of x * (offset + q) in fp32, a group (at most 64 k) at a time, from which the offset
//           times the sum of x is taken; zero points and scales are applied in fp32; one rounding at
//           the store. Sums are added in a fixed order
// Source    direct; mma.m16n8k16 with the weight as its A operand, which is the order of marlin.v1;
//           stream-K: Osama et al., 2023
//
// Warps take a strip's units in turns. A lane loads 16 bytes four times a unit: each has its share of
// four fragments of 16 x 16 weights, which meet the same fragment of x. Weights go from memory to
// registers and nowhere else, and the next unit's take the place of those just multiplied; x goes
// through shared memory.
//
// A code in bits 0-3 of a half of fp16 below exponent 0x6400 is 1024 + q, in bits 4-7 below 0x5400 it
// is 64 + q; bf16: 128 + q below 0x4300. One more mma a step, with an A operand that is constant, gives
// all rows what these offsets and zero points of 8 add to their sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matvec_marlin.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "w4a16_fragments.cuh"

namespace cuda_int4 {

namespace {

constexpr int kTileN = 64, kStepK = 16;  // 512 bytes: a 16-byte load of a warp
constexpr int kTileBytes = kTileN * kStepK / 2;
constexpr int kUnitSteps = 4;
constexpr int kUnitK = kUnitSteps * kStepK;
constexpr int kMaxCluster = 4;
// Of a block, and of a multiprocessor: 128 registers for up to 8 rows of x, 168 above.
constexpr int max_warps(int64_t M) { return M <= 8 ? 16 : 12; }
constexpr uint64_t kPublished = 0x6d61726c696e2e31;  // unlike what unwritten scratch holds

// n things in parts, the first `more` of them one longer than `each`.
struct Cut {
  int each, more;
  __host__ __device__ int begin(int part) const {
    return part * each + (part < more ? part : more);
  }
  __host__ __device__ int longest() const { return each + (more > 0); }
};

Cut cut(int64_t n, int parts) { return {static_cast<int>(n / parts), static_cast<int>(n % parts)}; }

struct Params {
  MatvecMarlinArgs args;
  Cut work;           // units of all strips over the blocks, or of a strip over those of a cluster
  bool is_stream;     // the former
  int strip_units;    // of all K
  int splits_shift;   // log2 of the blocks of a cluster
  int tiles_shift;    // log2 of the tiles of a strip
  int ring, window;   // units whose x is in shared memory, and those that are waited for together
  int windows_ahead;  // that are on their way before the first is waited for
  bool is_ring;       // x of a unit makes room for another's; else it all stays
  int n_tiles, n_steps, n_groups;
  int group_shift;      // log2(group_size / kUnitK), at least 0
  bool is_early;        // weights are read before griddepcontrol_wait
  bool is_x_aligned;    // to 16 bytes
  bool is_y_aligned;    // and N % 4 == 0: 4 outputs go in one store
  int whole_units;      // of a strip; the last may have but 32 k
  int64_t step_bytes;   // from 16 k to the next
  int64_t strip_bytes;  // from behind the last unit of a strip to the one before its first
  float4* partials;     // [blocks][M * tiles * 16], of the stream
  uint64_t* flags;      // [blocks]
  uint32_t x_stride, sums_offset, partial_offset, barrier_offset;  // in bytes
};

// What a code has been turned into, less q, in the registers of a fragment: kLow in those of k % 16 <
// 8, kHigh in the others.
template <typename X>
struct Offsets {
  using Format = HalfFormat<X>;
  static __device__ __forceinline__ uint32_t minus(float offset) {
    const X value = from_float<X>(-offset);
    return bits_of_pair(typename Format::Pair{value, value});
  }
  static __device__ __forceinline__ uint32_t one() { return minus(-1.f); }
};

// Scales or zero points of a lane's rows: g and g + 8 of the four strips of 16 rows.
// kAny: any dtype, as it lies in memory, or floats; else halves of the dtype of x.
template <typename X, bool kAny>
struct RowValues {
  uint4 words[kAny ? 2 : 1];

  __device__ __forceinline__ void load(const void* from, int64_t first, DType dtype) {
    if constexpr (kAny) {
      if (dtype == DType::kFloat32) {
        words[0] = load_global_early_v4(static_cast<const float*>(from) + first);
        words[1] = load_global_early_v4(static_cast<const float*>(from) + first + 4);
        return;
      }
    }
    words[0] = load_global_early_v4(static_cast<const uint16_t*>(from) + first);
  }
  __device__ __forceinline__ float at(int strip, int half, DType dtype) const {
    if constexpr (kAny) {
      if (dtype == DType::kFloat32) return __uint_as_float(word(2 * strip + half));
      const uint16_t bits = static_cast<uint16_t>(word(strip) >> (16 * half));
      if (dtype == DType::kFloat16) return as_float(__ushort_as_half(bits));
      return as_float(__ushort_as_bfloat16(bits));
    }
    const typename HalfFormat<X>::Pair pair =
        pair_of_bits<typename HalfFormat<X>::Pair>(word(strip));
    return as_float(half == 0 ? pair.x : pair.y);
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& four = words[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }
};

// 8 elements of 2 bytes that are aligned to no more than that.
__device__ __forceinline__ uint4 load_8_elements(const void* from) {
  const uint16_t* e = static_cast<const uint16_t*>(from);
  return {e[0] | (uint32_t{e[1]} << 16), e[2] | (uint32_t{e[3]} << 16),
          e[4] | (uint32_t{e[5]} << 16), e[6] | (uint32_t{e[7]} << 16)};
}

// Until no more than `pending` of the windows asked for are still on their way.
__device__ __forceinline__ void wait_for_window(int pending) {
  if (pending >= 3) {
    cp_async_wait<3>();
  } else if (pending == 2) {
    cp_async_wait<2>();
  } else if (pending == 1) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

__device__ __forceinline__ void add(float4& to, const float4& part) {
  to.x += part.x;
  to.y += part.y;
  to.z += part.z;
  to.w += part.w;
}

// kTiles: of 8 rows of x. kSpanSteps: steps of 16 k that share a scale: 2 (group_size 32) or 4.
// kZero: zero points that are not all 8. kAny: see RowValues.
template <typename X, int kTiles, int kSpanSteps, bool kZero, bool kAny>
__global__ void __launch_bounds__(32 * max_warps(8 * kTiles))
    matvec_marlin_mma_kernel(const __grid_constant__ Params p) {
  constexpr int kSpans = kUnitSteps / kSpanSteps;
  // Sums start at what the offsets take off them: fewer instructions, but they wait for it.
  constexpr bool kSeeded = kTiles == 2;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_base = shared_address(shared);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int warp_k = threadIdx.y, warp_n = threadIdx.z, warps_k = blockDim.y;
  const int thread = (warp_n * warps_k + warp_k) * 32 + lane, n_threads = warps_k * blockDim.z * 32;
  const int rank = blockIdx.x, splits = 1 << p.splits_shift, block = blockIdx.y;
  const int M = static_cast<int>(p.args.M);
  const DType scale_dtype = p.n_groups == 1 ? DType::kFloat32 : p.args.scale_dtype;
  const DType zero_dtype = p.n_groups == 1 ? DType::kFloat32 : p.args.zero_point_dtype;

  // This block's units, numbered through all strips of tiles; it takes them from the last to the first.
  const int begin = p.is_stream ? p.work.begin(block) : block * p.strip_units + p.work.begin(rank);
  const int end =
      p.is_stream ? p.work.begin(block + 1) : block * p.strip_units + p.work.begin(rank + 1);
  const int n_units = end - begin;
  int strip = (end - 1) / p.strip_units;  // the one in work

  // ---- load: codes, scales and zero points of the warp's next unit to registers ----
  const int64_t groups_stride = int64_t{p.n_tiles} * kTileN;
  int next = warp_k;  // unit, counted from the last one
  int next_tile = (strip << p.tiles_shift) + warp_n;
  int next_unit = end - 1 - warp_k - strip * p.strip_units;  // of its strip
  const uint8_t* next_codes = p.args.qdata + next_unit * (kUnitSteps * p.step_bytes) +
                              (int64_t{next_tile} * kTileBytes + lane * 16);
  const auto settle = [&]() {  // no strip has fewer units than it has warps
    if (next_unit >= 0) return;
    next_unit += p.strip_units;
    next_tile -= 1 << p.tiles_shift;
    next_codes += p.strip_bytes;
  };
  settle();
  uint4 codes[kUnitSteps] = {};
  RowValues<X, kAny> scales[kSpans] = {}, zeros[kZero ? kSpans : 1] = {};
  bool is_there = false, is_whole = false;  // the next unit; the second half of it
  const auto aim = [&]() {
    is_there = next < n_units && next_tile < p.n_tiles;
    is_whole = is_there && next_unit < p.whole_units;
  };
  // Of a strip's last unit half may not be there: what the registers hold then meets x that is 0.
  const auto load_step = [&](int step) {
    if (step < 2 ? is_there : is_whole) {
      codes[step] = load_global_early_v4(next_codes + step * p.step_bytes);
    }
  };
  const auto load_values = [&]() {
    if (is_there) {
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const int group = kSpans == 1 ? next_unit >> p.group_shift : next_unit * kSpans + s;
        if ((kAny && p.n_groups == 1) || (kSpans > 1 && group >= p.n_groups)) continue;
        const int64_t first = group * groups_stride + (int64_t{next_tile} * kTileN + 8 * g);
        scales[s].load(p.args.scale, first, p.args.scale_dtype);
        if constexpr (kZero) zeros[s].load(p.args.zero_point, first, p.args.zero_point_dtype);
      }
    }
    next += warps_k;
    next_unit -= warps_k;
    next_codes -= warps_k * (kUnitSteps * p.step_bytes);
    settle();
  };
  // One group per row of w: its values as floats; they are permuted in blocks of 32.
  const auto load_only_group = [&](RowValues<X, kAny>& to, const void* from, DType dtype) {
    if constexpr (kAny) {
      const int tile = (strip << p.tiles_shift) + warp_n;
      float rows[8] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int place = i / 4 * 32 + g / 2 * 8 + i % 4 * 2 + g % 2;
        if (tile < p.n_tiles) rows[i] = load_as_float(from, int64_t{tile} * kTileN + place, dtype);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to.words[i] = {__float_as_uint(rows[4 * i]), __float_as_uint(rows[4 * i + 1]),
                       __float_as_uint(rows[4 * i + 2]), __float_as_uint(rows[4 * i + 3])};
      }
    }
  };
  const auto load_only_groups = [&]() {  // of a strip
    if (!kAny || p.n_groups > 1) return;
    load_only_group(scales[0], p.args.scale, p.args.scale_dtype);
    if constexpr (kZero) load_only_group(zeros[0], p.args.zero_point, p.args.zero_point_dtype);
  };
  const auto load_first = [&]() {
    load_only_groups();
    aim();
#pragma unroll
    for (int step = 0; step < kUnitSteps; ++step) load_step(step);
    load_values();
  };

  // ---- load_window: x of some units to shared memory, in the order of work; zeros behind K ----
  int load_at = 0, load_slot = 0;                   // unit, counted from the last one; its place
  int load_from = end - 1 - strip * p.strip_units;  // unit of its strip
  const auto load_window = [&]() {
    const int n = min(min(p.window, p.ring - load_slot), n_units - load_at);
    const int row_chunks = n * (kUnitK / 8);  // of 16 bytes
    int m = 0, chunk = thread;
    while (row_chunks > 0) {
      while (chunk >= row_chunks) {
        chunk -= row_chunks;
        ++m;
      }
      if (m >= M) break;
      int unit = load_from - chunk / 8;
      while (unit < 0) unit += p.strip_units;
      const int64_t k = unit * kUnitK + chunk % 8 * 8;
      const bool is_x = k < p.args.K;
      const X* const from = static_cast<const X*>(p.args.x) + (is_x ? m * p.args.K + k : 0);
      const uint32_t at = m * p.x_stride + load_slot * (kUnitK * 2) + chunk * 16;
      if (p.is_x_aligned) {
        cp_async_16_or_zero(shared_base + at, from, is_x);
      } else {
        uint4 value = {0, 0, 0, 0};
        if (is_x) value = load_8_elements(from);
        *reinterpret_cast<uint4*>(shared + at) = value;
      }
      chunk += n_threads;
    }
    cp_async_commit();
    load_at += p.window;
    load_slot += p.window;
    if (load_slot >= p.ring) load_slot = 0;
    load_from -= p.window;
    while (load_from < 0) load_from += p.strip_units;
  };
  const auto load_first_windows = [&]() {
    for (int i = 0; i < p.windows_ahead; ++i) load_window();
  };

  [[maybe_unused]] const uint32_t barrier = shared_base + p.barrier_offset;
  const int row_shift = 4 + p.tiles_shift;  // log2 of items, of 4 sums, in a row of y
  const int n_items = M << row_shift;
  [[maybe_unused]] const int most_items =
      (n_items + splits - 1) >> p.splits_shift;  // of one block of a cluster
#if __CUDA_ARCH__ >= 900
  if (splits > 1) {
    if (thread == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
      const int mine = (n_items - rank + splits - 1) >> p.splits_shift;
      mbarrier_arrive_expect_tx(barrier, mine * splits * 16);
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
#endif
  if (p.is_early) {
    load_first();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    load_first_windows();
  } else {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    load_first_windows();
    load_first();
  }

  // ---- multiply: a unit, step by step, so that codes make room for the next unit's at once ----
  float out[4][kTiles][4] = {};  // 16 rows of w, 8 rows of x, fragment
  // A lane gives ldmatrix a row of x; rows beyond M repeat the last one, and nobody stores them.
  const uint32_t x_row = min(lane % 8, M - 1) * p.x_stride;
  const uint32_t x_tile = min(lane % 8 + 8, M - 1) * p.x_stride - x_row;
  const uint32_t x_lane = shared_base + x_row + lane / 8 * 16;
  using Format = HalfFormat<X>;
  constexpr float kTaken = kZero ? 0.f : 8.f;
  const uint32_t minus_low = Offsets<X>::minus(Format::kLowMagic + kTaken);
  const uint32_t minus_high = Offsets<X>::minus(Format::kHighMagic + kTaken);
  const auto multiply = [&](uint32_t x_at) {
    aim();
    uint32_t b[kUnitSteps][kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kUnitSteps; step += 2) {
        uint32_t matrices[4];
        ldmatrix_x4(matrices, x_at + i * x_tile + step * 32);
        b[step][i][0] = matrices[0], b[step][i][1] = matrices[1];
        b[step + 1][i][0] = matrices[2], b[step + 1][i][1] = matrices[3];
      }
    }
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      const int first = s * kSpanSteps;
      float start[kTiles][4] = {}, x_sum[kTiles][4] = {};
      const auto add_offsets = [&](int step) {
        const uint32_t offsets[4] = {minus_low, minus_low, minus_high, minus_high};
        const uint32_t one = Offsets<X>::one(), ones[4] = {one, one, one, one};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          mma_m16n8k16_add(start[i], offsets, b[step][i], start[i], X{});
          if constexpr (kZero) mma_m16n8k16_add(x_sum[i], ones, b[step][i], x_sum[i], X{});
        }
      };
      if constexpr (kSeeded) {
#pragma unroll
        for (int step = first; step < first + kSpanSteps; ++step) add_offsets(step);
      }
      float sum[4][kTiles][4] = {};
      if constexpr (kSeeded) {
#pragma unroll
        for (int j = 0; j < 4; ++j) memcpy(sum[j], start, sizeof(start));
      }
#pragma unroll
      for (int step = first; step < first + kSpanSteps; ++step) {
        if constexpr (!kSeeded) add_offsets(step);
        const uint4& four = codes[step];
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t pairs[4];
          magic_of_word(words[j], pairs, X{});
          const uint32_t a[4] = {pairs[0], pairs[2], pairs[1], pairs[3]};
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            mma_m16n8k16_add(sum[j][i], a, b[step][i], sum[j][i], X{});
          }
        }
        load_step(step);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float scale = scales[s].at(j, half, scale_dtype);
          float zero = 0.f;
          if constexpr (kZero) zero = zeros[s].at(j, half, zero_dtype);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int r = 2 * half; r < 2 * half + 2; ++r) {
              float whole = kSeeded ? sum[j][i][r] : sum[j][i][r] + start[i][r];
              if constexpr (kZero) whole -= zero * x_sum[i][r];
              out[j][i][r] += scale * whole;
            }
          }
        }
      }
    }
    load_values();
  };

  const auto store = [&](int item, float4 sum) {
    const int m = item >> row_shift;
    const int n = (strip << (6 + p.tiles_shift)) + (item - (m << row_shift)) * 4;
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int n_values = min(4, static_cast<int>(p.args.N) - n);
    X* const to = static_cast<X*>(p.args.y) + m * p.args.N + n;
    if (p.args.bias != nullptr) {
      for (int i = 0; i < n_values; ++i) {
        values[i] += as_float(static_cast<const X*>(p.args.bias)[n + i]);
      }
    }
    if (p.is_y_aligned && n_values == 4) {
      *reinterpret_cast<uint2*>(to) = {pack_pair<X>(values[0], values[1]),
                                       pack_pair<X>(values[2], values[3])};
    } else {
      for (int i = 0; i < n_values; ++i) to[i] = from_float<X>(values[i]);
    }
  };

  // ---- reduce: a strip's sums over the warps of the block, and what other blocks have of it ----
  float* const sums = reinterpret_cast<float*>(shared + p.sums_offset);
  const int sums_stride = (kTileN << p.tiles_shift) + 4;  // no bank conflicts
  const auto reduce = [&]() {
    const int strip_begin = strip * p.strip_units;
    const bool is_last = end >= strip_begin + p.strip_units;  // with the last k: adds the others up
    const bool is_published = p.is_stream && !is_last;
    int first_block = block;  // of those that have a part
    if (p.is_stream && is_last) {
      while (p.work.begin(first_block) > strip_begin) --first_block;
    }
    for (int other = first_block + thread; other < block; other += n_threads) {
      while (ld_acquire_gpu(p.flags + other) != kPublished) {
      }
      p.flags[other] = 0;  // as it must be when the next launch begins
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      __syncthreads();  // nobody reads the sums before these any more
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 2 * t + r % 2;
        if (8 * i + row >= M) continue;
        float* const to = sums + (warp_k * 8 + row) * sums_stride + warp_n * kTileN + g + r / 2 * 8;
#pragma unroll
        for (int j = 0; j < 4; ++j) to[16 * j] = out[j][i][r];
      }
      __syncthreads();
      const int first_item = (8 * i) << row_shift, end_item = min(M, 8 * i + 8) << row_shift;
      for (int item = first_item + thread; item < end_item; item += n_threads) {
        const int row = (item - first_item) >> row_shift;
        const float* from = sums + row * sums_stride + (item - first_item - (row << row_shift)) * 4;
        float4 sum = *reinterpret_cast<const float4*>(from);
        for (int w = 1; w < warps_k; ++w) {
          from += 8 * sums_stride;
          add(sum, *reinterpret_cast<const float4*>(from));
        }
        if (splits > 1) {
#if __CUDA_ARCH__ >= 900
          const int owner = item & (splits - 1);
          const int place = rank * most_items + (item >> p.splits_shift);
          store_async(address_in_rank(shared_base + p.partial_offset + place * 16, owner), sum,
                      address_in_rank(barrier, owner));
#endif
        } else if (is_published) {
          __stcg(p.partials + int64_t{block} * n_items + item, sum);
        } else {
          for (int other = block - 1; other >= first_block; --other) {
            add(sum, __ldcg(p.partials + int64_t{other} * n_items + item));
          }
          store(item, sum);
        }
      }
    }
    if (is_published) {
      __syncthreads();
      if (thread == 0) st_release_gpu(p.flags + block, kPublished);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) out[j][i][r] = 0.f;
      }
    }
  };

#if __CUDA_ARCH__ >= 900
  if (splits > 1) cluster_wait();  // the other blocks have started: their barriers are there
#endif
  // A stop is the end of a window, where all warps meet, or of a strip.
  int at = warp_k, slot = warp_k, windows = 0, window_stop = 0;
  int strip_stop = min(n_units, end - strip * p.strip_units);
  for (int stop = 0; stop < n_units;) {
    if (stop == window_stop) {
      ++windows;
      wait_for_window(p.is_ring ? 1 : p.windows_ahead - windows);
      __syncthreads();  // the window is whole, and nobody reads the one before it any more
      if (p.is_ring) load_window();
      window_stop =
          !p.is_ring && windows == p.windows_ahead ? n_units : min(n_units, windows * p.window);
    }
    stop = min(window_stop, strip_stop);
#pragma unroll 1
    for (; at < stop; at += warps_k) {
      multiply(x_lane + slot * (kUnitK * 2));
      slot += warps_k;
      if (slot >= p.ring) slot -= p.ring;
    }
    if (stop == strip_stop) {
      reduce();
      --strip;
      strip_stop = min(n_units, end - strip * p.strip_units);
      if (stop < n_units) load_only_groups();
    }
  }

#if __CUDA_ARCH__ >= 900
  if (splits > 1) {
    ++strip;  // the only one
    mbarrier_wait(barrier, 0);
    const float4* const partial = reinterpret_cast<const float4*>(shared + p.partial_offset);
    for (int place = thread; (place << p.splits_shift) + rank < n_items; place += n_threads) {
      float4 sum = partial[place];
      for (int other = 1; other < splits; ++other) add(sum, partial[other * most_items + place]);
      store((place << p.splits_shift) + rank, sum);
    }
  }
#endif
}

// ---- launch ----

struct Plan {
  int tiles_n, warps_k;  // of a block; tiles_n is a power of 2
  int splits;            // blocks of a cluster, a power of 2
  int blocks;            // of a stream; 0: one strip to a cluster
  int windows;           // that all of x is cut into, 1 to 4; 0: it goes through a ring
};

int log2_up(int64_t n) {
  int shift = 0;
  while ((int64_t{1} << shift) < n) ++shift;
  return shift;
}

bool is_aligned(const void* pointer, int nbytes) {
  return reinterpret_cast<uintptr_t>(pointer) % nbytes == 0;
}

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Sets everything in `p` but for its args and pointers; returns the bytes of shared memory.
uint32_t lay_out(const Plan& plan, Params& p) {
  const uint32_t M = static_cast<uint32_t>(p.args.M);
  p.n_tiles = divide_up(p.args.N, kTileN);
  p.n_steps = static_cast<int>(p.args.K / kStepK);
  p.n_groups = static_cast<int>(p.args.K / p.args.group_size);
  p.group_shift = p.n_groups == 1 ? 30 : log2_up(p.args.group_size) - log2_up(kUnitK);
  if (p.group_shift < 0) p.group_shift = 0;
  p.step_bytes = int64_t{p.n_tiles} * kTileBytes;
  p.whole_units = static_cast<int>(p.args.K / kUnitK);
  p.is_x_aligned = is_aligned(p.args.x, 16);
  p.is_y_aligned = is_aligned(p.args.y, 8) && p.args.N % 4 == 0;
  p.splits_shift = log2_up(plan.splits);
  p.tiles_shift = log2_up(plan.tiles_n);
  p.strip_units = divide_up(p.args.K, kUnitK);
  p.strip_bytes = p.strip_units * kUnitSteps * p.step_bytes - plan.tiles_n * kTileBytes;
  p.is_stream = plan.blocks > 0;
  const int64_t n_strips = divide_up(p.n_tiles, plan.tiles_n);
  p.work =
      p.is_stream ? cut(n_strips * p.strip_units, plan.blocks) : cut(p.strip_units, plan.splits);
  p.is_ring = plan.windows == 0;
  if (p.is_ring) {
    p.window = 2 * plan.warps_k;
    p.ring = 3 * p.window;
    p.windows_ahead = 2;
  } else {
    p.ring = p.is_stream && p.work.longest() > p.strip_units ? p.strip_units : p.work.longest();
    p.window = divide_up(divide_up(p.ring, plan.warps_k), plan.windows) * plan.warps_k;
    p.windows_ahead = divide_up(p.ring, p.window);
  }
  p.x_stride = p.ring * (kUnitK * 2) + 16;  // no bank conflicts
  p.sums_offset = round_up(M * p.x_stride, 128);
  p.partial_offset = p.sums_offset + plan.warps_k * 8 * (plan.tiles_n * kTileN + 4) * 4;
  p.barrier_offset = p.partial_offset;
  if (plan.splits > 1) {
    const int n_items = static_cast<int>(M) * plan.tiles_n * (kTileN / 4);
    p.barrier_offset += divide_up(n_items, plan.splits) * plan.splits * 16;
  }
  return p.barrier_offset + 16;
}

uint64_t partials_bytes(const Plan& plan, int64_t M) {
  return static_cast<uint64_t>(plan.blocks) * static_cast<uint64_t>(M * plan.tiles_n * kTileN) * 4;
}

template <typename X, int kTiles, int kSpanSteps, bool kZero, bool kAny>
cudaError_t launch(const MatvecMarlinArgs& args, const Plan& plan, bool is_sm90,
                   cudaStream_t stream) {
  Params p = {};
  p.args = args;
  p.is_early = is_sm90 && args.constant_weights;
  const uint32_t shared_bytes = lay_out(plan, p);
  p.partials = static_cast<float4*>(args.scratch);
  p.flags =
      reinterpret_cast<uint64_t*>(static_cast<char*>(args.scratch) + partials_bytes(plan, args.M));
  const auto kernel = matvec_marlin_mma_kernel<X, kTiles, kSpanSteps, kZero, kAny>;
  const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shared_bytes));
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute attributes[2] = {};
  unsigned n_attributes = 0;
  if (plan.splits > 1) {
    attributes[n_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[n_attributes].val.clusterDim.x = static_cast<unsigned>(plan.splits);
    attributes[n_attributes].val.clusterDim.y = 1;
    attributes[n_attributes++].val.clusterDim.z = 1;
  }
  if (is_sm90) {
    attributes[n_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      static_cast<unsigned>(plan.splits),
      static_cast<unsigned>(plan.blocks > 0 ? plan.blocks : divide_up(p.n_tiles, plan.tiles_n)));
  config.blockDim =
      dim3(32, static_cast<unsigned>(plan.warps_k), static_cast<unsigned>(plan.tiles_n));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  return cudaLaunchKernelEx(&config, kernel, p);
}

struct Device {
  int n_multiprocessors, shared_bytes;  // shared: that one block may have
  bool is_sm90;                         // clusters, dependent launch
};

cudaError_t get_device(Device* device) {
  int index = 0, major = 0;
  cudaError_t code = cudaGetDevice(&index);
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  }
  if (code == cudaSuccess) {
    code =
        cudaDeviceGetAttribute(&device->n_multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                  index);
  }
  device->is_sm90 = major >= 9;
  return code;
}

// Little work goes to clusters, which share out K; more of it too, if that keeps most multiprocessors
// busy; else each block gets as many units as any other, wherever strips end.
Plan choose_plan(const MatvecMarlinArgs& args, const Device& device) {
  const int n_tiles = divide_up(args.N, kTileN), n_units = divide_up(args.K, kUnitK);
  const int n_multiprocessors = device.n_multiprocessors;
  Plan plan = {1, max_warps(args.M), 1, 0, args.M <= 2 ? 1 : 4};
  while (plan.warps_k > n_units) plan.warps_k /= 2;
  while (device.is_sm90 && plan.splits < kMaxCluster &&
         2 * plan.splits * n_tiles <= n_multiprocessors &&
         2 * plan.splits * plan.warps_k <= n_units) {
    plan.splits *= 2;
  }
  const bool is_little =
      int64_t{n_tiles} * n_units <= int64_t{2 * max_warps(args.M)} * n_multiprocessors;
  const int64_t n_blocks = int64_t{n_tiles} * plan.splits;
  int resident = 1;  // blocks of a multiprocessor
  if (is_little) {
    while (n_blocks > int64_t{n_multiprocessors} * resident && plan.warps_k > 2) {
      plan.warps_k /= 2;
      resident *= 2;
    }
  } else if (n_blocks > n_multiprocessors || 5 * n_blocks < 4 * n_multiprocessors) {
    plan.splits = plan.windows = 1;
    while (plan.tiles_n < 4 && plan.warps_k > 1) {
      plan.tiles_n *= 2;
      plan.warps_k /= 2;
    }
    const int64_t all_units = int64_t{divide_up(n_tiles, plan.tiles_n)} * n_units;
    const int64_t most = divide_up(all_units, plan.warps_k);
    plan.blocks = n_multiprocessors;
    if (plan.blocks > most) plan.blocks = static_cast<int>(most);
  }
  Params p = {};
  p.args = args;
  const auto fits = [&]() {
    return lay_out(plan, p) <= static_cast<uint32_t>(device.shared_bytes / resident - 1024);
  };
  if (!fits()) plan.windows = 0;
  while (!fits() && plan.warps_k > 1) plan.warps_k /= 2;
  return plan;
}

template <typename X, int kTiles, int kSpanSteps, bool kZero>
cudaError_t choose_any(const MatvecMarlinArgs& args, const Device& device, cudaStream_t stream) {
  const Plan plan = choose_plan(args, device);
  const bool is_any = args.group_size == args.K || args.scale_dtype != args.dtype ||
                      (kZero && args.zero_point_dtype != args.dtype);
  return is_any ? launch<X, kTiles, kSpanSteps, kZero, true>(args, plan, device.is_sm90, stream)
                : launch<X, kTiles, kSpanSteps, kZero, false>(args, plan, device.is_sm90, stream);
}

template <typename X, int kTiles>
cudaError_t choose_groups(const MatvecMarlinArgs& args, const Device& device, cudaStream_t stream) {
  const bool is_short = args.group_size == 32 && args.K > 32, has_zero = args.zero_point != nullptr;
  if (is_short) {
    return has_zero ? choose_any<X, kTiles, 2, true>(args, device, stream)
                    : choose_any<X, kTiles, 2, false>(args, device, stream);
  }
  return has_zero ? choose_any<X, kTiles, 4, true>(args, device, stream)
                  : choose_any<X, kTiles, 4, false>(args, device, stream);
}

template <typename X>
cudaError_t choose_tiles(const MatvecMarlinArgs& args, const Device& device, cudaStream_t stream) {
  return args.M <= 8 ? choose_groups<X, 1>(args, device, stream)
                     : choose_groups<X, 2>(args, device, stream);
}

}  // namespace

uint64_t matvec_marlin_mma_scratch_bytes(const MatvecMarlinArgs& args) {
  Device device = {};
  if (get_device(&device) != cudaSuccess) return 0;  // the launch will say why
  const Plan plan = choose_plan(args, device);
  return partials_bytes(plan, args.M) + static_cast<uint64_t>(plan.blocks) * sizeof(uint64_t);
}

cudaError_t launch_matvec_marlin_mma(const MatvecMarlinArgs& args, cudaStream_t stream) {
  Device device = {};
  const cudaError_t code = get_device(&device);
  if (code != cudaSuccess) return code;
  return args.dtype == DType::kFloat16 ? choose_tiles<__half>(args, device, stream)
                                       : choose_tiles<__nv_bfloat16>(args, device, stream);
}

}  // namespace cuda_int4
