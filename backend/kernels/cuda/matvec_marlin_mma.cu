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
//
// Requires  M <= 16, K % 32 == 0, group_size 32, 64, 128, 256 or K  (checked by validate_linear)
// Grid      (splits, Np / 64 / tiles_n) blocks of (32, warps_k, tiles_n) threads: a block owns tiles_n
//           times 64 rows of w; warps_k warps and the blocks of a cluster (splits) share out K.
//           choose_plan sets the numbers
// Bytes     reads qdata, scales and zero points once, and x once a block; bound by qdata
// Numerics  sums of x * (offset + q) in fp32, a group (at most 64 k) at a time, started at minus the
//           offset times the sum of x; zero points and scales are applied in fp32; one rounding at
//           the store. Sums are added in a fixed order
// Source    direct; mma.m16n8k16 with the weight as its A operand, which is the order of marlin.v1
//
// A warp works on units: 64 rows x 64 k, 2 KB. A lane loads 16 bytes four times: each has its share of
// four fragments of 16 x 16 weights, which meet the same fragment of x. Weights go from memory to
// registers and nowhere else; x goes through shared memory, a window of some units at a time.
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
  Cut units;              // K over the blocks of a cluster
  int splits_shift;       // log2 of the blocks of a cluster
  int tiles_shift;        // log2 of the tiles of a block
  int window;             // units of a warp whose x is in shared memory together; even, or all
  int n_windows, stages;  // stages: windows in shared memory
  int n_tiles, n_steps, n_groups;
  int group_shift;     // log2(group_size / kUnitK), at least 0
  bool is_early;       // weights are read before griddepcontrol_wait
  bool is_x_aligned;   // to 16 bytes
  bool is_y_aligned;   // and N % 4 == 0: 4 outputs go in one store
  int64_t step_bytes;  // from 16 k to the next
  uint32_t x_stride, stage_bytes, partial_offset, barrier_offset;  // in bytes
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

__device__ __forceinline__ void wait_for_window(int stages) {
  if (stages == 3) {
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
// kDepth: units of a warp in flight or in use.
template <typename X, int kTiles, int kSpanSteps, bool kZero, bool kAny, int kDepth,
          int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    matvec_marlin_mma_kernel(const __grid_constant__ Params p) {
  constexpr int kSpans = kUnitSteps / kSpanSteps;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_base = shared_address(shared);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int warp_k = threadIdx.y, warp_n = threadIdx.z, warps_k = blockDim.y;
  const int thread = (warp_n * warps_k + warp_k) * 32 + lane, n_threads = warps_k * blockDim.z * 32;
  const int rank = blockIdx.x, splits = 1 << p.splits_shift;
  const int first_tile = blockIdx.y << p.tiles_shift, tile = first_tile + warp_n;
  const int M = static_cast<int>(p.args.M);
  const int unit_begin = p.units.begin(rank), unit_end = p.units.begin(rank + 1);
  const DType scale_dtype = p.n_groups == 1 ? DType::kFloat32 : p.args.scale_dtype;
  const DType zero_dtype = p.n_groups == 1 ? DType::kFloat32 : p.args.zero_point_dtype;

  // ---- load_unit: codes, scales and zero points of the warp's next unit to registers ----
  const uint8_t* next_codes = p.args.qdata + (unit_begin + warp_k) * (kUnitSteps * p.step_bytes) +
                              int64_t{tile} * kTileBytes + lane * 16;
  const int first_unit = tile < p.n_tiles ? unit_begin + warp_k : unit_end;
  int next_unit = first_unit;
  const int64_t groups_stride = int64_t{p.n_tiles} * kTileN;
  const int64_t my_scales = int64_t{tile} * kTileN + 8 * g;
  uint4 codes[kDepth][kUnitSteps] = {};
  RowValues<X, kAny> scales[kDepth][kSpans] = {}, zeros[kDepth][kZero ? kSpans : 1] = {};
  const auto load_unit = [&](int d) {
    if (next_unit >= unit_end) return;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      const int group = kSpans == 1 ? next_unit >> p.group_shift : next_unit * kSpans + s;
      if ((kAny && p.n_groups == 1) || (kSpans > 1 && group >= p.n_groups)) continue;
      const int64_t first = group * groups_stride + my_scales;
      scales[d][s].load(p.args.scale, first, p.args.scale_dtype);
      if constexpr (kZero) zeros[d][s].load(p.args.zero_point, first, p.args.zero_point_dtype);
    }
    // Of the last unit half may not be there: what the registers hold then meets x that is 0.
    codes[d][0] = load_global_early_v4(next_codes);
    codes[d][1] = load_global_early_v4(next_codes + p.step_bytes);
    if (next_unit * kUnitSteps + 2 < p.n_steps) {
      codes[d][2] = load_global_early_v4(next_codes + 2 * p.step_bytes);
      codes[d][3] = load_global_early_v4(next_codes + 3 * p.step_bytes);
    }
    next_unit += warps_k;
    next_codes += warps_k * (kUnitSteps * p.step_bytes);
  };
  // One group per row of w: its values as floats, once; they are permuted in blocks of 32.
  const auto load_only_group = [&](RowValues<X, kAny>& to, const void* from, DType dtype) {
    if constexpr (kAny) {
      float rows[8] = {};
      for (int i = 0; i < 8 && tile < p.n_tiles; ++i) {
        const int place = i / 4 * 32 + g / 2 * 8 + i % 4 * 2 + g % 2;
        rows[i] = load_as_float(from, int64_t{tile} * kTileN + place, dtype);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to.words[i] = {__float_as_uint(rows[4 * i]), __float_as_uint(rows[4 * i + 1]),
                       __float_as_uint(rows[4 * i + 2]), __float_as_uint(rows[4 * i + 3])};
      }
    }
  };
  const auto load_first = [&]() {
    if (kAny && p.n_groups == 1) {
      load_only_group(scales[0][0], p.args.scale, p.args.scale_dtype);
      if constexpr (kZero) load_only_group(zeros[0][0], p.args.zero_point, p.args.zero_point_dtype);
#pragma unroll
      for (int d = 1; d < kDepth; ++d) scales[d][0] = scales[0][0], zeros[d][0] = zeros[0][0];
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) load_unit(d);
  };

  // ---- load_window: x of some units of all warps to shared memory, zeros behind K ----
  const int window_units = p.window * warps_k;
  int64_t next_k = int64_t{unit_begin} * kUnitK;
  const auto load_window = [&](uint32_t stage) {
    const int row_chunks = window_units * (kUnitK / 8);  // of 16 bytes
    int m = 0, chunk = thread;
    while (true) {
      while (chunk >= row_chunks) {
        chunk -= row_chunks;
        ++m;
      }
      if (m >= M) break;
      const int64_t k = next_k + 8 * chunk;
      const bool is_there = k < p.args.K;
      const X* const from = static_cast<const X*>(p.args.x) + (is_there ? m * p.args.K + k : 0);
      const uint32_t at = stage + m * p.x_stride + chunk * 16;
      if (p.is_x_aligned) {
        cp_async_16_or_zero(shared_base + at, from, is_there);
      } else {
        uint4 value = {0, 0, 0, 0};
        if (is_there) value = load_8_elements(from);
        *reinterpret_cast<uint4*>(shared + at) = value;
      }
      chunk += n_threads;
    }
    next_k += window_units * kUnitK;
  };
  const auto load_first_windows = [&]() {
    load_window(0);
    cp_async_commit();
    for (int window = 1; window < p.stages - 1; ++window) {
      if (window < p.n_windows) load_window(window * p.stage_bytes);
      cp_async_commit();
    }
  };

  const uint32_t barrier = shared_base + p.barrier_offset;
  const int row_shift = 4 + p.tiles_shift;                          // log2 of items in a row of y
  const int n_items = M << row_shift;                               // of 4 sums
  const int most_items = (n_items + splits - 1) >> p.splits_shift;  // of one block of a cluster
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

  // ---- multiply_unit ----
  float out[4][kTiles][4] = {};  // strip, 8 rows of x, fragment
  // A lane gives ldmatrix a row of x; rows beyond M repeat the last one, and nobody stores them.
  const uint32_t x_row = min(lane % 8, M - 1) * p.x_stride;
  const uint32_t x_tile = min(lane % 8 + 8, M - 1) * p.x_stride - x_row;
  const uint32_t x_lane = shared_base + x_row + warp_k * (kUnitK * 2) + lane / 8 * 16;
  using Format = HalfFormat<X>;
  constexpr float kTaken = kZero ? 0.f : 8.f;
  const uint32_t minus_low = Offsets<X>::minus(Format::kLowMagic + kTaken);
  const uint32_t minus_high = Offsets<X>::minus(Format::kHighMagic + kTaken);
  const auto multiply_unit = [&](int d, uint32_t x_at) {
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
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int step = 0; step < kSpanSteps; ++step) {
          const uint32_t offsets[4] = {minus_low, minus_low, minus_high, minus_high};
          mma_m16n8k16_add(start[i], offsets, b[first + step][i], start[i], X{});
          if constexpr (kZero) {
            const uint32_t one = Offsets<X>::one(), ones[4] = {one, one, one, one};
            mma_m16n8k16_add(x_sum[i], ones, b[first + step][i], x_sum[i], X{});
          }
        }
      }
#pragma unroll
      for (int strip = 0; strip < 4; ++strip) {
        float sum[kTiles][4];
        memcpy(sum, start, sizeof(sum));
#pragma unroll
        for (int step = 0; step < kSpanSteps; ++step) {
          const uint4& four = codes[d][first + step];
          uint32_t pairs[4];
          magic_of_word(strip == 0   ? four.x
                        : strip == 1 ? four.y
                        : strip == 2 ? four.z
                                     : four.w,
                        pairs, X{});
          const uint32_t a[4] = {pairs[0], pairs[2], pairs[1], pairs[3]};
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            mma_m16n8k16_add(sum[i], a, b[first + step][i], sum[i], X{});
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float scale = scales[d][s].at(strip, half, scale_dtype);
          float zero = 0.f;
          if constexpr (kZero) zero = zeros[d][s].at(strip, half, zero_dtype);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int r = 2 * half; r < 2 * half + 2; ++r) {
              if constexpr (kZero) sum[i][r] -= zero * x_sum[i][r];
              out[strip][i][r] += scale * sum[i][r];
            }
          }
        }
      }
    }
  };

  const uint32_t x_step = warps_k * (kUnitK * 2);
  uint32_t stage = 0, next_stage = (p.stages - 1) * p.stage_bytes;
  int unit = first_unit, window_end = unit_begin;
  for (int window = 0; window < p.n_windows; ++window) {
    wait_for_window(p.stages);
    __syncthreads();  // the window is whole, and nobody reads the one before it any more
    if (p.stages > 1) {
      if (window + p.stages - 1 < p.n_windows) load_window(next_stage);
      cp_async_commit();
    }
    uint32_t x_at = x_lane + stage;
    next_stage = stage;
    stage += p.stage_bytes;
    if (stage == p.stages * p.stage_bytes) stage = 0;
    window_end = min(window_end + window_units, unit_end);
#pragma unroll 1
    while (unit < window_end) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (d > 0 && unit >= window_end) break;
        multiply_unit(d, x_at);
        load_unit(d);
        x_at += x_step;
        unit += warps_k;
      }
    }
  }

  // ---- reduce: over the warps of the block, then over the blocks of the cluster ----
  cp_async_wait<0>();
  __syncthreads();  // nobody reads x any more: the sums take its place
  float* const sums = reinterpret_cast<float*>(shared);
  const int sums_stride = (kTileN << p.tiles_shift) + 4;  // no bank conflicts
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int m = i * 8 + 2 * t + r % 2;
      if (m >= M) continue;
      float* const to = sums + (warp_k * M + m) * sums_stride + warp_n * kTileN + g + r / 2 * 8;
#pragma unroll
      for (int strip = 0; strip < 4; ++strip) to[16 * strip] = out[strip][i][r];
    }
  }
  __syncthreads();
  const auto store = [&](int item, float4 sum) {
    const int m = item >> row_shift, n = first_tile * kTileN + (item - (m << row_shift)) * 4;
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
#if __CUDA_ARCH__ >= 900
  if (splits > 1) cluster_wait();  // the other blocks have started: their barriers are there
#endif
  for (int item = thread; item < n_items; item += n_threads) {
    const int m = item >> row_shift;
    const float* from = sums + m * sums_stride + (item - (m << row_shift)) * 4;
    float4 sum = *reinterpret_cast<const float4*>(from);
    for (int w = 1; w < warps_k; ++w) {
      from += M * sums_stride;
      add(sum, *reinterpret_cast<const float4*>(from));
    }
    if (splits == 1) {
      store(item, sum);
    } else {
#if __CUDA_ARCH__ >= 900
      const int owner = item & (splits - 1);
      const int place = rank * most_items + (item >> p.splits_shift);
      store_async(address_in_rank(shared_base + p.partial_offset + place * 16, owner), sum,
                  address_in_rank(barrier, owner));
#endif
    }
  }
#if __CUDA_ARCH__ >= 900
  if (splits > 1) {
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
  int window;            // units of a warp, even; 0: all of them
};

int log2_up(int64_t n) {
  int shift = 0;
  while ((int64_t{1} << shift) < n) ++shift;
  return shift;
}

bool is_aligned(const void* pointer, int nbytes) {
  return reinterpret_cast<uintptr_t>(pointer) % nbytes == 0;
}

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Sets everything in `p` but for its args; returns the bytes of shared memory.
uint32_t lay_out(const Plan& plan, Params& p) {
  const uint32_t M = static_cast<uint32_t>(p.args.M);
  p.units = cut((p.args.K + kUnitK - 1) / kUnitK, plan.splits);
  p.splits_shift = log2_up(plan.splits);
  p.tiles_shift = log2_up(plan.tiles_n);
  const int rounds = (p.units.longest() + plan.warps_k - 1) / plan.warps_k;
  p.window = plan.window == 0 || plan.window > rounds ? rounds : plan.window;
  p.n_windows = (rounds + p.window - 1) / p.window;
  p.stages = p.n_windows < 3 ? p.n_windows : 3;
  p.n_tiles = static_cast<int>((p.args.N + kTileN - 1) / kTileN);
  p.n_steps = static_cast<int>(p.args.K / kStepK);
  p.n_groups = static_cast<int>(p.args.K / p.args.group_size);
  p.group_shift = p.n_groups == 1 ? 30 : log2_up(p.args.group_size) - log2_up(kUnitK);
  if (p.group_shift < 0) p.group_shift = 0;
  p.is_x_aligned = is_aligned(p.args.x, 16);
  p.is_y_aligned = is_aligned(p.args.y, 8) && p.args.N % 4 == 0;
  p.step_bytes = int64_t{p.n_tiles} * kTileBytes;
  p.x_stride = p.window * plan.warps_k * (kUnitK * 2) + 16;  // no bank conflicts
  p.stage_bytes = round_up(M * p.x_stride, 128);
  const uint32_t sums_bytes = plan.warps_k * M * (plan.tiles_n * kTileN + 4) * 4;
  uint32_t bytes = p.stage_bytes * p.stages;
  bytes = round_up(bytes > sums_bytes ? bytes : sums_bytes, 128);
  p.partial_offset = bytes;
  if (plan.splits > 1) bytes += (M * plan.tiles_n * (kTileN / 4) + plan.splits) * 16;
  p.barrier_offset = bytes;
  return bytes + 16;
}

template <typename X, int kTiles, int kSpanSteps, bool kZero, bool kAny, int kDepth,
          int kMaxThreads>
cudaError_t launch(const MatvecMarlinArgs& args, const Plan& plan, bool is_sm90,
                   cudaStream_t stream) {
  Params p = {};
  p.args = args;
  p.is_early = is_sm90 && args.constant_weights;
  const uint32_t shared_bytes = lay_out(plan, p);
  const auto kernel =
      matvec_marlin_mma_kernel<X, kTiles, kSpanSteps, kZero, kAny, kDepth, kMaxThreads>;
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
  config.gridDim = dim3(static_cast<unsigned>(plan.splits),
                        static_cast<unsigned>((p.n_tiles + plan.tiles_n - 1) / plan.tiles_n));
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

// Blocks of 8 to 16 warps, 16 warps to a multiprocessor, so that all of them run at once if they can:
// tiles side by side share x, which counts from 8 rows on; what is left of a multiprocessor takes a
// share of K.
Plan choose_plan(const MatvecMarlinArgs& args, const Device& device) {
  const int64_t n_tiles = (args.N + kTileN - 1) / kTileN;
  const int64_t n_units = (args.K + kUnitK - 1) / kUnitK;
  Plan plan = {1, 16, 1, 0};
  while (plan.tiles_n < 4 &&
         n_tiles / (2 * plan.tiles_n) * plan.warps_k >= int64_t{device.n_multiprocessors} * 12) {
    plan.tiles_n *= 2;
    plan.warps_k /= 2;
  }
  while (device.is_sm90 && plan.splits < kMaxCluster &&
         n_tiles * plan.splits * 2 <= device.n_multiprocessors &&
         n_units >= int64_t{2} * plan.splits * plan.warps_k) {
    plan.splits *= 2;
  }
  while (plan.warps_k > 1 && plan.warps_k > n_units) plan.warps_k /= 2;
  Params p = {};
  p.args = args;
  while (lay_out(plan, p) > static_cast<uint32_t>(device.shared_bytes)) {
    if (plan.window == 2) plan.warps_k /= 2;
    plan.window = plan.window == 0 ? 4 : 2;
  }
  return plan;
}

template <typename X, int kTiles, int kSpanSteps, bool kZero>
cudaError_t choose_any(const MatvecMarlinArgs& args, const Device& device, cudaStream_t stream) {
  const Plan plan = choose_plan(args, device);
  const bool is_any = args.group_size == args.K || args.scale_dtype != args.dtype ||
                      (kZero && args.zero_point_dtype != args.dtype);
  return is_any ? launch<X, kTiles, kSpanSteps, kZero, true, 1, 512>(args, plan, device.is_sm90,
                                                                     stream)
                : launch<X, kTiles, kSpanSteps, kZero, false, 2, 512>(args, plan, device.is_sm90,
                                                                      stream);
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

cudaError_t launch_matvec_marlin_mma(const MatvecMarlinArgs& args, cudaStream_t stream) {
  int index = 0, major = 0;
  Device device = {};
  cudaError_t code = cudaGetDevice(&index);
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  }
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&device.n_multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                  index);
  }
  if (code != cudaSuccess) return code;
  device.is_sm90 = major >= 9;
  return args.dtype == DType::kFloat16 ? choose_tiles<__half>(args, device, stream)
                                       : choose_tiles<__nv_bfloat16>(args, device, stream);
}

}  // namespace cuda_int4
