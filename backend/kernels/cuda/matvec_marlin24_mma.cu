// matvec_marlin24_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - 8) * scale[n, k / group_size]
//                        + bias[n] over the k that are kept, or with
//                        x[m, k] = a[m, k] * s_x[m, k / 32]; M = 1..16 on sparse tensor cores
//
//   operand    dtype              shape           order in memory                         align
//   x          f16 | bf16         [M, K]          row-major                               dtype
//   a, s_x     i8, f32            [M, K], ..      quantized_activation.h, in place of x   16 B
//   qdata      u32                [K/32, 2*Np]    marlin24.v1 (marlin.h)                  16 B
//   meta       u16                [K/32, 2*Np]    marlin24.v1                             16 B
//   scale      f16 | bf16 | f32   [n_groups, Np]  marlin24.v1                             16 B
//   bias       dtype of y         [N]             contiguous; absent means 0              dtype
//   y (out)    f16 | bf16         [M, N]          row-major                               dtype
//
// Requires  M <= 16, K % 32 == 0, group_size 32, 64, 128, 256 or K, Np = N rounded up to 64
//           (checked by validate_linear)
// Grid      (cluster, clusters) blocks of (32 * warps, groups) threads: the groups of all clusters
//           take strips of 64 rows of the weight in turn, the blocks of a cluster and the warps of
//           a group share K. choose_plan sets the numbers
// Bytes     reads qdata, meta and scales once, and x once a block; bound by qdata and meta
// Numerics  products of x and codes are exact in the tensor core up to its fp32 sums, one group at
//           a time; scales (and s_x) are applied in fp32; one rounding at the store. Sums are added
//           in a fixed order
// Source    direct; mma.sp.m16n8k32 with the weight as its A operand
//
// A warp works on units of 64 rows x 128 k: 4 tiles of 512 bytes of codes and 256 of places, which
// cp.async brings to a ring of its own. A lane's 16 bytes of a tile are its registers of four
// instructions (marlin_fragments.cuh), its word of places is theirs as it lies.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "marlin_fragments.cuh"
#include "matvec_marlin24.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kMaxGroups = 15;  // of a block: each has a barrier
constexpr int kStripRows = 64;
constexpr int kTileK = 32, kUnitTiles = 4, kUnitK = kTileK * kUnitTiles;
constexpr int kCodeBytes = 512, kPlaceBytes = 256;  // of a tile
constexpr int kXUnitBytes = 2 * kUnitK;             // of a row of x, as fp16 or bf16
constexpr int kColumnFloats = 68;  // from column to column of 64 sums: no bank conflicts
constexpr int kMaxRounds = 2;      // of 8 rows of x
// Warps of a block, by rounds: what registers allow.
__host__ __device__ constexpr int max_warps(int rounds) { return rounds == 1 ? 20 : 16; }
constexpr int kMaxCluster = 8;
constexpr int64_t kMaxN = int64_t{1} << 28, kMaxK = int64_t{1} << 24;  // 32-bit offsets

// How scales come: applied to the sums of all k, by unit, by two tiles, by tile, or by tile of any
// dtype and group_size.
enum class Scales { kAtEnd, kUnit, kPair, kTile, kAny };

struct Params {
  MatvecMarlin24Args args;
  int strips;         // of 64 rows
  int tiles;          // of 32 k
  int units;          // of 4 tiles
  int cluster_shift;  // log2 of the blocks of a cluster
  int group_shift;    // tile t is in group t >> group_shift
  int ring_units;     // in a warp's ring: 1 or 2
  bool is_x_aligned;  // to 16 bytes
  // In bytes.
  uint32_t x_stride, factors_offset, ring_offset, slots_offset, partial_offset;
};

__device__ __forceinline__ float load_any(const void* from, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(from)[i];
  if (dtype == DType::kFloat16) return as_float(static_cast<const __half*>(from)[i]);
  return as_float(static_cast<const __nv_bfloat16*>(from)[i]);
}

__device__ __forceinline__ uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// 8 elements of 2 bytes that are aligned to no more than that.
__device__ __forceinline__ uint4 load_8_elements(const void* from) {
  const uint16_t* e = static_cast<const uint16_t*>(from);
  return {e[0] | (uint32_t{e[1]} << 16), e[2] | (uint32_t{e[3]} << 16),
          e[4] | (uint32_t{e[5]} << 16), e[6] | (uint32_t{e[7]} << 16)};
}

__device__ __forceinline__ float low_half(uint32_t pair, __half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
}
__device__ __forceinline__ float low_half(uint32_t pair, __nv_bfloat16) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_half(uint32_t pair, __half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
}
__device__ __forceinline__ float high_half(uint32_t pair, __nv_bfloat16) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

// A word of codes to q - 8 in the registers of an A operand.
template <typename X>
__device__ __forceinline__ void decode(uint32_t word, uint32_t (&a)[4]) {
  using Format = HalfFormat<X>;
  using Pair = typename Format::Pair;
  uint32_t codes[4];
  magic_of_word(word, codes, X());
  const Pair low = pair_of_bits<Pair>(Format::kMinusLow8);
  const Pair high = pair_of_bits<Pair>(Format::kMinusHigh8);
  a[0] = bits_of_pair(__hadd2(pair_of_bits<Pair>(codes[0]), low));
  a[2] = bits_of_pair(__hadd2(pair_of_bits<Pair>(codes[1]), high));
  a[1] = bits_of_pair(__hadd2(pair_of_bits<Pair>(codes[2]), low));
  a[3] = bits_of_pair(__hadd2(pair_of_bits<Pair>(codes[3]), high));
}

// 4 bytes of even k and 4 of odd k, signed, to 8 halves in the order of k.
__device__ __forceinline__ uint4 halves_of_bytes(uint32_t even, uint32_t odd) {
  even ^= 0x80808080u;
  odd ^= 0x80808080u;
  const uint32_t lower = __byte_perm(even, odd, 0x5140), upper = __byte_perm(even, odd, 0x7362);
  const __half2 offset = __float2half2_rn(-1152.f);  // 1024 + 128
  const auto pair = [&](uint32_t bytes, uint32_t selector) {
    return bits_of_pair(
        __hadd2(pair_of_bits<__half2>(__byte_perm(bytes, 0x64646464u, selector)), offset));
  };
  return {pair(lower, 0x4140), pair(lower, 0x4342), pair(upper, 0x4140), pair(upper, 0x4342)};
}

// Of a unit in the ring: codes of 4 tiles, places of 4 tiles, rows of scales.
constexpr uint32_t kPlacesAt = kUnitTiles * kCodeBytes;
constexpr uint32_t kScalesAt = kPlacesAt + kUnitTiles * kPlaceBytes;
__host__ __device__ constexpr uint32_t scale_bytes(Scales scales) {
  switch (scales) {
    case Scales::kAtEnd:
      return 0;
    case Scales::kUnit:
      return 128;
    case Scales::kPair:
      return 2 * 128;
    case Scales::kTile:
      return kUnitTiles * 128;
    default:
      return kUnitTiles * 256;
  }
}
__host__ __device__ constexpr uint32_t unit_bytes(Scales scales) {
  return kScalesAt + scale_bytes(scales);
}

__device__ __forceinline__ void wait_for_unit(int ring_units) {
  if (ring_units == 2) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// X: what the tensor cores take. Y: dtype of bias and y. kRounds: of 8 rows of x.
template <typename X, typename Y, int kRounds, Scales kScales, bool kInt8>
__global__ void __launch_bounds__(32 * max_warps(kRounds))
    matvec_marlin24_mma_kernel(const __grid_constant__ Params p) {
  static_assert(!kInt8 || kScales == Scales::kAny || kScales == Scales::kAtEnd, "by tile");
  constexpr uint32_t kUnitBytes = unit_bytes(kScales);
  constexpr bool kByTile = kScales == Scales::kTile || kScales == Scales::kAny || kInt8;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_base = shared_address(shared);
  // Of the group: its warps, and this one's number.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int group = threadIdx.y, groups = blockDim.y;
  const int block_warp = group * warps + warp, block_warps = groups * warps;
  const int M = static_cast<int>(p.args.M);
  const int first_strip = group * gridDim.y + blockIdx.y, strip_step = groups * gridDim.y;
  // The units of this block, and the tiles in them.
  const int units_begin = (p.units * blockIdx.x) >> p.cluster_shift;
  const int n_units = ((p.units * (blockIdx.x + 1)) >> p.cluster_shift) - units_begin;
  const int n_tiles = min(p.tiles - units_begin * kUnitTiles, n_units * kUnitTiles);

  // -- units to the ring; tiles beyond K are not copied, nor looked at --
  const uint32_t padded_N = static_cast<uint32_t>(p.args.padded_N);
  const uint32_t code_row = padded_N * 8,
                 place_row = padded_N * 4;  // bytes of a row of tiles
  const uint32_t scale_row =
      padded_N * (kScales == Scales::kAny && p.args.scale_dtype == DType::kFloat32 ? 4 : 2);
  const uint32_t strip_scale_bytes = scale_row / (padded_N / kStripRows);
  const uint32_t ring = shared_base + p.ring_offset + block_warp * p.ring_units * kUnitBytes;
  const uint32_t ring_end = ring + p.ring_units * kUnitBytes;
  uint32_t lane_bytes = lane * 16;
  asm volatile("" : "+r"(lane_bytes));  // kept in a register, not worked out anew at each use
  int in_strip = first_strip, in_unit = warp;
  int in_tiles = 0;  // from the first of the unit on
  const uint8_t *in_codes = nullptr, *in_places = nullptr, *in_scales = nullptr;
  const auto aim = [&]() {
    const int unit = units_begin + in_unit;
    in_tiles = in_strip < p.strips ? n_tiles - in_unit * kUnitTiles : 0;
    in_codes = p.args.qdata + int64_t{unit} * (kUnitTiles * code_row) +
               (in_strip * kCodeBytes + lane_bytes);
    in_places = p.args.meta + int64_t{unit} * (kUnitTiles * place_row) + lane / 16 * place_row +
                (in_strip * kPlaceBytes + lane % 16 * 16);
    if constexpr (kScales != Scales::kAtEnd) {
      in_scales = static_cast<const uint8_t*>(p.args.scale) + in_strip * strip_scale_bytes;
    }
  };
  const auto issue_tiles = [&](uint32_t to, auto is_whole) {
    constexpr bool kWhole = decltype(is_whole)::value;
    const uint32_t at = to + lane_bytes;
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; ++tile) {
      if (kWhole || tile < in_tiles)
        cp_async_16(at + tile * kCodeBytes, in_codes + tile * code_row);
    }
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; tile += 2) {  // 16 lanes copy a tile's places
      if (kWhole || tile + lane / 16 < in_tiles) {
        cp_async_16(at + kPlacesAt + tile * kPlaceBytes, in_places + tile * place_row);
      }
    }
    if constexpr (kScales != Scales::kAtEnd) {
      const int first_tile = (units_begin + in_unit) * kUnitTiles;
      const auto copy_row = [&](int tile, uint32_t lane_at, uint32_t column) {
        const uint32_t row = (first_tile + tile) >> p.group_shift;
        cp_async_16(to + kScalesAt + lane_at, in_scales + int64_t{row} * scale_row + column);
      };
      if constexpr (kScales == Scales::kUnit) {
        if (lane < 8) copy_row(0, lane_bytes, lane_bytes);
      } else if constexpr (kScales == Scales::kPair) {
        const int tile = lane / 8 * 2;
        if (lane < 16 && (kWhole || tile < in_tiles)) copy_row(tile, lane_bytes, lane % 8 * 16);
      } else if constexpr (kScales == Scales::kTile) {
        if (kWhole || lane / 8 < in_tiles) copy_row(lane / 8, lane_bytes, lane % 8 * 16);
      } else {
#pragma unroll
        for (int tile = 0; tile < kUnitTiles; tile += 2) {
          const int mine = tile + lane / 16;
          const uint32_t column = lane % 16 * 16;
          if (column < strip_scale_bytes && (kWhole || mine < in_tiles)) {
            copy_row(mine, tile * 256 + lane_bytes, column);
          }
        }
      }
    }
  };
  const auto issue = [&](uint32_t to) {
    if (in_tiles >= kUnitTiles) {
      issue_tiles(to, std::true_type());
    } else if (in_tiles > 0) {
      issue_tiles(to, std::false_type());
    }
    cp_async_commit();
  };
  const auto advance = [&]() {
    in_unit += warps;
    if (in_unit >= n_units) {
      in_unit -= n_units;
      in_strip += strip_step;
      aim();
    } else {
      in_tiles -= warps * kUnitTiles;
      in_codes += int64_t{warps} * (kUnitTiles * code_row);
      in_places += int64_t{warps} * (kUnitTiles * place_row);
    }
  };
  const auto issue_first = [&]() {
    aim();
#pragma unroll 1
    for (uint32_t to = ring; to != ring_end; to += kUnitBytes) {
      issue(to);
      advance();
    }
  };
#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) cluster_arrive();
#endif
  if (p.args.constant_weights) issue_first();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();  // nothing above reads what kernels write

  // -- x to shared memory as it is, zeros behind its end --
  const int row_bytes = n_tiles * (2 * kTileK);
  bool is_issued = p.args.constant_weights;
  if constexpr (kInt8) {
    if (!is_issued) issue_first();
    // A thread takes 32 k of a row.
    const int row_tiles = n_units * kUnitTiles;
    float* const factors = reinterpret_cast<float*>(shared + p.factors_offset);
    for (int m = 0; m < 8 * kRounds; ++m) {
      for (int tile = block_warp * 32 + lane; tile < row_tiles; tile += block_warps * 32) {
        const bool is_there = m < M && tile < n_tiles;
        const int64_t block = units_begin * kUnitTiles + tile;
        if (m < M) {
          uint4 even = {0, 0, 0, 0}, odd = {0, 0, 0, 0};
          if (is_there) {
            const int8_t* const row = p.args.a + m * p.args.K;
            even = *reinterpret_cast<const uint4*>(row + 16 * block);
            odd = *reinterpret_cast<const uint4*>(row + p.args.K / 2 + 16 * block);
          }
          uint4* const to = reinterpret_cast<uint4*>(shared + m * p.x_stride + tile * 64);
          to[0] = halves_of_bytes(even.x, odd.x);
          to[1] = halves_of_bytes(even.y, odd.y);
          to[2] = halves_of_bytes(even.z, odd.z);
          to[3] = halves_of_bytes(even.w, odd.w);
        }
        factors[tile * (8 * kRounds) + m] =
            is_there ? p.args.parameter[block * p.args.n_tokens + m].s_x : 0.f;
      }
    }
  } else {
    // A warp takes 512 bytes of a row, a lane 16 of them; all its loads are on their way before the
    // first is stored.
    constexpr int kBatch = 8;
    const int chunks = (n_units * kXUnitBytes + 511) / 512;  // of a row
    const uint8_t* const from = static_cast<const uint8_t*>(p.args.x) + units_begin * kXUnitBytes;
    int m = 0, chunk = block_warp;
    const auto settle = [&](int& m, int& chunk) {
      while (chunk >= chunks && m < M) {
        chunk -= chunks;
        ++m;
      }
    };
    settle(m, chunk);
    do {
      uint4 batch[kBatch];
      int load_m = m, load_chunk = chunk;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        batch[i] = {0, 0, 0, 0};
        const int at = load_chunk * 512 + lane * 16;
        if (load_m < M && at < row_bytes) {
          const uint8_t* const place = from + load_m * (2 * p.args.K) + at;
          batch[i] =
              p.is_x_aligned ? *reinterpret_cast<const uint4*>(place) : load_8_elements(place);
        }
        load_chunk += block_warps;
        settle(load_m, load_chunk);
      }
      if (!is_issued) issue_first();  // x first: loads come back in order
      is_issued = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = chunk * 512 + lane * 16;
        if (m < M && at < n_units * kXUnitBytes) {
          *reinterpret_cast<uint4*>(shared + m * p.x_stride + at) = batch[i];
        }
        chunk += block_warps;
        settle(m, chunk);
      }
    } while (m < M);
  }
  __syncthreads();

  // -- this lane's places: of the B operand, in the ring, among the sums --
  const int g = lane / 4, t = lane % 4;
  uint32_t x_at[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int m = min(8 * round + lane % 8, M - 1);  // rows of x that are not there: any
    x_at[round] = shared_base + m * p.x_stride + lane / 8 * 16;
    asm volatile("" : "+r"(x_at[round]));
  }
  uint32_t word_bytes = kPlacesAt + lane * 4, row_scales = kScalesAt + g * 16;
  asm volatile("" : "+r"(word_bytes), "+r"(row_scales));
  float* const slots =
      reinterpret_cast<float*>(shared + p.slots_offset) + group * warps * min(M, 8) * kColumnFloats;
  const auto sync_group = [&]() { bar_sync(1 + group, 32 * warps); };
  const uint32_t factors_at = shared_base + p.factors_offset + t * 8;

  const auto value_of = [&](float sum, int64_t n) {
    if constexpr (kScales == Scales::kAtEnd) {
      sum *= load_any(p.args.scale, n, p.args.scale_dtype);
    }
    if (p.args.bias != nullptr) sum += as_float(static_cast<const Y*>(p.args.bias)[n]);
    return from_float<Y>(sum);
  };
  // Four sums of a column, its quad q of 16, are those of neighbouring rows of the strip.
  const auto store = [&](int strip, int q, int m, const float4& sum) {
    const int64_t n = int64_t{strip} * kStripRows + 8 * (q % 8) + 4 * (q / 8);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    Y* const to = static_cast<Y*>(p.args.y) + m * p.args.N + n;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < p.args.N) to[i] = value_of(values[i], n + i);
    }
  };
  const auto add = [](float4& to, const float4& part) {
    to.x += part.x;
    to.y += part.y;
    to.z += part.z;
    to.w += part.w;
  };

#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) cluster_wait();  // the other blocks have started: their memory is there
#endif
  // Of the quads of a column, a block of the cluster adds up this many.
  [[maybe_unused]] const int quads_shift = 4 - p.cluster_shift, quads = 1 << quads_shift;
  int unit = warp;
  int number = group;  // of the strip among the cluster's
  uint32_t at = ring;
  for (int strip = first_strip; strip < p.strips; strip += strip_step, number += groups) {
    float sums[4][kRounds][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][round][i] = 0.f;
      }
    }
#pragma unroll 1
    for (; unit < n_units; unit += warps) {
      const int tiles_left = n_tiles - unit * kUnitTiles;
      const uint32_t x_bytes = unit * kXUnitBytes;
      float part[4][kRounds][4];  // of a group
      const auto clear = [&]() {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int round = 0; round < kRounds; ++round) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part[j][round][i] = 0.f;
          }
        }
      };
      // Scales of rows 8g + j and 8g + 4 + j.
      const auto add_scaled = [&](const float (&lower)[4], const float (&upper)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int round = 0; round < kRounds; ++round) {
            sums[j][round][0] += part[j][round][0] * lower[j];
            sums[j][round][1] += part[j][round][1] * lower[j];
            sums[j][round][2] += part[j][round][2] * upper[j];
            sums[j][round][3] += part[j][round][3] * upper[j];
          }
        }
      };
      const auto scaled_by = [&](const uint4& v) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        float lower[4], upper[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          lower[j] = low_half(words[j], X());
          upper[j] = high_half(words[j], X());
        }
        add_scaled(lower, upper);
      };
      const auto end_tile = [&](int i) {
        if constexpr (kInt8) {
#pragma unroll
          for (int round = 0; round < kRounds; ++round) {
            const uint32_t from = factors_at + ((unit * kUnitTiles + i) * kRounds + round) * 32;
            const float even = __uint_as_float(load_shared_u32(from));
            const float odd = __uint_as_float(load_shared_u32(from + 4));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              part[j][round][0] *= even;
              part[j][round][1] *= odd;
              part[j][round][2] *= even;
              part[j][round][3] *= odd;
            }
          }
        }
        const uint32_t from = at + row_scales;
        if constexpr (kScales == Scales::kTile) {
          scaled_by(load_shared_v4(from + i * 128));
        } else if constexpr (kScales == Scales::kAny) {
          float lower[4], upper[4];
          if (p.args.scale_dtype == DType::kFloat32) {
            const uint32_t row = at + kScalesAt + i * 256 + g * 32;
            const uint4 v = load_shared_v4(row), w = load_shared_v4(row + 16);
            lower[0] = __uint_as_float(v.x), upper[0] = __uint_as_float(v.y);
            lower[1] = __uint_as_float(v.z), upper[1] = __uint_as_float(v.w);
            lower[2] = __uint_as_float(w.x), upper[2] = __uint_as_float(w.y);
            lower[3] = __uint_as_float(w.z), upper[3] = __uint_as_float(w.w);
          } else {
            const uint4 v = load_shared_v4(from + i * 256);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
            const bool is_half = p.args.scale_dtype == DType::kFloat16;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              lower[j] =
                  is_half ? low_half(words[j], __half()) : low_half(words[j], __nv_bfloat16());
              upper[j] =
                  is_half ? high_half(words[j], __half()) : high_half(words[j], __nv_bfloat16());
            }
          }
          add_scaled(lower, upper);
        } else if constexpr (kInt8) {
          const float ones[4] = {1.f, 1.f, 1.f, 1.f};
          add_scaled(ones, ones);
        }
      };
      // Registers of a tile: loaded while the one before is multiplied.
      struct Tile {
        uint4 words;
        uint32_t places[2];
        uint32_t b[kRounds][4];
      };
      const auto load_tile = [&](Tile& tile, int i) {
        tile.words = load_shared_v4(at + i * kCodeBytes + lane_bytes);
        tile.places[0] = load_shared_u32(at + i * kPlaceBytes + word_bytes);
        tile.places[1] = load_shared_u32(at + i * kPlaceBytes + 128 + word_bytes);
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
          ldmatrix_x4(tile.b[round], x_at[round] + x_bytes + i * (2 * kTileK));
        }
      };
      const auto multiply_tile = [&](const Tile& tile) {
        const uint32_t words[4] = {tile.words.x, tile.words.y, tile.words.z, tile.words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          decode<X>(words[j], a);
#pragma unroll
          for (int round = 0; round < kRounds; ++round) {
            float (&d)[4] = kScales == Scales::kAtEnd && !kInt8 ? sums[j][round] : part[j][round];
            if (j % 2 == 0) {
              mma_sparse_m16n8k32<0>(d, a, tile.b[round], tile.places[j / 2], X());
            } else {
              mma_sparse_m16n8k32<1>(d, a, tile.b[round], tile.places[j / 2], X());
            }
          }
        }
      };
      wait_for_unit(p.ring_units);
      __syncwarp();
      Tile tiles[2];
      if (tiles_left >= kUnitTiles) {
        load_tile(tiles[0], 0);
#pragma unroll
        for (int i = 0; i < kUnitTiles; ++i) {
          if (i + 1 < kUnitTiles) load_tile(tiles[(i + 1) % 2], i + 1);
          if (kByTile || i == 0 || (kScales == Scales::kPair && i == 2)) clear();
          multiply_tile(tiles[i % 2]);
          if constexpr (kByTile) end_tile(i);
          if (kScales == Scales::kPair && i % 2 == 1) {
            scaled_by(load_shared_v4(at + row_scales + i / 2 * 128));
          }
        }
        if constexpr (kScales == Scales::kUnit) scaled_by(load_shared_v4(at + row_scales));
      } else {
#pragma unroll 1
        for (int i = 0; i < tiles_left; ++i) {
          load_tile(tiles[0], i);
          clear();
          multiply_tile(tiles[0]);
          if constexpr (kByTile) end_tile(i);
          if constexpr (kScales == Scales::kPair) {
            scaled_by(load_shared_v4(at + row_scales + i / 2 * 128));
          } else if constexpr (kScales == Scales::kUnit) {
            scaled_by(load_shared_v4(at + row_scales));
          }
        }
      }
      __syncwarp();  // all lanes have read what is overwritten now
      issue(at);
      advance();
      at += kUnitBytes;
      if (at == ring_end) at = ring;
    }
    unit -= n_units;

    // -- the sums of the warps, in their order: 8 rows of x at a time --
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int columns = min(8, M - 8 * round);
      const int slot_floats = columns * kColumnFloats;
      float* const slot = slots + warp * slot_floats;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 2 * t + odd;
        if (column >= columns) continue;
        float* const to = slot + column * kColumnFloats + 4 * g;
        *reinterpret_cast<float4*>(to) = {sums[0][round][odd], sums[1][round][odd],
                                          sums[2][round][odd], sums[3][round][odd]};
        *reinterpret_cast<float4*>(to + 32) = {sums[0][round][2 + odd], sums[1][round][2 + odd],
                                               sums[2][round][2 + odd], sums[3][round][2 + odd]};
      }
      sync_group();
      for (int item = threadIdx.x; item < columns * 16; item += blockDim.x) {
        const int column = item / 16, q = item % 16;
        const float* const from = slots + column * kColumnFloats + 4 * q;
        float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 4
        for (int w = 1; w < warps; ++w) {
          add(sum, *reinterpret_cast<const float4*>(from + w * slot_floats));
        }
        if (p.cluster_shift > 0) {
#if __CUDA_ARCH__ >= 900
          const int part = ((number << p.cluster_shift) + blockIdx.x) * M + 8 * round + column;
          const uint32_t place = (part << quads_shift) + q % quads;
          store_cluster(
              address_in_rank(shared_base + p.partial_offset + place * 16, q >> quads_shift), sum);
#endif
        } else {
          store(strip, q, 8 * round + column, sum);
        }
      }
      if (round + 1 < kRounds || strip + strip_step < p.strips) sync_group();
    }
  }
#if __CUDA_ARCH__ >= 900
  if (p.cluster_shift > 0) {
    cluster_arrive();
    cluster_wait();
    const float4* const partial = reinterpret_cast<const float4*>(shared + p.partial_offset);
    const int n_strips = (p.strips - static_cast<int>(blockIdx.y) + gridDim.y - 1) / gridDim.y;
    const int rank_quads = M << quads_shift;
    for (int s = block_warp; s < n_strips; s += block_warps) {
      const float4* const from = partial + (s << p.cluster_shift) * rank_quads;
      for (int place = lane; place < rank_quads; place += 32) {
        float4 sum = from[place];
        for (int rank = 1; rank < 1 << p.cluster_shift; ++rank) {
          add(sum, from[rank * rank_quads + place]);
        }
        const int q = (blockIdx.x << quads_shift) + place % quads;
        store(blockIdx.y + s * gridDim.y, q, place >> quads_shift, sum);
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
  int ring_units;
};

struct Device {
  int n_multiprocessors, shared_bytes;  // shared: that one block may have
  bool is_hopper;                       // clusters, dependent launch
};

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Sets everything in `p` but for its args; returns the bytes of shared memory.
int64_t lay_out(const Plan& plan, int64_t bytes_of_unit, Params& p) {
  const MatvecMarlin24Args& args = p.args;
  const int64_t rounds = (args.M + 7) / 8;
  p.strips = static_cast<int>(args.padded_N / kStripRows);
  p.tiles = static_cast<int>(args.K / kTileK);
  p.units = (p.tiles + kUnitTiles - 1) / kUnitTiles;
  p.cluster_shift = 0;
  while (1 << p.cluster_shift < plan.cluster) ++p.cluster_shift;
  p.group_shift = 0;
  while (kTileK << p.group_shift < args.group_size) ++p.group_shift;
  p.ring_units = plan.ring_units;
  p.is_x_aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
  const int64_t units = (p.units + plan.cluster - 1) / plan.cluster;
  const int64_t strips = (p.strips + plan.clusters - 1) / plan.clusters;
  const int64_t warps = int64_t{plan.warps} * plan.groups;
  p.x_stride = static_cast<uint32_t>(units * kXUnitBytes + 16);  // rows in other banks
  int64_t at = round_up(args.M * (units * kXUnitBytes + 16), 128);
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 128);
    return static_cast<uint32_t>(begin);
  };
  p.factors_offset = take(args.x == nullptr ? units * kUnitTiles * rounds * 32 : 0);
  p.ring_offset = take(warps * plan.ring_units * bytes_of_unit);
  p.slots_offset = take(warps * (args.M < 8 ? args.M : 8) * kColumnFloats * 4);
  p.partial_offset = take(plan.cluster == 1 ? 0 : strips * kStripRows * args.M * 4);
  return at;
}

// Microseconds, but for what all plans have in common. Fitted to an H200.
float estimate(const Plan& plan, int blocks, int n_usable, const Params& p) {
  const auto ceil_of = [](int n, int parts) { return (n + parts - 1) / parts; };
  const int units = ceil_of(p.units, plan.cluster);
  const int turns = ceil_of(p.strips, plan.clusters * plan.groups);
  const float strips = static_cast<float>(p.strips) / static_cast<float>(turns);
  const float groups = strips * static_cast<float>(plan.cluster) / static_cast<float>(n_usable);
  const float warps = static_cast<float>(plan.warps), M = static_cast<float>(p.args.M);
  // Of a unit in each of the warps of a multiprocessor: memory; the busiest multiprocessor's tensor
  // cores; one after the other.
  const float memory = 0.1f * groups * warps;
  const float tensor = (p.args.M > 8 ? 0.146f : 0.073f) * ceilf(groups) * warps;
  const float latency = plan.ring_units == 1 ? 1.4f : p.args.M > 8 ? 1.3f : 0.9f;
  const float unit = fmaxf(fmaxf(memory, tensor), latency);
  const float hand_over = 0.35f + 0.03f * M;
  const float x = M * static_cast<float>(units * blocks) * (kXUnitBytes / 45e3f);
  const float cluster_strips = static_cast<float>(ceil_of(p.strips, plan.clusters));
  const float cluster = plan.cluster == 1 ? 0.f : 1.15f + 0.03f * M * cluster_strips;
  const float turn = static_cast<float>(ceil_of(units, plan.warps)) * unit + hand_over;
  return static_cast<float>(turns) * turn + x + cluster;
}

// The plan with the smallest estimate of those that fit; false if none does.
bool choose_plan(const MatvecMarlin24Args& args, int64_t bytes_of_unit, const Device& device,
                 Plan* best) {
  constexpr int kMaxBlocks = 6;  // of a multiprocessor
  Params p = {};
  p.args = args;
  const int most_warps = max_warps(args.M > 8 ? 2 : 1);
  float best_time = 0.f;
  bool found = false;
  for (int cluster = 1; cluster <= (device.is_hopper ? kMaxCluster : 1); cluster *= 2) {
    // Clusters of 4 and 8 leave 12 of an H200's 132 multiprocessors without a block.
    const int n_usable =
        cluster <= 2 ? device.n_multiprocessors : device.n_multiprocessors * 10 / 11;
    if (n_usable < cluster) break;
    for (int blocks = 1; blocks <= kMaxBlocks; ++blocks) {
      const int64_t most_bytes = (device.shared_bytes + 1024) / blocks - 1024;
      for (int groups = 1; groups <= kMaxGroups && groups * blocks <= most_warps; ++groups) {
        Plan plan = {1, groups, cluster, n_usable * blocks / cluster, 2};
        lay_out(plan, bytes_of_unit, p);
        if (plan.clusters > p.strips) plan.clusters = p.strips;
        for (; plan.warps * groups * blocks <= most_warps && plan.warps <= p.units / cluster;
             ++plan.warps) {
          plan.ring_units = 2;
          while (plan.ring_units > 0 && lay_out(plan, bytes_of_unit, p) > most_bytes) {
            --plan.ring_units;
          }
          if (plan.ring_units == 0) break;
          const float time = estimate(plan, blocks, n_usable, p);
          if (found && time >= best_time) continue;
          found = true;
          best_time = time;
          *best = plan;
        }
      }
    }
  }
  return found;
}

template <typename X, typename Y, int kRounds, Scales kScales, bool kInt8>
cudaError_t launch(const MatvecMarlin24Args& args, const Plan& plan, bool is_hopper,
                   cudaStream_t stream) {
  Params p = {};
  p.args = args;
  const int64_t shared_bytes = lay_out(plan, unit_bytes(kScales), p);
  const auto kernel = matvec_marlin24_mma_kernel<X, Y, kRounds, kScales, kInt8>;
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
  if (is_hopper) {
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
template <typename X, typename Y, Scales kScales, bool kInt8>
cudaError_t plan_and_launch(const MatvecMarlin24Args& args, const Device& device,
                            cudaStream_t stream, bool* launched) {
  Plan plan;
  if (choose_plan(args, unit_bytes(kScales), device, &plan)) {
    *launched = true;
    return args.M > 8 ? launch<X, Y, 2, kScales, kInt8>(args, plan, device.is_hopper, stream)
                      : launch<X, Y, 1, kScales, kInt8>(args, plan, device.is_hopper, stream);
  }
  if (args.M == 1) return cudaSuccess;
  MatvecMarlin24Args part = args;
  part.M = args.M / 2;
  cudaError_t code = plan_and_launch<X, Y, kScales, kInt8>(part, device, stream, launched);
  if (code != cudaSuccess || !*launched) return code;
  if constexpr (kInt8) {
    part.a = args.a + part.M * args.K;
    part.parameter = args.parameter + part.M;
  } else {
    part.x = static_cast<const X*>(args.x) + part.M * args.K;
  }
  part.y = static_cast<Y*>(args.y) + part.M * args.N;
  part.M = args.M - part.M;
  return plan_and_launch<X, Y, kScales, kInt8>(part, device, stream, launched);
}

template <typename Y>
cudaError_t choose_scales(const MatvecMarlin24Args& args, const Device& device, cudaStream_t stream,
                          bool* launched) {
  const bool is_one_group = args.group_size == args.K;
  if (args.x == nullptr) {  // int8 is exact in fp16
    return is_one_group
               ? plan_and_launch<__half, Y, Scales::kAtEnd, true>(args, device, stream, launched)
               : plan_and_launch<__half, Y, Scales::kAny, true>(args, device, stream, launched);
  }
  if (is_one_group) {
    return plan_and_launch<Y, Y, Scales::kAtEnd, false>(args, device, stream, launched);
  }
  if (args.scale_dtype != args.dtype) {
    return plan_and_launch<Y, Y, Scales::kAny, false>(args, device, stream, launched);
  }
  switch (args.group_size) {
    case 32:
      return plan_and_launch<Y, Y, Scales::kTile, false>(args, device, stream, launched);
    case 64:
      return plan_and_launch<Y, Y, Scales::kPair, false>(args, device, stream, launched);
    default:
      return plan_and_launch<Y, Y, Scales::kUnit, false>(args, device, stream, launched);
  }
}

}  // namespace

cudaError_t launch_matvec_marlin24_mma(const MatvecMarlin24Args& args, cudaStream_t stream,
                                       bool* launched) {
  *launched = false;
  if (args.M < 1 || args.M > 8 * kMaxRounds || args.padded_N > kMaxN || args.K > kMaxK) {
    return cudaSuccess;
  }
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
  device.is_hopper = major >= 9;
  return args.dtype == DType::kFloat16
             ? choose_scales<__half>(args, device, stream, launched)
             : choose_scales<__nv_bfloat16>(args, device, stream, launched);
}

}  // namespace cuda_int4
