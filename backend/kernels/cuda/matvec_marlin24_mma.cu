// matvec_marlin24_mma -- y[m, n] = sum_k x[m, k] * (q[n, k] - 8) * scale[n, k /
// group_size]
//                        + bias[n] over the k that are kept, or with
//                        x[m, k] = a[m, k] * s_x[m, k / 32]; M = 1..16 on
//                        sparse tensor cores
//
//   operand    dtype              shape           order in memory align x f16 |
//   bf16         [M, K]          row-major                               dtype
//   a, s_x     i8, f32            [M, K], ..      quantized_activation.h, in
//   place of x   16 B qdata      u32                [K/32, 2*Np]    marlin24.v1
//   (marlin.h)                  16 B meta       u16                [K/32, 2*Np]
//   marlin24.v1                             16 B scale      f16 | bf16 | f32
//   [n_groups, Np]  marlin24.v1                             16 B bias dtype of
//   y         [N]             contiguous; absent means 0              dtype y
//   (out)    f16 | bf16         [M, N]          row-major dtype
//
// Requires  M <= 16, K % 32 == 0, group_size 32, 64, 128, 256 or K, Np = N
// rounded up to 64
//           (checked by validate_linear)
// Grid      (cluster, clusters) blocks of 32 * warps threads: the clusters take
// strips of 64 rows of
//           the weight in turn, the blocks of a cluster share K. A block's
//           units of 64 rows x 128 k are numbered strip by strip, and each warp
//           has an equal range of them. matvec_marlin24_plan.h sets the numbers
// Bytes     reads qdata, meta and scales once, and x once a block; bound by
// qdata and meta Numerics  products of x and codes are exact in the tensor core
// up to its fp32 sums, one group at
//           a time; scales (and s_x) are applied in fp32; one rounding at the
//           store. Sums are added in a fixed order
// Source    direct; mma.sp.m16n8k32 with the weight as its A operand
//
// A unit is 4 tiles of 512 bytes of codes and 256 of places, which cp.async
// brings to the warp's own ring. A lane's 16 bytes of a tile are its registers
// of four instructions (marlin_fragments.cuh), its word of places is theirs as
// it lies. No warp waits for another between the arrival of x and the end of
// its range; then the sums of all ranges are added up at once.
//
// What runs once is short: outside its loops, a kernel of a few microseconds
// waits for instructions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "marlin_fragments.cuh"
#include "matvec_marlin24.cuh"
#include "matvec_marlin24_plan.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

namespace {

constexpr int kStripRows = kMarlin24StripRows, kRing = kMarlin24Ring;
constexpr int kTileK = 32, kUnitTiles = 4;
constexpr int kCodeBytes = 512, kPlaceBytes = 256;  // of a tile
constexpr int kXUnitBytes = 2 * kMarlin24UnitK;     // of a row of x, as fp16 or bf16
constexpr int kColumnFloats = kMarlin24ColumnFloats;
constexpr int kMaxRounds = 2;  // of 8 rows of x
// 32-bit offsets and numbers of units.
constexpr int64_t kMaxK = int64_t{1} << 21, kMaxWeights = int64_t{1} << 34;

// How scales come: applied to the sums of all k, by unit, by two tiles, by
// tile, or by tile of any dtype and group_size. Tiles beyond the end of K are
// looked out for in the first and the last.
enum class Scales { kAtEnd, kUnit, kPair, kTile, kAny };
__host__ __device__ constexpr bool is_ragged(Scales scales) {
  return scales == Scales::kAtEnd || scales == Scales::kAny;
}

// n things in parts, the first `more` of them one longer than `each`.
struct Cut {
  int each, more;
  __device__ __forceinline__ int begin(int part) const { return part * each + min(part, more); }
  __device__ __forceinline__ int size(int part) const { return each + (part < more ? 1 : 0); }
};

// n / d in two instructions, for n * d < 2^32; a factor of 2^32 is kept as 0.
struct Divider {
  uint32_t factor;
  __device__ __forceinline__ int divide(int n) const {
    return factor == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), factor));
  }
};

struct Params {
  MatvecMarlin24Args args;
  Marlin24Shared shared;
  Cut strips_of, units_of;  // a cluster's strips; of a strip, the units of a
                            // block of the cluster
  int tiles;                // of 32 k
  int cluster_shift;        // log2 of the blocks of a cluster
  int group_shift;          // tile t is in group t >> group_shift
  int round_strips;         // whose sums are added up together: a round
  int warp_units;           // of a round, of a warp
  int split_shift;          // log2 of the lanes that add up the same sums
  Divider by_units[2];      // of a block: each, each + 1
  Divider by_warp_units, by_M;
  bool is_x_aligned;  // to 16 bytes
  bool is_plain;      // the sums are y; strips are whole, and y is aligned to 8 bytes
};

__device__ __forceinline__ float load_any(const void* from, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(from)[i];
  if (dtype == DType::kFloat16) return as_float(static_cast<const __half*>(from)[i]);
  return as_float(static_cast<const __nv_bfloat16*>(from)[i]);
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

__device__ __forceinline__ void add(float4& to, const float4& part) {
  to.x += part.x;
  to.y += part.y;
  to.z += part.z;
  to.w += part.w;
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
__host__ __device__ constexpr uint32_t unit_bytes(Scales scales) {
  switch (scales) {
    case Scales::kAtEnd:
      return kScalesAt;
    case Scales::kUnit:
      return kScalesAt + 128;
    case Scales::kPair:
      return kScalesAt + 2 * 128;
    case Scales::kTile:
      return kScalesAt + kUnitTiles * 128;
    default:
      return kScalesAt + kUnitTiles * 256;
  }
}

// X: what the tensor cores take. Y: dtype of bias and y. kRounds: of 8 rows of
// x.
template <typename X, typename Y, int kRounds, Scales kScales, bool kInt8>
__global__ void __launch_bounds__(32 * marlin24_max_warps(8 * kRounds))
    matvec_marlin24_mma_kernel(const __grid_constant__ Params p) {
  static_assert(!kInt8 || is_ragged(kScales), "by tile");
  constexpr uint32_t kUnitBytes = unit_bytes(kScales);
  constexpr bool kRagged = is_ragged(kScales);
  constexpr bool kByTile = kScales == Scales::kTile || kScales == Scales::kAny || kInt8;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int M = static_cast<int>(p.args.M), rank = blockIdx.x;
  const int units_begin = p.units_of.begin(rank), n_units = p.units_of.size(rank);
  const int n_strips = p.strips_of.size(blockIdx.y);
  // Counted from this block's first; those of its last unit may not all be
  // there.
  const int n_tiles = min(p.tiles - units_begin * kUnitTiles, n_units * kUnitTiles);

#if __CUDA_ARCH__ >= 900
  const uint32_t barrier = shared_base;  // counts what the other blocks send
  if (p.cluster_shift > 0) {
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
#endif

  // This warp's units of a round: the first's strip, of the cluster's, and
  // number in it; how many.
  struct Range {
    int strip, unit, left;
  };
  const auto range_of = [&](int first_strip) {
    const int all = min(p.round_strips, n_strips - first_strip) * n_units;
    const int begin = warp * p.warp_units;
    const int strip = p.by_units[rank < p.units_of.more ? 1 : 0].divide(begin);
    return Range{first_strip + strip, begin - strip * n_units, min(all - begin, p.warp_units)};
  };

  // -- units to the ring --
  const uint32_t padded_N = static_cast<uint32_t>(p.args.padded_N);
  const uint32_t code_row = padded_N * 8,
                 place_row = padded_N * 4;  // bytes of a row of tiles
  const uint32_t strip_scale_bytes =
      kScales == Scales::kAny && p.args.scale_dtype == DType::kFloat32 ? 256 : 128;
  const uint32_t scale_row = padded_N / kStripRows * strip_scale_bytes;
  const uint32_t ring = shared_base + p.shared.ring + warp * (kRing * kUnitBytes);
  // The places of the next unit begin at in_at, its codes at twice that.
  const uint32_t unit_step = kUnitTiles * place_row;
  const uint32_t strip_step = gridDim.y * kPlaceBytes - (n_units - 1) * unit_step;
  uint32_t in_at = 0, in_scales = 0;
  int in_unit = 0, in_left = 0;
  uint32_t lane_bytes = lane * 16;
  const uint8_t* lane_codes = p.args.qdata + lane_bytes;
  const uint8_t* lane_places = p.args.meta + (lane / 16 * place_row + lane % 16 * 16);
  // Kept in registers, not worked out anew at each use.
  asm volatile("" : "+r"(lane_bytes), "+l"(lane_codes), "+l"(lane_places));
  const auto issue = [&](uint32_t to) {  // the next unit of the warp's range, if there is one
    const bool is_there = in_left > 0;
    [[maybe_unused]] const int tiles_left = is_there ? n_tiles - in_unit * kUnitTiles : 0;
    const auto has = [&](int tile) { return kRagged ? tile < tiles_left : is_there; };
    const uint32_t at = to + lane_bytes;
    const uint8_t* const codes = lane_codes + 2 * uint64_t{in_at};
    const uint8_t* const places = lane_places + in_at;
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; ++tile) {
      if (has(tile)) cp_async_16(at + tile * kCodeBytes, codes + tile * code_row);
    }
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; tile += 2) {  // 16 lanes copy a tile's places
      if (has(tile + lane / 16)) {
        cp_async_16(at + kPlacesAt + tile * kPlaceBytes, places + tile * place_row);
      }
    }
    const auto copy_scales = [&](int tile, uint32_t lane_at, uint32_t column) {
      const uint32_t row = ((units_begin + in_unit) * kUnitTiles + tile) >> p.group_shift;
      const uint8_t* const from =
          static_cast<const uint8_t*>(p.args.scale) + (row * scale_row + in_scales);
      cp_async_16(to + kScalesAt + lane_at, from + column);
    };
    if constexpr (kScales == Scales::kUnit) {
      if (lane < 8 && is_there) copy_scales(0, lane_bytes, lane_bytes);
    } else if constexpr (kScales == Scales::kPair) {
      if (lane < 16 && is_there) copy_scales(lane / 8 * 2, lane_bytes, lane % 8 * 16);
    } else if constexpr (kScales == Scales::kTile) {
      if (is_there) copy_scales(lane / 8, lane_bytes, lane % 8 * 16);
    } else if constexpr (kScales == Scales::kAny) {
#pragma unroll
      for (int tile = 0; tile < kUnitTiles; tile += 2) {
        const uint32_t column = lane % 16 * 16;
        if (column < strip_scale_bytes && has(tile + lane / 16)) {
          copy_scales(tile + lane / 16, tile * 256 + lane_bytes, column);
        }
      }
    }
    cp_async_commit();
    const bool is_last = in_unit + 1 == n_units;  // of its strip
    in_at += is_last ? strip_step : unit_step;
    in_scales += is_last ? gridDim.y * strip_scale_bytes : 0;
    in_unit = is_last ? 0 : in_unit + 1;
    --in_left;
  };
  const auto issue_first = [&](int first_strip) {
    const Range range = range_of(first_strip);
    const uint32_t strip = blockIdx.y + range.strip * gridDim.y;
    in_at = (units_begin + range.unit) * unit_step + strip * kPlaceBytes;
    in_scales = strip * strip_scale_bytes;
    in_unit = range.unit;
    in_left = range.left;
#pragma unroll 1
    for (int i = 0; i < kRing; ++i) issue(ring + i * kUnitBytes);
  };

  // -- x to shared memory as it is --
  const auto load_x = [&]() {
    if constexpr (kInt8) {  // a thread takes 32 k of a row
      float* const factors = reinterpret_cast<float*>(shared + p.shared.factors);
      for (int m = 0; m < 8 * kRounds; ++m) {
        for (int tile = threadIdx.x; tile < n_tiles; tile += blockDim.x) {
          const int64_t block = units_begin * kUnitTiles + tile;
          if (m < M) {
            const int8_t* const row = p.args.a + m * p.args.K;
            const uint4 even = *reinterpret_cast<const uint4*>(row + 16 * block);
            const uint4 odd = *reinterpret_cast<const uint4*>(row + p.args.K / 2 + 16 * block);
            uint4* const to =
                reinterpret_cast<uint4*>(shared + p.shared.x + m * p.shared.x_stride + tile * 64);
            to[0] = halves_of_bytes(even.x, odd.x);
            to[1] = halves_of_bytes(even.y, odd.y);
            to[2] = halves_of_bytes(even.z, odd.z);
            to[3] = halves_of_bytes(even.w, odd.w);
          }
          factors[tile * (8 * kRounds) + m] =
              m < M ? p.args.parameter[block * p.args.n_tokens + m].s_x : 0.f;
        }
      }
    } else {
      const int chunks = n_tiles * (2 * kTileK / 16);  // of a row
      const uint8_t* const from = static_cast<const uint8_t*>(p.args.x) + units_begin * kXUnitBytes;
      int m = 0, chunk = threadIdx.x;
#pragma unroll 1
      while (true) {
        while (chunk >= chunks) {
          chunk -= chunks;
          ++m;
        }
        if (m >= M) break;
        const uint8_t* const place = from + m * (2 * p.args.K) + chunk * 16;
        const uint32_t at = p.shared.x + m * p.shared.x_stride + chunk * 16;
        if (p.is_x_aligned) {
          cp_async_16(shared_base + at, place);
        } else {
          *reinterpret_cast<uint4*>(shared + at) = load_8_elements(place);
        }
        chunk += blockDim.x;
      }
      cp_async_commit();
    }
  };
  if (p.args.constant_weights) {
    issue_first(0);
    griddepcontrol_wait();  // nothing above reads what kernels write
    load_x();
    cp_async_wait<0>();
  } else {
    griddepcontrol_wait();
    load_x();
    issue_first(0);  // behind x: loads come back in order
    cp_async_wait<kRing>();
  }
  // Not before x is here: the first units of the kernel behind would come in ahead of it.
  griddepcontrol_launch_dependents();
  __syncthreads();

  // -- this lane's places: of the B operand, in the ring --
  const int g = lane / 4, t = lane % 4;
  uint32_t x_at[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int m = min(8 * round + lane % 8, M - 1);  // rows of x that are not there: any
    x_at[round] = shared_base + p.shared.x + m * p.shared.x_stride + lane / 8 * 16;
    asm volatile("" : "+r"(x_at[round]));
  }
  uint32_t word_bytes = kPlacesAt + lane * 4, row_scales = kScalesAt + g * 16;
  asm volatile("" : "+r"(word_bytes), "+r"(row_scales));
  const uint32_t factors_at = shared_base + p.shared.factors + t * 8;
  float* const slots = reinterpret_cast<float*>(shared + p.shared.slots);
  const int slot_floats = M * kColumnFloats;

  const auto value_of = [&](float sum, int64_t n) {
    if constexpr (kScales == Scales::kAtEnd) {
      sum *= load_any(p.args.scale, n, p.args.scale_dtype);
    }
    if (p.args.bias != nullptr) sum += as_float(static_cast<const Y*>(p.args.bias)[n]);
    return from_float<Y>(sum);
  };
  // Four sums of a column, its quad q of 16, are those of neighbouring rows of
  // the strip.
  const auto store = [&](int strip, int q, int m, const float4& sum) {
    const int64_t n = int64_t{strip} * kStripRows + 8 * (q % 8) + 4 * (q / 8);
    Y* const to = static_cast<Y*>(p.args.y) + m * p.args.N + n;
    if (p.is_plain) {
      *reinterpret_cast<uint2*>(to) = {pack_pair<Y>(sum.x, sum.y), pack_pair<Y>(sum.z, sum.w)};
      return;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < p.args.N) to[i] = value_of(values[i], n + i);
    }
  };

  // Of the 16 quads of a column, a block of the cluster stores this many.
  [[maybe_unused]] const int quads_shift = 4 - p.cluster_shift;
  [[maybe_unused]] const int quads_mask = (1 << quads_shift) - 1;
  [[maybe_unused]] int parity = 0;
#pragma unroll 1
  for (int first_strip = 0; first_strip < n_strips; first_strip += p.round_strips) {
    const int round_strips = min(p.round_strips, n_strips - first_strip);
    Range range = range_of(first_strip);
    uint32_t at = ring;
    float sums[4][kRounds][4] = {};
#pragma unroll 1
    for (; range.left > 0; --range.left) {
      [[maybe_unused]] const int tiles_left = n_tiles - range.unit * kUnitTiles;
      const uint32_t x_bytes = range.unit * kXUnitBytes;
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
      // Registers of a tile: loaded while the one before is multiplied.
      struct Tile {
        uint4 words;
        uint32_t places[2];
        uint32_t b[kRounds][4];
        uint4 scales[kScales == Scales::kAny ? 2 : 1];  // of the group that ends
                                                        // with it
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
      const auto load_scales = [&](Tile& tile, int i) {
        if constexpr (kScales == Scales::kUnit) {
          tile.scales[0] = load_shared_v4(at + row_scales);
        } else if constexpr (kScales == Scales::kPair) {
          tile.scales[0] = load_shared_v4(at + row_scales + i / 2 * 128);
        } else if constexpr (kScales == Scales::kTile) {
          tile.scales[0] = load_shared_v4(at + row_scales + i * 128);
        } else if constexpr (kScales == Scales::kAny) {
          if (p.args.scale_dtype == DType::kFloat32) {
            const uint32_t row = at + kScalesAt + i * 256 + g * 32;
            tile.scales[0] = load_shared_v4(row);
            tile.scales[1] = load_shared_v4(row + 16);
          } else {
            tile.scales[0] = load_shared_v4(at + row_scales + i * 256);
          }
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
      const auto end_group = [&](const Tile& tile, int i) {
        if constexpr (kInt8) {
#pragma unroll
          for (int round = 0; round < kRounds; ++round) {
            const uint32_t from =
                factors_at + ((range.unit * kUnitTiles + i) * kRounds + round) * 32;
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
        float lower[4] = {1.f, 1.f, 1.f, 1.f}, upper[4] = {1.f, 1.f, 1.f, 1.f};
        if constexpr (kScales != Scales::kAtEnd) {
          const uint4& v = tile.scales[0];
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
          const bool is_half = p.args.scale_dtype == DType::kFloat16;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (kScales == Scales::kAny) {
              lower[j] =
                  is_half ? low_half(words[j], __half()) : low_half(words[j], __nv_bfloat16());
              upper[j] =
                  is_half ? high_half(words[j], __half()) : high_half(words[j], __nv_bfloat16());
            } else {
              lower[j] = low_half(words[j], X());
              upper[j] = high_half(words[j], X());
            }
          }
        }
        if constexpr (kScales == Scales::kAny) {
          if (p.args.scale_dtype == DType::kFloat32) {
            const uint4 v = tile.scales[0], w = tile.scales[1];
            lower[0] = __uint_as_float(v.x), upper[0] = __uint_as_float(v.y);
            lower[1] = __uint_as_float(v.z), upper[1] = __uint_as_float(v.w);
            lower[2] = __uint_as_float(w.x), upper[2] = __uint_as_float(w.y);
            lower[3] = __uint_as_float(w.z), upper[3] = __uint_as_float(w.w);
          }
        }
        if constexpr (kScales != Scales::kAtEnd || kInt8) add_scaled(lower, upper);
      };
      cp_async_wait<kRing - 1>();
      __syncwarp();
      Tile tiles[2];
      if (!kRagged || tiles_left >= kUnitTiles) {
        load_tile(tiles[0], 0);
#pragma unroll
        for (int i = 0; i < kUnitTiles; ++i) {
          const bool begins = kByTile || i == 0 || (kScales == Scales::kPair && i == 2);
          const bool ends = kByTile || i == 3 || (kScales == Scales::kPair && i == 1);
          if (ends) load_scales(tiles[i % 2], i);
          if (i + 1 < kUnitTiles) {
            load_tile(tiles[(i + 1) % 2], i + 1);
          } else {
            __syncwarp();  // all lanes have read what is overwritten now
            issue(at);
          }
          if (begins) clear();
          multiply_tile(tiles[i % 2]);
          if (ends) end_group(tiles[i % 2], i);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < tiles_left; ++i) {
          load_tile(tiles[0], i);
          load_scales(tiles[0], i);
          clear();
          multiply_tile(tiles[0]);
          end_group(tiles[0], i);
        }
        __syncwarp();
        issue(at);
      }
      at = 2 * ring + kUnitBytes - at;  // of two
      if (++range.unit == n_units || range.left == 1) {
        // The warp's part of a strip is complete. No two have the same warp +
        // strip.
        float* const slot = slots + (warp + range.strip - first_strip) * slot_floats;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const int column = 8 * round + 2 * t + odd;
            if (column < M) {
              float* const to = slot + column * kColumnFloats + 4 * g;
              *reinterpret_cast<float4*>(to) = {sums[0][round][odd], sums[1][round][odd],
                                                sums[2][round][odd], sums[3][round][odd]};
              *reinterpret_cast<float4*>(to + 32) = {
                  sums[0][round][2 + odd], sums[1][round][2 + odd], sums[2][round][2 + odd],
                  sums[3][round][2 + odd]};
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[j][round][odd] = sums[j][round][2 + odd] = 0.f;
          }
        }
        range.unit = 0;
        ++range.strip;
      }
    }
    const bool is_last_round = first_strip + p.round_strips >= n_strips;
    if (!is_last_round) issue_first(first_strip + p.round_strips);

    // -- the sums of the warps, in their order --
    const int n_columns = round_strips * M;  // of 16 quads
#if __CUDA_ARCH__ >= 900
    if (p.cluster_shift > 0) {
      if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, n_columns * 256);
      __syncwarp();
      cluster_wait();  // the other blocks' barriers and memory are there
    }
#endif
    __syncthreads();
    // The lanes of a split are neighbours: whole warps go through this.
#pragma unroll 1
    for (int item = threadIdx.x; item / 32 * 32 < n_columns << (4 + p.split_shift);
         item += blockDim.x) {
      const int row = item >> (4 + p.split_shift), q = (item >> p.split_shift) % 16;
      const int split = item & ((1 << p.split_shift) - 1);
      const int strip = p.by_M.divide(row), column = row - strip * M;
      const int first = p.by_warp_units.divide(strip * n_units);
      const int last = row < n_columns ? p.by_warp_units.divide((strip + 1) * n_units - 1) : -1;
      const float* const from = slots + strip * slot_floats + column * kColumnFloats + 4 * q;
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int w = first + split; w <= last; w += 1 << p.split_shift) {
        add(sum, *reinterpret_cast<const float4*>(from + w * slot_floats));
      }
#pragma unroll 1
      for (int other = (1 << p.split_shift) / 2; other > 0; other /= 2) {
        add(sum, {__shfl_xor_sync(~0u, sum.x, other), __shfl_xor_sync(~0u, sum.y, other),
                  __shfl_xor_sync(~0u, sum.z, other), __shfl_xor_sync(~0u, sum.w, other)});
      }
      if (split > 0 || last < 0) continue;
      if (p.cluster_shift > 0) {
#if __CUDA_ARCH__ >= 900
        const uint32_t place = ((rank * n_columns + row) << quads_shift) + (q & quads_mask);
        const uint32_t to = shared_base + p.shared.partial + place * 16, owner = q >> quads_shift;
        store_async(address_in_rank(to, owner), sum, address_in_rank(barrier, owner));
#endif
      } else {
        store(blockIdx.y + (first_strip + strip) * gridDim.y, q, column, sum);
      }
    }
#if __CUDA_ARCH__ >= 900
    if (p.cluster_shift > 0) {
      mbarrier_wait(barrier, parity);
      parity ^= 1;
      const float4* const partial = reinterpret_cast<const float4*>(shared + p.shared.partial);
      const int n_mine = n_columns << quads_shift;
#pragma unroll 1
      for (int item = threadIdx.x; item < n_mine; item += blockDim.x) {
        float4 sum = partial[item];
#pragma unroll 1
        for (int other = 1; other < 1 << p.cluster_shift; ++other) {
          add(sum, partial[other * n_mine + item]);
        }
        const int row = item >> quads_shift, strip = p.by_M.divide(row);
        const int q = (rank << quads_shift) + (item & quads_mask);
        store(blockIdx.y + (first_strip + strip) * gridDim.y, q, row - strip * M, sum);
      }
    }
#endif
    if (!is_last_round) {
      __syncthreads();
#if __CUDA_ARCH__ >= 900
      if (p.cluster_shift > 0) cluster_arrive();  // what was sent here has been read
#endif
    }
  }
}

// ---- launch ----

Cut cut(int64_t n, int parts) { return {static_cast<int>(n / parts), static_cast<int>(n % parts)}; }

// Of the n that are divided, none is above `most`.
bool set_divider(int64_t most, int64_t d, Divider* to) {
  to->factor = static_cast<uint32_t>(((int64_t{1} << 32) + d - 1) / d);
  return most * d < int64_t{1} << 32;
}

// False where the numbers are beyond the kernel's.
bool set_params(const MatvecMarlin24Args& args, const Marlin24Problem& problem,
                const Marlin24Plan& plan, Params* p) {
  const int64_t strips = args.padded_N / kStripRows;
  const int64_t units = (args.K + kMarlin24UnitK - 1) / kMarlin24UnitK;
  p->args = args;
  p->shared = marlin24_shared(problem, plan);
  p->strips_of = cut(strips, plan.clusters);
  p->units_of = cut(units, plan.cluster);
  p->tiles = static_cast<int>(args.K / kTileK);
  p->round_strips = plan.round_strips;
  while (1 << p->cluster_shift < plan.cluster) ++p->cluster_shift;
  while (kTileK << p->group_shift < args.group_size) ++p->group_shift;
  const int64_t most_units = (units + plan.cluster - 1) / plan.cluster;
  const int64_t round_units = plan.round_strips * most_units;
  p->warp_units = static_cast<int>((round_units + plan.warps - 1) / plan.warps);
  const int64_t quads = plan.round_strips * args.M * 16;
  while (p->split_shift < 3 && quads << (p->split_shift + 1) <= 32 * plan.warps &&
         plan.warps >> (p->split_shift + 1) > plan.round_strips) {
    ++p->split_shift;
  }
  p->is_x_aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
  p->is_plain = args.bias == nullptr && args.group_size != args.K && args.N == args.padded_N &&
                reinterpret_cast<uintptr_t>(args.y) % 8 == 0;
  const int64_t most = plan.warps * int64_t{p->warp_units};
  return set_divider(most, units / plan.cluster, &p->by_units[0]) &&
         set_divider(most, units / plan.cluster + 1, &p->by_units[1]) &&
         set_divider(most, p->warp_units, &p->by_warp_units) &&
         set_divider(plan.round_strips * args.M, args.M, &p->by_M);
}

template <typename X, typename Y, int kRounds, Scales kScales, bool kInt8>
cudaError_t launch(const Params& p, const Marlin24Plan& plan, bool is_hopper, cudaStream_t stream) {
  const auto kernel = matvec_marlin24_mma_kernel<X, Y, kRounds, kScales, kInt8>;
  const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(p.shared.total));
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
  config.blockDim = dim3(static_cast<unsigned>(32 * plan.warps));
  config.dynamicSmemBytes = p.shared.total;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Half the rows of x at a time where all of them do not fit.
template <typename X, typename Y, Scales kScales, bool kInt8>
cudaError_t plan_and_launch(const MatvecMarlin24Args& args, const Marlin24Device& device,
                            cudaStream_t stream, bool* launched) {
  const Marlin24Problem problem = {args.M, args.padded_N, args.K, unit_bytes(kScales), kInt8};
  Marlin24Plan plan;
  Params p = {};
  if (marlin24_plan(problem, device, &plan) && set_params(args, problem, plan, &p)) {
    *launched = true;
    return args.M > 8 ? launch<X, Y, 2, kScales, kInt8>(p, plan, device.has_clusters, stream)
                      : launch<X, Y, 1, kScales, kInt8>(p, plan, device.has_clusters, stream);
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
cudaError_t choose_scales(const MatvecMarlin24Args& args, const Marlin24Device& device,
                          cudaStream_t stream, bool* launched) {
  const bool is_one_group = args.group_size == args.K;
  if (args.x == nullptr) {  // int8 is exact in fp16
    return is_one_group
               ? plan_and_launch<__half, Y, Scales::kAtEnd, true>(args, device, stream, launched)
               : plan_and_launch<__half, Y, Scales::kAny, true>(args, device, stream, launched);
  }
  if (is_one_group) {
    return plan_and_launch<Y, Y, Scales::kAtEnd, false>(args, device, stream, launched);
  }
  if (args.scale_dtype != args.dtype || args.K % kMarlin24UnitK != 0) {
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
  if (args.M < 1 || args.M > 8 * kMaxRounds || args.K > kMaxK ||
      args.padded_N * args.K > kMaxWeights) {
    return cudaSuccess;
  }
  int index = 0, major = 0;
  Marlin24Device device = {};
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
  return args.dtype == DType::kFloat16
             ? choose_scales<__half>(args, device, stream, launched)
             : choose_scales<__nv_bfloat16>(args, device, stream, launched);
}

}  // namespace cuda_int4
