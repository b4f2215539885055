// matvec_w4a16_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g] + bias[n],
//                     g = k / group_size; M = 1..16 on tensor cores
//
//   operand     dtype               shape          order in memory                            align
//   x           f16 | bf16          [M, K]         row-major                                  dtype
//   qdata       u8                  [N, K/2]       row-major; even k in the low nibble        16 B
//   scale       f16 | bf16 | f32    [N, n_groups]  row-major                                  dtype
//   zero_point  of scale | f32      [N, n_groups]  row-major; absent means 8                  dtype
//   bias        dtype of x          [N]            contiguous; absent means 0                 dtype
//   y (out)     dtype of x          [M, N]         row-major                                  dtype
//
// Requires  M <= 16, K % 32 == 0, group_size 32, 64, 128, 256 or K  (checked by validate_linear)
// Grid      (cluster, clusters) blocks of (32 warps, groups) threads: clusters cut N, the blocks of a
//           cluster and the warps of a group cut K, the groups of a block take strips of 16 rows in
//           turn. choose_plan sets the numbers
// Bytes     reads qdata, scales and zero points once, and x once a block; bound by qdata
// Numerics  products and sums of x and codes are exact in the tensor core up to its fp32 sums, one
//           group at a time; zero points (times sums of x) and scales are applied in fp32; one
//           rounding at the store. Sums are added in a fixed order
// Source    direct; mma.m16n8k16 with the weight as its A operand
//
// A warp works on units: 16 rows x 256 k, 2 KB, which cp.async brings to a ring of its own. ldmatrix
// gives lane t = lane % 4 of a row word t of each 16 bytes: 8 consecutive codes out of a group of 32,
// so that no mma mixes groups, whatever the group size. The code pairs of a word that lie at the same
// bits of its halves, (0, 4), (1, 5), (2, 6), (3, 7), are what one register of a fragment holds; x is
// put in that order once, when it is staged, and the order of k within a sum is free.
//
// A code in bits 0-3 of a half of fp16 is the subnormal number q * 2^-24, in bits 4-7 q * 2^-20: no
// conversion at all, and two sums, of which the second counts 1/16. In bf16 it is 128 + q below
// exponent 0x43, and 128 joins the zero point.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matvec_w4a16_mma.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kMaxWarps = 16;   // of a block
constexpr int kStripRows = 16;  // mma_m
constexpr int kUnitK = 256;     // 128 bytes of a row
constexpr int kUnitBytes = kStripRows * kUnitK / 2;
constexpr int kMaxStages = 4;      // of a ring: units in flight or in use
constexpr int kSlots = 2;          // of the sums that the warps of a group hand over
constexpr int kColumnStride = 20;  // floats from column to column of 16 sums: no bank conflicts
constexpr int kMaxCluster = 8;
constexpr int64_t kMaxN = int64_t{1} << 30, kMaxK = int64_t{1} << 24;  // 32-bit offsets

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
  MatvecW4A16MmaArgs args;
  Cut rows;           // N over the clusters
  Cut units;          // K over the blocks of a cluster
  int cluster_shift;  // log2 of the blocks of a cluster
  bool is_dependent;  // launched so that the kernel before may still run
  int stages;
  int n_groups;
  int units_per_group;  // group_size / 256, at least 1
  int owned;            // strips of a cluster that one of its blocks adds up, at most
  bool is_x_aligned;    // to 16 bytes
  // In bytes.
  uint32_t x_stride, sums_offset, slots_offset, partial_offset, values_offset, barriers_offset,
      ring_offset;
};

// Codes to fragments: `low` of codes 0, 4, 2, 6 of two words, `high` of 1, 5, 3, 7. The value of a
// code is (q + kOffset) * kUnit, in `high` times 1 / kHigh.
template <typename X>
struct Decode;

template <>
struct Decode<__half> {
  static constexpr float kOffset = 0.f, kUnit = 1.f / 16777216.f, kHigh = 1.f / 16.f;
  static __device__ __forceinline__ void fragments(uint32_t w0, uint32_t w1, uint32_t (&low)[4],
                                                   uint32_t (&high)[4]) {
    constexpr uint32_t kLowBits = 0x000F000Fu, kHighBits = 0x00F000F0u;
    low[0] = w0 & kLowBits;
    low[1] = w1 & kLowBits;
    high[0] = w0 & kHighBits;
    high[1] = w1 & kHighBits;
    w0 >>= 8;
    w1 >>= 8;
    low[2] = w0 & kLowBits;
    low[3] = w1 & kLowBits;
    high[2] = w0 & kHighBits;
    high[3] = w1 & kHighBits;
  }
};

template <>
struct Decode<__nv_bfloat16> {
  static constexpr float kOffset = 128.f, kUnit = 1.f, kHigh = 1.f;
  static __device__ __forceinline__ uint32_t pair(uint32_t word) {
    return lop3_and_xor(word, 0x000F000Fu, 0x43004300u);
  }
  static __device__ __forceinline__ void fragments(uint32_t w0, uint32_t w1, uint32_t (&low)[4],
                                                   uint32_t (&high)[4]) {
    low[0] = pair(w0);
    low[1] = pair(w1);
    high[0] = pair(w0 >> 4);
    high[1] = pair(w1 >> 4);
    low[2] = pair(w0 >> 8);
    low[3] = pair(w1 >> 8);
    high[2] = pair(w0 >> 12);
    high[3] = pair(w1 >> 12);
  }
};

// Number i of an array of 16-bit floats in registers.
__device__ __forceinline__ float element(const uint32_t* words, int i, __half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))));
}
__device__ __forceinline__ float element(const uint32_t* words, int i, __nv_bfloat16) {
  return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
}

template <typename X>
__device__ __forceinline__ float sum_of_8(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = element(words, 2 * i, X{}) + element(words, 2 * i + 1, X{});
  }
  return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&to)[kWords], const uint8_t* from) {
  if constexpr (kWords == 1) {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    static_assert(kWords == 4, "1, 2 or 4 words");
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

__device__ __forceinline__ float load_any(const void* from, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(from)[i];
  if (dtype == DType::kFloat16) return as_float(static_cast<const __half*>(from)[i]);
  return as_float(static_cast<const __nv_bfloat16*>(from)[i]);
}

// 8 elements of 2 bytes that are aligned to no more than that.
__device__ __forceinline__ uint4 load_8_elements(const void* from) {
  const uint16_t* e = static_cast<const uint16_t*>(from);
  return {e[0] | (uint32_t{e[1]} << 16), e[2] | (uint32_t{e[3]} << 16),
          e[4] | (uint32_t{e[5]} << 16), e[6] | (uint32_t{e[7]} << 16)};
}

__device__ __forceinline__ void wait_for_unit(int stages) {
  if (stages == 4) {
    cp_async_wait<2>();
  } else if (stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// kSpan: k that share a scale, 256 where that or more do. kTiles: of 8 rows of x.
// kPacked: scales and zero points have the dtype of x and come with the codes of their unit; else a
// lane loads them a unit ahead, whatever their dtype and alignment.
template <typename X, int kSpan, int kTiles, bool kZero, bool kPacked>
struct Sizes {
  static constexpr int kSpans = kUnitK / kSpan;
  static constexpr int kValues = kStripRows * kSpans;  // scales of a unit
  static constexpr int kSumColumns = 8 * kTiles;
  static constexpr int kSegment = 2 * kSpans;  // bytes of a row's scales in a unit
  static constexpr int kScaleBytes = kPacked ? kStripRows * kSegment * (kZero ? 2 : 1) : 0;
  static constexpr int kStageBytes = kUnitBytes + (kScaleBytes + 127) / 128 * 128;
  static constexpr int kValueFloats = kPacked ? 0 : kValues * (kZero ? 2 : 1);
};

template <typename X, int kSpan, int kTiles, bool kZero, bool kPacked>
__global__ void __launch_bounds__(32 * kMaxWarps)
    matvec_w4a16_mma_kernel(const __grid_constant__ Params p) {
  using S = Sizes<X, kSpan, kTiles, kZero, kPacked>;
  using D = Decode<X>;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp_k = threadIdx.x / 32, group = threadIdx.y;
  const int warps = blockDim.x / 32, groups = blockDim.y, warp = group * warps + warp_k;
  const int M = static_cast<int>(p.args.M);
  const int row_begin = p.rows.begin(blockIdx.y), row_end = p.rows.begin(blockIdx.y + 1);
  const int units_begin = p.units.begin(blockIdx.x);
  const int n_units = p.units.begin(blockIdx.x + 1) - units_begin;
  const uint32_t row_bytes = static_cast<uint32_t>(p.args.K / 2);

  // -- codes of a unit to the ring; 8 lanes bring 128 bytes of a row, swizzled for ldmatrix --
  const uint32_t ring_begin = p.ring_offset + warp * (p.stages * S::kStageBytes);
  const int copy_row = lane / 8;
  const uint32_t copy_column = lane % 8 * 16;
  const uint32_t copy_even = shared_base + copy_row * 128 + (copy_column ^ (copy_row * 16));
  const uint32_t copy_odd = copy_even ^ 64;
  const uint32_t scale_row_bytes = 2 * p.n_groups;
  int next_row = warp_k < n_units ? row_begin + group * kStripRows : row_end, next_unit = warp_k;
  int next_rows = 0;  // of the strip, from this lane's first on
  const uint8_t* next_codes = nullptr;
  const uint8_t* next_scales = nullptr;  // kPacked: lanes 16.. have zero points
  auto aim = [&]() {
    next_rows = row_end - next_row - copy_row;
    next_codes = p.args.qdata + int64_t{next_row + copy_row} * row_bytes + copy_column;
    if constexpr (kPacked) {
      const void* const part = kZero && lane >= 16 ? p.args.zero_point : p.args.scale;
      next_scales =
          static_cast<const uint8_t*>(part) + int64_t{next_row + lane % 16} * scale_row_bytes;
    }
  };
  auto issue = [&](uint32_t stage) {
    if (next_row < row_end) {
      const int unit = units_begin + next_unit;
      const uint8_t* const from = next_codes + unit * 128;
      // What is not there need not be zero: its x is, or its row is nobody's.
      const int rows = unit * 128 + copy_column < row_bytes ? next_rows : 0;
      if (rows > 0) cp_async_16(stage + copy_even, from);
      if (rows > 4) cp_async_16(stage + copy_odd + 512, from + 4 * row_bytes);
      if (rows > 8) cp_async_16(stage + copy_even + 1024, from + 8 * row_bytes);
      if (rows > 12) cp_async_16(stage + copy_odd + 1536, from + 12 * row_bytes);
      if constexpr (kPacked) {
        if ((kZero || lane < 16) && next_row + lane % 16 < row_end) {
          const uint32_t at = unit * S::kSegment;
          const uint32_t to = shared_base + stage + kUnitBytes + lane * S::kSegment;
          const int n_bytes = min(static_cast<int>(scale_row_bytes - at), S::kSegment);
          if constexpr (S::kSegment == 16) {
            cp_async_16_up_to(to, next_scales + at, n_bytes);
          } else {
            cp_async_l1_up_to<S::kSegment>(to, next_scales + at, n_bytes);
          }
        }
      }
      next_unit += warps;
      if (next_unit >= n_units) {
        next_unit = warp_k;
        next_row += groups * kStripRows;
        aim();
      }
    }
    cp_async_commit();
  };

  auto issue_first = [&]() {
    aim();
#pragma unroll 1
    for (int i = 0; i < p.stages - 1; ++i) issue(ring_begin + i * S::kStageBytes);
  };
  // -- barriers: one for each slot of a group, one for the sums that the cluster sends --
  const uint32_t barriers = shared_base + p.barriers_offset + group * (kSlots * 8);
  [[maybe_unused]] const uint32_t parts_barrier =
      shared_base + p.barriers_offset + groups * (kSlots * 8);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) mbarrier_init(barriers + i * 8, 32 * warps);
#if __CUDA_ARCH__ >= 900
    if (p.cluster_shift > 0 && group == 0) {
      const int strips = (row_end - row_begin + kStripRows - 1) / kStripRows;
      const int last = (1 << p.cluster_shift) - 1;
      const int own = (strips + last - static_cast<int>(blockIdx.x)) >> p.cluster_shift;
      mbarrier_init(parts_barrier, 1);
      mbarrier_arrive_expect_tx(parts_barrier, (own * M * (kStripRows * 4)) << p.cluster_shift);
    }
    fence_mbarrier_init();
#endif
  }
#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) {
    __syncwarp();
    cluster_arrive_relaxed();
  }
#endif

  // -- x to shared memory, in fragment order, with its sums. A warp takes 256 k of a row, a lane 8 of
  // them, and all its loads are on their way before the first is looked at. They come back behind
  // the codes that were asked for before them: x first, but for what overlaps the kernel before --
  constexpr int kBatch = 8;
  float* const sums = reinterpret_cast<float*>(shared + p.sums_offset);
  int x_m = 0, x_unit = warp;  // of the next load
  auto x_settle = [&](int& m, int& unit) {
    while (unit >= n_units && m < M) {
      unit -= n_units;
      ++m;
    }
  };
  uint4 x_batch[kBatch];
  auto load_x = [&](int m, int unit) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x_settle(m, unit);
      const int64_t k = int64_t{units_begin + unit} * kUnitK + 8 * lane;
      x_batch[i] = {0, 0, 0, 0};
      if (m < M && k < p.args.K) {
        const X* const from = static_cast<const X*>(p.args.x) + m * p.args.K + k;
        x_batch[i] = p.is_x_aligned ? *reinterpret_cast<const uint4*>(from) : load_8_elements(from);
      }
      unit += warps * groups;
    }
  };
  auto store_x = [&](int& m, int& unit) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x_settle(m, unit);
      if (m >= M) break;
      const uint4 v = x_batch[i];
      *reinterpret_cast<uint4*>(shared + m * p.x_stride + unit * 512 + lane * 16) = {
          __byte_perm(v.x, v.z, 0x5410), __byte_perm(v.y, v.w, 0x5410),
          __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x7632)};
      float sum = sum_of_8<X>(v);
      constexpr int kLanes = kSpan / 8;
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
      if (lane % kLanes == 0) {
        sums[(unit * S::kSpans + lane / kLanes) * S::kSumColumns + m] =
            sum * -D::kUnit * (kZero ? 1.f : D::kOffset + 8.f);
      }
      unit += warps * groups;
    }
  };
  if (p.is_dependent) {
    issue_first();
    griddepcontrol_wait();  // nothing above reads what kernels write
    load_x(x_m, x_unit);
  } else {
    load_x(x_m, x_unit);
    issue_first();
  }
  store_x(x_m, x_unit);
#pragma unroll 1
  while (x_m < M) {
    load_x(x_m, x_unit);
    store_x(x_m, x_unit);
    x_settle(x_m, x_unit);
  }

  // -- not packed: scales and zero points to registers, then to shared memory as floats --
  constexpr int kPerLane = (S::kValues + 31) / 32;
  float scale_ahead[kPerLane], zero_ahead[kPerLane];
  float* values = reinterpret_cast<float*>(shared + p.values_offset) + warp * (2 * S::kValueFloats);
  int parity = 0;
  auto load_values = [&](int row, int unit) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int value = lane + 32 * i;
      if (value >= S::kValues) break;
      const int value_row = min(row + value / S::kSpans, row_end - 1);
      const int column =
          kSpan < kUnitK ? min((units_begin + unit) * S::kSpans + value % S::kSpans, p.n_groups - 1)
                         : (units_begin + unit) / p.units_per_group;
      const int64_t index = int64_t{value_row} * p.n_groups + column;
      scale_ahead[i] = load_any(p.args.scale, index, p.args.scale_dtype);
      if constexpr (kZero) {
        zero_ahead[i] = p.args.zero_point == nullptr
                            ? 8.f
                            : load_any(p.args.zero_point, index, p.args.zero_point_dtype);
      }
    }
  };
  auto store_values = [&](float* to) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int value = lane + 32 * i;
      if (value >= S::kValues) break;
      to[value] = scale_ahead[i];
      if constexpr (kZero) to[S::kValues + value] = zero_ahead[i] + D::kOffset;
    }
  };
  const int row_step = groups * kStripRows;
  int row = row_begin + group * kStripRows;
  if constexpr (!kPacked) {
    if (row < row_end && warp_k < n_units) load_values(row, warp_k);
  }
  __syncthreads();

  // -- compute --
  const int g = lane / 4, t = lane % 4;
  const int matrix_row = lane % 16;
  const uint32_t matrix_offset =
      shared_base + matrix_row * 128 + (((lane / 16) ^ (matrix_row & 7)) * 16);
  // Columns beyond M repeat the last row of x; nobody stores them.
  const uint8_t* const x_lane = shared + min(g, M - 1) * p.x_stride + t * 16;
  const uint32_t x_tile = (min(g + 8, M - 1) - min(g, M - 1)) * p.x_stride;
  uint32_t stage = ring_begin, free_stage = ring_begin + (p.stages - 1) * S::kStageBytes;
  const uint32_t ring_end = ring_begin + p.stages * S::kStageBytes;
  float acc[kTiles][4];

  auto consume = [&](int unit, int row_ahead, int unit_ahead) {
    wait_for_unit(p.stages);
    float* const here_values = values + parity * S::kValueFloats;
    if constexpr (!kPacked) {
      store_values(here_values);
      parity ^= 1;
    }
    __syncwarp();  // the unit is whole, and nobody reads the one before it any more
    issue(free_stage);
    if constexpr (!kPacked) {
      if (row_ahead < row_end) load_values(row_ahead, unit_ahead);
    }
    const uint8_t* const here = shared + stage;
    const uint32_t matrices = matrix_offset + stage;
    free_stage = stage;
    stage += S::kStageBytes;
    if (stage == ring_end) stage = ring_begin;
    const uint8_t* const x_unit = x_lane + unit * 512;
    const float* const sums_unit = sums + unit * (S::kSpans * S::kSumColumns) + 2 * t;
    constexpr int kWords = kPacked ? S::kSegment / 4 : 1;
    uint32_t scale_words[2][kWords], zero_words[2][kWords];
    if constexpr (kPacked) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const from = here + kUnitBytes + (g + 8 * half) * S::kSegment;
        load_words(scale_words[half], from);
        if constexpr (kZero) load_words(zero_words[half], from + kStripRows * S::kSegment);
      }
    }
    float low[kTiles][4], high[kTiles][4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t words[4];
      ldmatrix_x4(words, matrices ^ (pair * 32));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = 2 * pair + h;  // of 32 k
        const int span = j * 32 / kSpan;
        if (j * 32 % kSpan == 0) {  // a sum starts at minus what the zero points take off it
          float zero[2] = {1.f, 1.f};
          if constexpr (kZero) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if constexpr (kPacked) {
                zero[half] = element(zero_words[half], span, X{}) + D::kOffset;
              } else {
                zero[half] = here_values[S::kValues + (g + 8 * half) * S::kSpans + span];
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const float2 sum =
                *reinterpret_cast<const float2*>(sums_unit + span * S::kSumColumns + tile * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              low[tile][i] = (i % 2 ? sum.y : sum.x) * zero[i / 2];
              high[tile][i] = 0.f;
            }
          }
        }
        uint32_t a_low[4], a_high[4];
        D::fragments(words[2 * h], words[2 * h + 1], a_low, a_high);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 b = *reinterpret_cast<const uint4*>(x_unit + j * 64 + tile * x_tile);
          const uint32_t b_low[2] = {b.x, b.y}, b_high[2] = {b.z, b.w};
          mma_m16n8k16(low[tile], a_low, b_low, X{});
          mma_m16n8k16(high[tile], a_high, b_high, X{});
        }
        if ((j + 1) * 32 % kSpan == 0) {
          float scale[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if constexpr (kPacked) {
              scale[half] = element(scale_words[half], span, X{});
            } else {
              scale[half] = here_values[(g + 8 * half) * S::kSpans + span];
            }
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              acc[tile][i] += scale[i / 2] * (high[tile][i] * D::kHigh + low[tile][i]);
            }
          }
        }
      }
    }
  };

  // -- sums to y, or to the block of the cluster that adds them up --
  auto store = [&](int n, int m, float sum) {
    sum *= 1.f / D::kUnit;
    if (p.args.bias != nullptr) sum += as_float(static_cast<const X*>(p.args.bias)[n]);
    static_cast<X*>(p.args.y)[m * p.args.N + n] = from_float<X>(sum);
  };
  auto partial_address = [&](int strip_row, int m) {
    uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
    const int strip = (strip_row - row_begin) / kStripRows;
    const int from = (blockIdx.x * p.owned + (strip >> p.cluster_shift)) * M + m;
    address = address_in_rank(shared_base + p.partial_offset + from * (kStripRows * 4),
                              strip & ((1 << p.cluster_shift) - 1));
#endif
    return address;
  };
  auto parts_barrier_of = [&](int strip_row) {
    uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
    const int strip = (strip_row - row_begin) / kStripRows;
    address = address_in_rank(parts_barrier, strip & ((1 << p.cluster_shift) - 1));
#endif
    return address;
  };
  float* const slots = reinterpret_cast<float*>(shared + p.slots_offset) +
                       group * (kSlots * warps * M * kColumnStride);
  const int slot_floats = warps * M * kColumnStride;
  // Adds up what the warps of the group left in a slot.
  auto reduce = [&](const float* slot, int strip_row) {
    for (int item = lane; item < M * 4; item += 32) {
      const int m = item / 4, r = item % 4 * 4;
      const float* const from = slot + m * kColumnStride + r;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 4
      for (int w = 1; w < warps; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(from + w * M * kColumnStride);
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      if (p.cluster_shift > 0) {
#if __CUDA_ARCH__ >= 900
        store_async(partial_address(strip_row, m) + r * 4, sum, parts_barrier_of(strip_row));
#endif
      } else {
        const int n = strip_row + r;
        if (n < row_end) store(n, m, sum.x);
        if (n + 1 < row_end) store(n + 1, m, sum.y);
        if (n + 2 < row_end) store(n + 2, m, sum.z);
        if (n + 3 < row_end) store(n + 3, m, sum.w);
      }
    }
  };

#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) cluster_wait();  // the other blocks have started: their memory is there
#endif
  int iteration = 0, turn = 0;  // turn: iteration % warps, whose reduction it is
  for (; row < row_end; row += row_step, ++iteration) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[tile][i] = 0.f;
    }
#pragma unroll 1
    for (int unit = warp_k; unit < n_units; unit += warps) {
      const bool is_last = unit + warps >= n_units;
      consume(unit, is_last ? row + row_step : row, is_last ? warp_k : unit + warps);
    }
    if (warps == 1) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = tile * 8 + 2 * t + i % 2, r = g + i / 2 * 8;
          if (m >= M) continue;
          if (p.cluster_shift > 0) {
#if __CUDA_ARCH__ >= 900
            store_async(partial_address(row, m) + r * 4, acc[tile][i], parts_barrier_of(row));
#endif
          } else if (row + r < row_end) {
            store(row + r, m, acc[tile][i]);
          }
        }
      }
      continue;
    }
    // The strip before is added up now: by now all its sums are there without a wait.
    if (iteration > 0) {
      const int before = iteration - 1;
      mbarrier_wait(barriers + before % kSlots * 8, before / kSlots & 1);
      if (turn == warp_k) reduce(slots + before % kSlots * slot_floats, row - row_step);
      if (++turn == warps) turn = 0;
    }
    float* const slot = slots + iteration % kSlots * slot_floats + warp_k * M * kColumnStride;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = tile * 8 + 2 * t + i % 2;
        if (m < M) slot[m * kColumnStride + g + i / 2 * 8] = acc[tile][i];
      }
    }
    mbarrier_arrive(barriers + iteration % kSlots * 8);
  }
  griddepcontrol_launch_dependents();
  if (warps > 1 && iteration > 0 && turn == warp_k) {
    const int before = iteration - 1;
    mbarrier_wait(barriers + before % kSlots * 8, before / kSlots & 1);
    reduce(slots + before % kSlots * slot_floats, row - row_step);
  }
#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) {
    mbarrier_wait(parts_barrier, 0);
    const float* const parts = reinterpret_cast<const float*>(shared + p.partial_offset);
    const int rank_floats = p.owned * M * kStripRows;
    for (int i = warp;; i += warps * groups) {
      const int strip_row = row_begin + (((i << p.cluster_shift) + blockIdx.x) * kStripRows);
      if (strip_row >= row_end) break;
      for (int item = lane; item < M * kStripRows; item += 32) {
        const float* const from = parts + i * M * kStripRows + item;
        float sum = from[0];
        for (int rank = 1; rank < 1 << p.cluster_shift; ++rank) sum += from[rank * rank_floats];
        const int n = strip_row + item % kStripRows;
        if (n < row_end) store(n, item / kStripRows, sum);
      }
    }
  }
#endif
}

// ---- launch ----

struct Plan {
  int warps;     // of a group
  int groups;    // of a block
  int cluster;   // blocks; a power of 2
  int clusters;  // of the grid
  int stages;    // 2, 3 or 4 units in a warp's ring
  bool is_dependent;
};

struct Device {
  int n_multiprocessors, shared_bytes;  // shared: that one block may have
  bool has_clusters;                    // sm_90
};

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Sets everything in `p` but for its args; returns the bytes of shared memory.
template <typename S>
int64_t lay_out(const Plan& plan, Params& p) {
  const int64_t M = p.args.M;
  const int n_units = static_cast<int>((p.args.K + kUnitK - 1) / kUnitK);
  p.rows = cut(p.args.N, plan.clusters);
  p.units = cut(n_units, plan.cluster);
  p.cluster_shift = 0;
  while (1 << p.cluster_shift < plan.cluster) ++p.cluster_shift;
  p.is_dependent = plan.is_dependent;
  p.stages = plan.stages;
  p.n_groups = static_cast<int>(p.args.K / p.args.group_size);
  p.units_per_group = n_units;
  if (p.n_groups > 1) {
    p.units_per_group =
        p.args.group_size > kUnitK ? static_cast<int>(p.args.group_size / kUnitK) : 1;
  }
  const int64_t strips = (p.rows.longest() + kStripRows - 1) / kStripRows;
  p.owned = static_cast<int>((strips + plan.cluster - 1) / plan.cluster);
  p.is_x_aligned = reinterpret_cast<uintptr_t>(p.args.x) % 16 == 0;
  p.x_stride = p.units.longest() * 512 + 64;
  int64_t at = round_up(M * p.x_stride, 128);
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 128);
    return static_cast<uint32_t>(begin);
  };
  const int64_t all_warps = int64_t{plan.warps} * plan.groups;
  p.sums_offset = take(int64_t{p.units.longest()} * S::kSpans * S::kSumColumns * 4);
  p.slots_offset = take(plan.warps == 1 ? 0 : all_warps * kSlots * M * kColumnStride * 4);
  p.partial_offset =
      take(plan.cluster == 1 ? 0 : int64_t{plan.cluster} * p.owned * M * kStripRows * 4);
  p.values_offset = take(all_warps * 2 * S::kValueFloats * 4);
  p.barriers_offset = take((plan.groups * kSlots + 1) * 8);
  p.ring_offset = take(all_warps * plan.stages * S::kStageBytes);
  return at;
}

// Time in turns: all warps of a multiprocessor with a unit each, 1760 clocks at the rate of the
// memory. Fitted to an H200, where the plan it finds is within 5 % of the best of some 30 for most shapes.
float estimate(const Plan& plan, const MatvecW4A16MmaArgs& args) {
  const int64_t n_units = (args.K + kUnitK - 1) / kUnitK;
  const int64_t units = (n_units + plan.cluster - 1) / plan.cluster;
  const int64_t rows = (args.N + plan.clusters - 1) / plan.clusters;
  const int64_t strips = (rows + kStripRows - 1) / kStripRows;
  const int64_t turns = (units + plan.warps - 1) / plan.warps;
  const float hand_over = 0.25f + 0.15f * static_cast<float>(plan.warps);
  const auto round = [&](int64_t groups) {  // with some of the groups at work
    const float share = static_cast<float>(groups * plan.warps) / kMaxWarps;
    return (static_cast<float>(turns) + hand_over) * (0.25f + 0.75f * share);
  };
  float time = static_cast<float>(strips / plan.groups) * round(plan.groups);
  if (strips % plan.groups > 0) time += round(strips % plan.groups);
  const float x = static_cast<float>(args.M * units * kUnitK * 2) / (11.f * 1760.f);
  // A cluster of 8 is for what fits no other way.
  const float end_of_cluster = plan.cluster == 1   ? 0.f
                               : plan.cluster == 2 ? 1.2f
                               : plan.cluster == 4 ? 2.2f
                                                   : 8.f;
  return time + x + end_of_cluster;
}

// The plan with the smallest estimate of those that fit; false if none does.
template <typename S>
bool choose_plan(const MatvecW4A16MmaArgs& args, const Device& device, Plan* best) {
  const int64_t n_strips = (args.N + kStripRows - 1) / kStripRows;
  const int64_t n_units = (args.K + kUnitK - 1) / kUnitK;
  // It reads the weights before it waits for the kernel ahead.
  const bool is_dependent = device.has_clusters && args.constant_weights;
  float best_time = 0.f;
  bool found = false;
  for (int cluster = 1; cluster <= (device.has_clusters ? kMaxCluster : 1); cluster *= 2) {
    if (cluster > n_units) break;
    // A cluster saves loads of x: it has not been seen to pay where x is short and blocks are many.
    if (cluster > 1 && found && args.M <= 2 && n_strips >= device.n_multiprocessors) break;
    // Clusters of 4 and 8 leave 12 of an H200's 132 multiprocessors without a block.
    const int n_usable =
        cluster <= 2 ? device.n_multiprocessors : device.n_multiprocessors * 10 / 11;
    const int64_t n_resident = n_usable >= cluster ? n_usable / cluster : 1;
    const int64_t units = (n_units + cluster - 1) / cluster;
    for (int waves = 1; waves <= 8;
         waves *= 2) {  // more of them, where sums of all rows do not fit
      const int64_t most = n_resident * waves;
      const int clusters = static_cast<int>(n_strips < most ? n_strips : most);
      for (int all = kMaxWarps; all >= kMaxWarps / 4; all /= 2) {
        for (int warps = 1; warps <= all && warps <= units; ++warps) {
          Plan plan = {warps, all / warps, cluster, clusters, kMaxStages, is_dependent};
          // Small work leaves room for the block of the kernel behind.
          if ((units + warps - 1) / warps <= 8) plan.stages = 3;
          const float time = static_cast<float>(waves) * estimate(plan, args);
          if (found && time >= best_time) continue;
          Params p = {};
          p.args = args;
          while (plan.stages >= 2 && lay_out<S>(plan, p) > device.shared_bytes) --plan.stages;
          if (plan.stages < 2) continue;
          found = true;
          best_time = time;
          *best = plan;
        }
      }
    }
  }
  return found;
}

template <typename X, int kSpan, int kTiles, bool kZero, bool kPacked>
cudaError_t launch(const MatvecW4A16MmaArgs& args, const Plan& plan, cudaStream_t stream) {
  Params p = {};
  p.args = args;
  const int64_t shared_bytes = lay_out<Sizes<X, kSpan, kTiles, kZero, kPacked>>(plan, p);
  const auto kernel = matvec_w4a16_mma_kernel<X, kSpan, kTiles, kZero, kPacked>;
  const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shared_bytes));
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute attributes[2] = {};
  unsigned n_attributes = 0;
  if (plan.cluster > 1) {
    attributes[n_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[n_attributes].val.clusterDim.x = static_cast<unsigned>(plan.cluster);
    attributes[n_attributes].val.clusterDim.y = 1;
    attributes[n_attributes++].val.clusterDim.z = 1;
  }
  if (plan.is_dependent) {
    attributes[n_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster), static_cast<unsigned>(plan.clusters));
  config.blockDim =
      dim3(static_cast<unsigned>(32 * plan.warps), static_cast<unsigned>(plan.groups));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Half the rows of x at a time where all of them do not fit.
template <typename X, int kSpan, int kTiles, bool kZero, bool kPacked>
cudaError_t plan_and_launch(const MatvecW4A16MmaArgs& args, const Device& device,
                            cudaStream_t stream, bool* launched) {
  Plan plan;
  if (choose_plan<Sizes<X, kSpan, kTiles, kZero, kPacked>>(args, device, &plan)) {
    *launched = true;
    return launch<X, kSpan, kTiles, kZero, kPacked>(args, plan, stream);
  }
  if (args.M == 1) return cudaSuccess;
  MatvecW4A16MmaArgs part = args;
  part.M = args.M / 2;
  cudaError_t code =
      plan_and_launch<X, kSpan, kTiles, kZero, kPacked>(part, device, stream, launched);
  if (code != cudaSuccess || !*launched) return code;
  part.x = static_cast<const X*>(args.x) + part.M * args.K;
  part.y = static_cast<X*>(args.y) + part.M * args.N;
  part.M = args.M - part.M;
  return plan_and_launch<X, kSpan, kTiles, kZero, kPacked>(part, device, stream, launched);
}

template <typename X, int kSpan, bool kZero, bool kPacked>
cudaError_t choose_tiles(const MatvecW4A16MmaArgs& args, const Device& device, cudaStream_t stream,
                         bool* launched) {
  return args.M > 8 ? plan_and_launch<X, kSpan, 2, kZero, kPacked>(args, device, stream, launched)
                    : plan_and_launch<X, kSpan, 1, kZero, kPacked>(args, device, stream, launched);
}

// Scales of a unit's row can be copied at once.
bool is_packed(const MatvecW4A16MmaArgs& args, int span) {
  const int64_t segment = 2 * kUnitK / span, row = 2 * (args.K / args.group_size);
  const auto is_aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % segment == 0 && row % segment == 0;
  };
  if (args.scale_dtype != args.dtype || !is_aligned(args.scale)) return false;
  return args.zero_point == nullptr ||
         (args.zero_point_dtype == args.dtype && is_aligned(args.zero_point));
}

template <typename X, int kSpan>
cudaError_t choose_scales(const MatvecW4A16MmaArgs& args, const Device& device, cudaStream_t stream,
                          bool* launched) {
  if constexpr (kSpan < kUnitK) {
    if (is_packed(args, kSpan)) {
      return args.zero_point == nullptr
                 ? choose_tiles<X, kSpan, false, true>(args, device, stream, launched)
                 : choose_tiles<X, kSpan, true, true>(args, device, stream, launched);
    }
  }
  return choose_tiles<X, kSpan, true, false>(args, device, stream, launched);
}

template <typename X>
cudaError_t choose_span(const MatvecW4A16MmaArgs& args, const Device& device, cudaStream_t stream,
                        bool* launched) {
  if (args.group_size == args.K) return choose_scales<X, 256>(args, device, stream, launched);
  switch (args.group_size) {
    case 32:
      return choose_scales<X, 32>(args, device, stream, launched);
    case 64:
      return choose_scales<X, 64>(args, device, stream, launched);
    case 128:
      return choose_scales<X, 128>(args, device, stream, launched);
    default:
      return choose_scales<X, 256>(args, device, stream, launched);
  }
}

}  // namespace

cudaError_t launch_matvec_w4a16_mma(const MatvecW4A16MmaArgs& args, cudaStream_t stream,
                                    bool* launched) {
  *launched = false;
  if (args.M < 1 || args.M > 16 || args.N > kMaxN || args.K > kMaxK) return cudaSuccess;
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
  device.has_clusters = major >= 9;
  return args.dtype == DType::kFloat16 ? choose_span<__half>(args, device, stream, launched)
                                       : choose_span<__nv_bfloat16>(args, device, stream, launched);
}

}  // namespace cuda_int4
