// matvec_w4a8_mma -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                    zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size;  few rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h, M > 2       16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//                                                                                         (16 B: fast)
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              as scale
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  3 <= M <= 16, K % 32 == 0, group_size % 32 == 0, K % group_size == 0 (validate_linear)
// Grid      persistent: block b owns columns n from N * b / blocks on, cut into strips of 32 or
//           16; its warps take tiles of so many n x 256 k in turns, across the ends of strips
// Bytes     reads N*K/2 + N*n_groups scales and zero points once, a once per block (L2)
// Numerics  exact int32 dot per 32 k, times s_x to 22 bits (dot_factors), the rest in fp32 in a fixed
//           order, one rounding at the store
// Source    own. The weights are the A operand of mma.m16n8k32 (its rows are n), so that 16 bytes of
//           a column n, one group of 32 k, are one row of an ldmatrix: lane t of a quad gets word t,
//           whose low nibbles are 4 even k and whose high nibbles are 4 odd k; the B operand takes
//           the same words of the even and odd planes of a. Nobody waits for a strip to end: a warp
//           leaves its sums in one of n_slots places and goes on, another adds them up a strip later
#include <algorithm>

#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kChunks = 8;  // groups of 32 k of a tile: whole lines of 128 bytes
constexpr int kRowBytes = 16 * kChunks;
constexpr int kMaxWarps = 16;
constexpr int kMaxStages = 4;

struct Plan {
  int n_warps, n_stages;
  int n_slots;                        // strips whose sums wait to be added up
  int n_tiles, pass_tiles, n_passes;  // along K; a pass has its part of a in shared memory
  int group_shift;
};

// Bytes of shared memory, part by part.
struct Shared {
  int stage, ring, partial, codes, factors, sums, kept, barriers;
  int total() const { return ring + partial + codes + factors + sums + kept + barriers; }
};

// halves: a tile, and so a strip, has so many times 16 columns n. `strips` of a block at most.
__host__ __device__ inline Shared shared_parts(int n8, int halves, bool has_zero, const Plan& plan,
                                               int strips) {
  Shared s = {};
  const int scale_bytes = 16 * halves * 16;  // 8 scales of 2 bytes for each column
  s.stage = 16 * halves * kRowBytes + scale_bytes * (has_zero ? 2 : 1);
  s.ring = plan.n_warps * plan.n_stages * s.stage;
  s.partial = plan.n_slots * plan.n_warps * halves * n8 * 512;
  s.codes = plan.pass_tiles * kChunks * n8 * 256;
  s.factors = plan.pass_tiles * kChunks * n8 * 64;
  s.sums = has_zero ? s.factors / 2 : 0;
  s.kept = plan.n_passes > 1 ? strips * halves * n8 * 512 : 0;
  s.barriers = 2 * plan.n_slots * 8;
  return s;
}

// Until all but the last n_stages - 2 groups of copies are complete.
__device__ __forceinline__ void wait_for_stage(int n_stages) {
  if (n_stages == 4) {
    cp_async_wait<2>();
  } else if (n_stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// A 16-bit float in the low or the high half of a word.
template <typename T>
__device__ __forceinline__ float half_of(uint32_t word, bool high);
template <>
__device__ __forceinline__ float half_of<__nv_bfloat16>(uint32_t word, bool high) {
  return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}
template <>
__device__ __forceinline__ float half_of<__half>(uint32_t word, bool high) {
  const uint32_t bits = high ? word >> 16 : word & 0xffffu;
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// From an int32 dot to float. Sums of integer products start at kDotOriginBits, so that the word, read
// as a float, is the origin plus the dot, and
//   dot * s = word * s - origin * s, one fma,
// where origin * s is exact if s has 22 bits: s_x loses its last 2, half an fp32 rounding. The 2^-24
// keeps origin * s finite for every s_x (one below 2^-102 loses more bits); it goes at the end.
constexpr int32_t kDotOriginBits = 0x4b400000;  // 1.5 * 2^23
constexpr float kDotOrigin = 12582912.f;
constexpr float kDotScale = 1.f / 16777216.f;

struct DotFactors {
  float s, minus;  // dot * s_x * kDotScale = word * s + minus
};

__device__ __forceinline__ DotFactors dot_factors(uint32_t s_x_bits) {
  const float s = __uint_as_float(s_x_bits & ~3u) * kDotScale;
  return {s, -kDotOrigin * s};
}

// Where lane t of quad m of codes lies, so that 8 quads storing one t hit different banks.
__device__ __forceinline__ int code_unit(int m, int t) { return m * 4 + (t ^ (m / 2 % 4)); }

// kGroups: scales of a column n that a tile brings along, of dtype T: 8 (group_size 32), 2 (128 and
// more); or 0: any dtype and group_size, read where they are used (T is not looked at).
template <int kN8, int kHalves, int kGroups, typename T, bool kZero>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) matvec_w4a8_mma_kernel(W4A8Args p, Plan plan) {
  constexpr int kRows = 16 * kHalves;  // columns n of a tile
  constexpr int kTileBytes = kRows * kRowBytes, kScaleBytes = kRows * 16;
  constexpr int kParts = kN8 * kHalves;  // of a strip: 16 columns n, 8 rows m
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup), M = static_cast<int>(p.M);
  const int64_t n_groups = p.n_groups, row_bytes = p.K / 2;
  const int64_t n_begin = p.N * blockIdx.x / gridDim.x;
  const int n_rows = static_cast<int>(p.N * (blockIdx.x + 1) / gridDim.x - n_begin);
  const int n_strips = (n_rows + kRows - 1) / kRows;
  const Shared parts = shared_parts(kN8, kHalves, kZero, plan, n_strips);
  const uint32_t ring_bytes_per_warp = static_cast<uint32_t>(plan.n_stages * parts.stage);
  const uint32_t ring = shared_address(shared) + warp * ring_bytes_per_warp;
  uint8_t* ring_bytes = shared + warp * ring_bytes_per_warp;
  float4* partial =
      reinterpret_cast<float4*>(shared + parts.ring);  // [slot][warps][kN8][kHalves][32]
  uint4* codes = reinterpret_cast<uint4*>(shared + parts.ring + parts.partial);  // [64 k][kN8][32]
  // Of pairs of rows m: what makes a dot a float, and sums of a times s_x; both [32 k][kN8][4].
  float4* factors = reinterpret_cast<float4*>(shared + parts.ring + parts.partial + parts.codes);
  float2* sums = reinterpret_cast<float2*>(factors + parts.factors / 16);
  float4* kept =
      reinterpret_cast<float4*>(shared + parts.ring + parts.partial + parts.codes + parts.factors +
                                parts.sums);  // [strip][kN8][kHalves][32]
  const uint32_t full = shared_address(kept) + parts.kept, empty = full + 8 * plan.n_slots;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < plan.n_slots; ++slot) {
      mbarrier_init(full + 8 * slot, blockDim.x);
      mbarrier_init(empty + 8 * slot, 32 * kParts);
    }
  }

  // ---- load_weights: a tile into the warp's own ring; order: passes over K, strips, tiles. Columns beyond the
  // last are left as they are: they end in sums that nobody stores ----
  const int copy_r = lane / kChunks, copy_c = lane % kChunks;  // rows copy_r + 4i
  const uint32_t four_rows = static_cast<uint32_t>(4 * row_bytes);
  const uint32_t scale_row_bytes = static_cast<uint32_t>(n_groups) * 2;
  const uint8_t* const copy_from = p.qdata + (n_begin + copy_r) * row_bytes;
  const uint32_t copy_row = ring + copy_r * kRowBytes;  // the swizzle: unit c ^ (row % 8)
  const uint32_t copy_even = copy_row + (copy_c ^ copy_r) * 16;
  const uint32_t copy_odd = copy_row + (copy_c ^ (copy_r + 4)) * 16;
  struct Cursor {
    int pass, strip, tile;
    uint32_t slot;  // in bytes
  };
  const auto settle = [&](Cursor& at) {  // where its tile is, if there is one
    int end_tile = min(plan.pass_tiles, plan.n_tiles - at.pass * plan.pass_tiles);
    while (at.pass < plan.n_passes && at.tile >= end_tile) {
      at.tile -= end_tile;
      if (++at.strip == n_strips) {
        at.strip = 0;
        at.tile = warp;
        ++at.pass;
        end_tile = min(plan.pass_tiles, plan.n_tiles - at.pass * plan.pass_tiles);
      }
    }
    return at.pass < plan.n_passes;
  };
  const auto advance = [&](Cursor& at) {
    at.tile += plan.n_warps;
    at.slot += parts.stage;
    if (at.slot == ring_bytes_per_warp) at.slot = 0;
  };
  const auto load_weights = [&](const Cursor& at) {
    const int chunk = (at.pass * plan.pass_tiles + at.tile) * kChunks;
    const int rows_left = n_rows - at.strip * kRows;
    const uint8_t* from = copy_from +
                          uint64_t{kRows / 4 * static_cast<uint32_t>(at.strip)} * four_rows +
                          static_cast<uint32_t>(min(chunk + copy_c, n_k32 - 1)) * 16;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const uint32_t to = (i % 2 == 0 ? copy_even : copy_odd) + at.slot + i * 4 * kRowBytes;
      if (copy_r + 4 * i < rows_left) cp_async_16(to, from);
      from += four_rows;
    }
    const int64_t n0 = n_begin + at.strip * kRows;
    const uint32_t scale_to = ring + at.slot + kTileBytes;
    if (kGroups == 8 && lane < min(rows_left, kRows)) {
      const int64_t from_byte = (n0 + lane) * scale_row_bytes + chunk * 2;
      cp_async_16(scale_to + lane * 16, static_cast<const char*>(p.scale) + from_byte);
      if (kZero) {
        cp_async_16(scale_to + kScaleBytes + lane * 16,
                    static_cast<const char*>(p.zero_point) + from_byte);
      }
    }
    if (kGroups == 2) {  // the 4 bytes that hold a scale; its half is found later
      const int group = min(chunk + lane % 2 * 4, n_k32 - 1) >> plan.group_shift;
#pragma unroll
      for (int r = lane / 2; r < kRows; r += 16) {
        if (r >= rows_left) continue;
        const int64_t from_byte = ((n0 + r) * scale_row_bytes + group * 2) / 4 * 4;
        const uint32_t to = scale_to + r * 16 + lane % 2 * 4;
        cp_async_4(to, static_cast<const char*>(p.scale) + from_byte);
        if (kZero) cp_async_4(to + kScaleBytes, static_cast<const char*>(p.zero_point) + from_byte);
      }
    }
  };

  // ---- load_activation: a as B fragments; factors for pairs of rows m ----
  const auto convert_factors = [](uint4 raw, float4* to, float2* sums_to) {
    const DotFactors first = dot_factors(raw.x), second = dot_factors(raw.z);
    *to = {first.s, first.minus, second.s, second.minus};
    if (kZero) {
      *sums_to = {first.s * static_cast<float>(static_cast<int32_t>(raw.y)),
                  second.s * static_cast<float>(static_cast<int32_t>(raw.w))};
    }
  };
  const auto load_activation = [&](int first_chunk, int n_chunks) {
    constexpr int kAhead = 3;  // rounds whose loads are in flight together
    const int n_factors = n_chunks * 4 * kN8, n_items = n_chunks / 2 * 8 * kN8;
    uint4 raw[kAhead + 1];
    const auto load_raw = [&](int i0) {
#pragma unroll
      for (int round = 0; round <= kAhead; ++round) {
        const int i = i0 + round * blockDim.x, j = first_chunk + i / (4 * kN8);
        raw[round] = {};
        if (i >= n_factors || j >= n_k32) continue;
        raw[round] =
            *reinterpret_cast<const uint4*>(p.parameter + (j * p.n_tokens + i % (4 * kN8) * 2));
      }
    };
    load_raw(threadIdx.x);
    for (int i0 = threadIdx.x; i0 < n_items; i0 += kAhead * blockDim.x) {
      uint4 even[kAhead][2] = {}, odd[kAhead][2] = {};
#pragma unroll
      for (int round = 0; round < kAhead; ++round) {
        const int i = i0 + round * blockDim.x;
        const int m = i % (8 * kN8), j = first_chunk + i / (8 * kN8) * 2;
        if (i >= n_items || m >= M) continue;
        const int8_t* from = p.a + (m * p.K + j * 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (j + h >= n_k32) continue;
          even[round][h] = *reinterpret_cast<const uint4*>(from + h * 16);
          odd[round][h] = *reinterpret_cast<const uint4*>(from + p.K / 2 + h * 16);
        }
      }
#pragma unroll
      for (int round = 0; round < kAhead; ++round) {
        const int i = i0 + round * blockDim.x, m = i % (8 * kN8);
        if (i >= n_items || m >= M) continue;  // tokens beyond M reach no other token
        const uint4(&e)[2] = even[round], (&o)[2] = odd[round];
        uint4* to = codes + i / 8 * 32;
        to[code_unit(m % 8, 0)] = {e[0].x, o[0].x, e[1].x, o[1].x};
        to[code_unit(m % 8, 1)] = {e[0].y, o[0].y, e[1].y, o[1].y};
        to[code_unit(m % 8, 2)] = {e[0].z, o[0].z, e[1].z, o[1].z};
        to[code_unit(m % 8, 3)] = {e[0].w, o[0].w, e[1].w, o[1].w};
      }
    }
    for (int i0 = threadIdx.x; i0 < n_factors; i0 += (kAhead + 1) * blockDim.x) {
      if (i0 != threadIdx.x) load_raw(i0);
#pragma unroll
      for (int round = 0; round <= kAhead; ++round) {
        const int i = i0 + round * blockDim.x;
        if (i < n_factors) convert_factors(raw[round], factors + i, sums + i);
      }
    }
  };

  // ---- mma: a tile into the sums ----
  const int32_t origin[4] = {kDotOriginBits, kDotOriginBits, kDotOriginBits, kDotOriginBits};
  const int code_at = code_unit(g, t);
  const int matrix_row = lane % 16;
  const uint32_t matrix_address = ring + matrix_row * kRowBytes;
  float sum[kN8][kHalves][4];
  const auto multiply_tile = [&](uint32_t slot, int strip, int pass, int tile) {
    const uint32_t from = matrix_address + slot;
    const uint8_t* stage = ring_bytes + slot;
    const uint4* code = codes + tile * (kChunks / 2 * kN8 * 32) + code_at;
    const float4* factor = factors + tile * (kChunks * kN8 * 4) + t;
    const float2* x_sum = sums + tile * (kChunks * kN8 * 4) + t;
    const int chunk = (pass * plan.pass_tiles + tile) * kChunks;
    uint4 scale_bits[2 * kHalves] = {}, zero_bits[2 * kHalves] = {};
    int64_t row[2 * kHalves];
#pragma unroll
    for (int h = 0; h < 2 * kHalves; ++h) {
      const int r = g + 8 * h;
      const uint8_t* at = stage + kTileBytes + r * 16;
      if (kGroups == 8) {
        scale_bits[h] = *reinterpret_cast<const uint4*>(at);
        if (kZero) zero_bits[h] = *reinterpret_cast<const uint4*>(at + kScaleBytes);
        continue;
      }
      row[h] = (n_begin + min(strip * kRows + r, n_rows - 1)) * n_groups;
      if (kGroups == 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t group = row[h] + (min(chunk + 4 * i, n_k32 - 1) >> plan.group_shift);
          const uint8_t* one = at + i * 4 + group % 2 * 2;
          (i == 0 ? scale_bits[h].x : scale_bits[h].y) = *reinterpret_cast<const uint16_t*>(one);
          if (kZero) {
            (i == 0 ? zero_bits[h].x : zero_bits[h].y) =
                *reinterpret_cast<const uint16_t*>(one + kScaleBytes);
          }
        }
      }
    }
    const auto pick = [](const uint4& bits, int c) {  // of chunk c
      if (kGroups == 2) return half_of<T>(c < 4 ? bits.x : bits.y, false);
      const uint32_t word = c / 2 == 0   ? bits.x
                            : c / 2 == 1 ? bits.y
                            : c / 2 == 2 ? bits.z
                                         : bits.w;
      return half_of<T>(word, c % 2 == 1);
    };
#pragma unroll
    for (int pair = 0; pair < kChunks / 2; ++pair) {
      uint32_t words[kHalves][4];  // rows g, g + 8 of one chunk, then of the other
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        ldmatrix_x4(words[h],
                    from + h * 16 * kRowBytes + (((2 * pair + lane / 16) ^ (lane % 8)) * 16));
      }
      uint4 ab[kN8];  // even, odd k of one chunk, then of the other
#pragma unroll
      for (int b = 0; b < kN8; ++b) ab[b] = code[(pair * kN8 + b) * 32];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int c = 2 * pair + odd;
        float4 of[kN8];
        float2 sum_of[kN8] = {};
#pragma unroll
        for (int b = 0; b < kN8; ++b) {
          of[b] = factor[(c * kN8 + b) * 4];
          if (kZero) sum_of[b] = x_sum[(c * kN8 + b) * 4];
        }
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          float scale[2], zero[2] = {};  // zero: in units of a dot
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if constexpr (kGroups > 0) {
              scale[i] = pick(scale_bits[2 * h + i], c);
              if (kZero) zero[i] = 128.f - 16.f * pick(zero_bits[2 * h + i], c);
            } else {
              const int64_t at = row[2 * h + i] + (min(chunk + c, n_k32 - 1) >> plan.group_shift);
              scale[i] = load_as_float(p.scale_dtype, p.scale, at);
              if (kZero) {
                zero[i] = 128.f - 16.f * load_as_float(p.zero_point_dtype, p.zero_point, at);
              }
            }
          }
          const uint32_t w0 = words[h][2 * odd], w1 = words[h][2 * odd + 1];
          const uint32_t weights[4] = {signed_low_nibbles(w0), signed_low_nibbles(w1),
                                       signed_high_nibbles(w0), signed_high_nibbles(w1)};
#pragma unroll
          for (int b = 0; b < kN8; ++b) {
            int32_t dot[4];
            mma_m16n8k32_s8_s8(
                dot, weights, {odd == 0 ? ab[b].x : ab[b].z, odd == 0 ? ab[b].y : ab[b].w}, origin);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float word = __int_as_float(dot[e]);
              float scaled =
                  e % 2 == 0 ? fmaf(word, of[b].x, of[b].y) : fmaf(word, of[b].z, of[b].w);
              if (kZero) {
                scaled = fmaf(zero[e / 2], e % 2 == 0 ? sum_of[b].x : sum_of[b].y, scaled);
              }
              sum[b][h][e] = fmaf(scale[e / 2], scaled, sum[b][h][e]);
            }
          }
        }
      }
    }
  };

  // ---- reduce and store: the sums of all warps for one strip; `sequence` counts strips ----
  const auto reduce = [&](int sequence, int part) {
    const int pass = sequence / n_strips, strip = sequence - pass * n_strips;
    const int slot = sequence % plan.n_slots;
    mbarrier_wait(full + 8 * slot, sequence / plan.n_slots % 2);
    float4* keep = kept + (strip * kParts + part) * 32 + lane;
    float4 total = {0.f, 0.f, 0.f, 0.f};
    if (pass > 0) total = *keep;
    for (int w = 0; w < plan.n_warps; ++w) {
      const float4 other = partial[((slot * plan.n_warps + w) * kParts + part) * 32 + lane];
      total.x += other.x;
      total.y += other.y;
      total.z += other.z;
      total.w += other.w;
    }
    mbarrier_arrive(empty + 8 * slot);
    if (pass + 1 < plan.n_passes) {
      *keep = total;
      return;
    }
    const float values[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = strip * kRows + part % kHalves * 16 + g + 8 * (e / 2);
      const int m = part / kHalves * 8 + 2 * t + e % 2;
      if (r >= n_rows || m >= M) continue;
      const int64_t n = n_begin + r;
      float value = values[e] * (kNibbleUnit / kDotScale);
      if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
      store_from_float(p.dtype, p.y, m * p.N + n, value);
    }
  };
  const auto reduce_mine = [&](int sequence) {  // parts go to the same warps in every pass
    const int first = sequence % n_strips * kParts;
    for (int part = 0; part < kParts; ++part) {
      if ((first + part) % plan.n_warps == warp) reduce(sequence, part);
    }
  };

  // Weights first: they are far, and nothing that kernels write.
  Cursor next = {0, 0, warp, 0};
  for (int s = 0; s < plan.n_stages - 1; ++s) {
    if (settle(next)) load_weights(next);
    cp_async_commit();
    advance(next);
  }
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  uint32_t slot = 0;  // in bytes
  int sequence = 0;
  for (int pass = 0; pass < plan.n_passes; ++pass) {
    const int first_tile = pass * plan.pass_tiles;
    const int end_tile = min(plan.pass_tiles, plan.n_tiles - first_tile);
    if (pass > 0) __syncthreads();  // the activation of the last pass has been read
    load_activation(first_tile * kChunks, end_tile * kChunks);
    __syncthreads();
    int tile = warp;
    for (int strip = 0; strip < n_strips; ++strip, ++sequence) {
#pragma unroll
      for (int b = 0; b < kN8; ++b) {
#pragma unroll
        for (int i = 0; i < 4 * kHalves; ++i) sum[b][i / 4][i % 4] = 0.f;
      }
      for (; tile < end_tile; tile += plan.n_warps) {
        wait_for_stage(plan.n_stages);
        __syncwarp();  // the tile is there for all lanes; the one before has been read
        if (settle(next)) load_weights(next);
        cp_async_commit();
        advance(next);
        multiply_tile(slot, strip, pass, tile);
        slot += parts.stage;
        if (slot == ring_bytes_per_warp) slot = 0;
      }
      tile -= end_tile;

      const int place = sequence % plan.n_slots;
      if (sequence >= plan.n_slots) {
        mbarrier_wait(empty + 8 * place, (sequence / plan.n_slots - 1) % 2);
      }
      float4* mine = partial + (place * plan.n_warps + warp) * kN8 * kHalves * 32 + lane;
#pragma unroll
      for (int i = 0; i < kN8 * kHalves; ++i) {
        const float* of = sum[i / kHalves][i % kHalves];
        mine[i * 32] = {of[0], of[1], of[2], of[3]};
      }
      mbarrier_arrive(full + 8 * place);
      if (sequence > 0) reduce_mine(sequence - 1);
    }
  }
  reduce_mine(sequence - 1);
}

// As few passes over K as shared memory allows, then as many warps, then as many stages. Returns the
// bytes of shared memory, 0 if nothing fits.
int fit(int n8, int halves, bool has_zero, int most_warps, int64_t block_columns, int limit,
        Plan* plan) {
  const int strips = static_cast<int>((block_columns + 16 * halves) / (16 * halves));
  for (int passes = 1; passes <= plan->n_tiles; ++passes) {
    plan->pass_tiles = (plan->n_tiles + passes - 1) / passes;
    plan->n_passes = (plan->n_tiles + plan->pass_tiles - 1) / plan->pass_tiles;
    plan->n_slots = strips == 1 && plan->n_passes == 1 ? 1 : 2;
    for (int eighths = 8; eighths >= 4; --eighths) {
      plan->n_warps = most_warps * eighths / 8;
      for (plan->n_stages = kMaxStages; plan->n_stages >= 2; --plan->n_stages) {
        const int nbytes = shared_parts(n8, halves, has_zero, *plan, strips).total();
        if (nbytes <= limit) return nbytes;
      }
    }
  }
  return 0;
}

template <int kN8, int kHalves, int kGroups, typename T, bool kZero>
cudaError_t launch_plan(const W4A8Args& args, int blocks, const Plan& plan, int nbytes,
                        cudaStream_t stream) {
  const auto kernel = matvec_w4a8_mma_kernel<kN8, kHalves, kGroups, T, kZero>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, nbytes);
  if (error != cudaSuccess) return error;
  return launch_w4a8(kernel, static_cast<unsigned>(blocks), 32 * plan.n_warps, nbytes, stream, args,
                     plan);
}

template <int kN8, int kGroups, typename T, bool kZero>
cudaError_t launch(const W4A8Args& args, cudaStream_t stream) {
  int device = 0, n_sms = 0, block_limit = 0, sm_limit = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&block_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&sm_limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);

  Plan plan = {};
  plan.group_shift = w4a8_group_shift(args);
  const int n_k32 = static_cast<int>(args.K / kQuantizedGroup);
  plan.n_tiles = (n_k32 + kChunks - 1) / kChunks;
  const int most_warps = plan.n_tiles >= kMaxWarps ? kMaxWarps : kMaxWarps / 2;
  const int blocks_per_sm = kMaxWarps / most_warps;
  const int limit = blocks_per_sm == 1 ? block_limit : sm_limit / blocks_per_sm - 1024;
  const int blocks =
      static_cast<int>(std::min<int64_t>((args.N + 15) / 16, int64_t{n_sms} * blocks_per_sm));
  // Strips of 32 columns read a from shared memory half as often; where a is so long that they leave
  // room for few warps, strips of 16.
  Plan narrow = plan;
  const int wide_bytes = fit(kN8, 2, kZero, most_warps, args.N / blocks, limit, &plan);
  const int narrow_bytes = fit(kN8, 1, kZero, most_warps, args.N / blocks, limit, &narrow);
  if (narrow_bytes == 0) return cudaErrorInvalidConfiguration;
  const bool crowded = plan.n_passes > narrow.n_passes || plan.n_warps * 2 <= most_warps;
  return wide_bytes == 0 || crowded
             ? launch_plan<kN8, 1, kGroups, T, kZero>(args, blocks, narrow, narrow_bytes, stream)
             : launch_plan<kN8, 2, kGroups, T, kZero>(args, blocks, plan, wide_bytes, stream);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int kN8, bool kZero, typename T>
cudaError_t choose_groups(const W4A8Args& args, cudaStream_t stream) {
  if (is_aligned(args.scale) && is_aligned(args.zero_point)) {
    if (args.group_size == 32 && args.K % 256 == 0) return launch<kN8, 8, T, kZero>(args, stream);
    // An odd number of scales: the last would be fetched together with 2 bytes behind them.
    const bool even = args.N * args.n_groups % 2 == 0;
    if (even && args.group_size % 128 == 0) return launch<kN8, 2, T, kZero>(args, stream);
  }
  return launch<kN8, 0, __half, kZero>(args, stream);
}

template <int kN8, bool kZero>
cudaError_t choose_dtype(const W4A8Args& args, cudaStream_t stream) {
  if (args.scale_dtype == args.zero_point_dtype) {
    if (args.scale_dtype == DType::kBFloat16) {
      return choose_groups<kN8, kZero, __nv_bfloat16>(args, stream);
    }
    if (args.scale_dtype == DType::kFloat16) {
      return choose_groups<kN8, kZero, __half>(args, stream);
    }
  }
  return launch<kN8, 0, __half, kZero>(args, stream);
}

template <int kN8>
cudaError_t choose_zero_point(const W4A8Args& args, cudaStream_t stream) {
  return args.zero_point == nullptr ? choose_dtype<kN8, false>(args, stream)
                                    : choose_dtype<kN8, true>(args, stream);
}

}  // namespace

cudaError_t launch_matvec_w4a8_mma(const W4A8Args& args, cudaStream_t stream) {
  return args.M <= 8 ? choose_zero_point<1>(args, stream) : choose_zero_point<2>(args, stream);
}

}  // namespace cuda_int4
