// matvec_w4a8_mma -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                    zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size;  few rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h              16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//                                                                                         (16 B: fast)
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              as scale
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  M <= 16, K % 32 == 0, group_size % 32 == 0, K % group_size == 0 (validate_linear)
// Grid      persistent: block b owns columns n from N * b / blocks on and takes them 32 at a time;
//           its warps share out K in tiles of 256 and add their sums through shared memory
// Bytes     reads N*K/2 + N*n_groups scales and zero points once, a once per block (L2)
// Numerics  exact int32 dot per 32 k, the rest in fp32 in a fixed order, one rounding at the store
// Source    own. The weights are the A operand of mma.m16n8k32 (its rows are n), so that 16 bytes of
//           a column n, one group of 32 k, are one row of an ldmatrix: lane t of a quad gets word t,
//           whose low nibbles are 4 even k and whose high nibbles are 4 odd k; the B operand takes
//           the same words of the even and odd planes of a
#include <algorithm>

#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kStages = 3;  // tiles in the ring of a warp
constexpr int kRows = 32;   // columns n of a tile
constexpr int kChunks = 8;  // groups of 32 k of a tile
constexpr int kMaxWarps = 8;
constexpr int kTileBytes = kRows * kChunks * 16;
constexpr int kScaleBytes = kRows * 16;  // of a tile: 8 scales of 2 bytes for each n
constexpr float kIntegerOrigin =
    12582912.f;  // 1.5 * 2^23: as an int32 plus i, it is the float plus i
constexpr int32_t kIntegerOriginBits = 0x4b400000;

struct Plan {
  int n_warps, n_tiles, pass_tiles, n_passes, group_shift;
};

// Bytes of shared memory, part by part.
struct Shared {
  int stage, ring, partial, codes, parameters, kept;
  int total() const { return ring + partial + codes + parameters + kept; }
};

__host__ __device__ inline Shared shared_parts(int n8, bool has_zero, const Plan& plan,
                                               int strips) {
  Shared s = {};
  s.stage = kTileBytes + kScaleBytes * (has_zero ? 2 : 1);
  s.ring = plan.n_warps * kStages * s.stage;
  s.partial = 2 * plan.n_warps * 2 * n8 * 512;
  s.codes = plan.pass_tiles * kChunks * n8 * 256;
  s.parameters = plan.pass_tiles * kChunks * n8 * 64;
  s.kept = plan.n_passes > 1 ? strips * 2 * n8 * 512 : 0;
  return s;
}

// The tiles of a warp, in order: passes over K, strips of 32 columns n, tiles of 256 k.
struct Cursor {
  int pass, strip, tile;

  __device__ __forceinline__ void settle(const Plan& plan, int n_strips, int warp) {
    while (pass < plan.n_passes && tile >= min((pass + 1) * plan.pass_tiles, plan.n_tiles)) {
      if (++strip == n_strips) {
        strip = 0;
        ++pass;
      }
      tile = pass * plan.pass_tiles + warp;
    }
  }
};

__device__ __forceinline__ float float_of_16_bits(uint32_t bits, bool is_bfloat16) {
  return is_bfloat16 ? __uint_as_float(bits << 16)
                     : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// kGroups: scales of a column n that a tile brings along: 8 (group_size 32), 2 (128 and more), or 0:
// any dtype and group_size, read where they are used.
template <int kN8, int kGroups, bool kZero>
__global__ void __launch_bounds__(32 * kMaxWarps) matvec_w4a8_mma_kernel(W4A8Args p, Plan plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup), M = static_cast<int>(p.M);
  const int64_t n_groups = p.K / p.group_size, row_bytes = p.K / 2;
  const int64_t n_begin = p.N * blockIdx.x / gridDim.x;
  const int n_rows = static_cast<int>(p.N * (blockIdx.x + 1) / gridDim.x - n_begin);
  const int n_strips = (n_rows + kRows - 1) / kRows;
  const bool is_bfloat16 = p.scale_dtype == DType::kBFloat16;

  const Shared parts = shared_parts(kN8, kZero, plan, n_strips);
  uint8_t* ring = shared + warp * kStages * parts.stage;
  float4* partial = reinterpret_cast<float4*>(shared + parts.ring);  // [2][n_warps][2 * kN8][32]
  uint2* codes = reinterpret_cast<uint2*>(shared + parts.ring + parts.partial);  // [32 k][kN8][32]
  float4* parameters = reinterpret_cast<float4*>(shared + parts.ring + parts.partial +
                                                 parts.codes);  // [32 k][kN8][4]
  float4* kept = parameters + parts.parameters / 16;            // [strip][2 * kN8][32]

  // ---- load_tile: into the warp's own ring ----
  const int copy_r = lane / 8, copy_c = lane % 8;  // rows copy_r + 4i; the swizzle is c ^ (row % 8)
  const uint8_t* copy_from = p.qdata + (n_begin + copy_r) * row_bytes + copy_c * 16;
  const uint32_t copy_to[2] = {static_cast<uint32_t>(copy_r * 128 + (copy_c ^ copy_r) * 16),
                               static_cast<uint32_t>(copy_r * 128 + (copy_c ^ (copy_r + 4)) * 16)};
  const uint32_t ring_address = shared_address(ring);
  Cursor next = {0, 0, warp};
  next.settle(plan, n_strips, warp);
  int next_slot = 0;
  const auto load_tile = [&]() {
    if (next.pass < plan.n_passes) {
      const uint32_t to = ring_address + next_slot * parts.stage;
      const int r0 = next.strip * kRows, chunk = next.tile * kChunks;
      const uint8_t* from = copy_from + (r0 * row_bytes + chunk * 16);
      const int rows_left = chunk + copy_c < n_k32 ? n_rows - r0 - copy_r : 0;
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        const bool here = 4 * i < rows_left;
        cp_async_16_or_zero(to + copy_to[i % 2] + i * 512, here ? from : p.qdata, here);
        from += 4 * row_bytes;
      }
      if (kGroups > 0) {
        const int64_t n = n_begin + min(r0 + lane, n_rows - 1);
        const char* scale = static_cast<const char*>(p.scale);
        const char* zero = static_cast<const char*>(p.zero_point);
        if (kGroups == 8) {
          const int64_t at = (n * n_groups + chunk) * 2;
          cp_async_16(to + kTileBytes + lane * 16, scale + at);
          if (kZero) cp_async_16(to + kTileBytes + kScaleBytes + lane * 16, zero + at);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // the 4 bytes that hold the scale; its half is found later
            const int64_t group =
                n * n_groups + (min(chunk + 4 * i, n_k32 - 1) >> plan.group_shift);
            cp_async_4(to + kTileBytes + lane * 16 + i * 4, scale + group / 2 * 4);
            if (kZero) {
              cp_async_4(to + kTileBytes + kScaleBytes + lane * 16 + i * 4, zero + group / 2 * 4);
            }
          }
        }
      }
      next.tile += plan.n_warps;
      next.settle(plan, n_strips, warp);
    }
    next_slot = next_slot + 1 == kStages ? 0 : next_slot + 1;
    cp_async_commit();
  };

  // ---- load_activation: a as B fragments; s_x and what is subtracted from a dot, for token pairs ----
  const auto load_activation = [&](int first_tile, int end_tile) {
    const int n_chunks = (end_tile - first_tile) * kChunks;
    for (int i = threadIdx.x; i < n_chunks * 8 * kN8; i += blockDim.x) {
      const int m = i % (8 * kN8), c = i / (8 * kN8), j = first_tile * kChunks + c;
      if (m >= M) continue;  // what the tokens beyond M hold reaches no other token
      uint4 even = {}, odd = {};
      QuantizedParameter parameter = {};
      if (j < n_k32) {
        even = *reinterpret_cast<const uint4*>(p.a + (m * p.K + j * 16));
        odd = *reinterpret_cast<const uint4*>(p.a + (m * p.K + p.K / 2 + j * 16));
        parameter = p.parameter[j * p.n_tokens + m];
      }
      const int at = c * kN8 + m / 8;
      uint4* to = reinterpret_cast<uint4*>(codes + at * 32 + m % 8 * 4);
      to[0] = {even.x, odd.x, even.y, odd.y};
      to[1] = {even.z, odd.z, even.w, odd.w};
      float* pair = reinterpret_cast<float*>(parameters + at * 4 + m % 8 / 2) + m % 2;
      const float sum = static_cast<float>(parameter.sum);
      pair[0] = parameter.s_x;
      pair[2] = kZero ? sum : fmaf(8.f, sum, kIntegerOrigin);  // exact: an integer below 2^24
    }
  };

  // ---- mma: a tile into the sums ----
  const int32_t origin[4] = {kIntegerOriginBits, kIntegerOriginBits, kIntegerOriginBits,
                             kIntegerOriginBits};
  float sum[2][kN8][4];
  const auto multiply_tile = [&](const uint8_t* stage, int strip, int tile, int first_tile) {
    const uint32_t from = shared_address(stage) + lane * 128;
    const uint2* code = codes + (tile - first_tile) * kChunks * kN8 * 32 + lane;
    const float4* parameter = parameters + (tile - first_tile) * kChunks * kN8 * 4 + t;
    uint4 scale_bits[4], zero_bits[4];
    int64_t group[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int r = g + 8 * h;
      if (kGroups > 0) {
        const uint8_t* at = stage + kTileBytes + r * 16;
        if (kGroups == 8) {
          scale_bits[h] = *reinterpret_cast<const uint4*>(at);
          if (kZero) zero_bits[h] = *reinterpret_cast<const uint4*>(at + kScaleBytes);
        } else {
          const int64_t first = (n_begin + min(strip * kRows + r, n_rows - 1)) * n_groups;
          const int chunk = tile * kChunks;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t at_group = first + (min(chunk + 4 * i, n_k32 - 1) >> plan.group_shift);
            const int skip = i * 4 + (at_group % 2) * 2;
            const uint32_t bits = *reinterpret_cast<const uint16_t*>(at + skip);
            (i == 0 ? scale_bits[h].x : scale_bits[h].y) = bits;
            if (kZero) {
              const uint32_t z = *reinterpret_cast<const uint16_t*>(at + kScaleBytes + skip);
              (i == 0 ? zero_bits[h].x : zero_bits[h].y) = z;
            }
          }
        }
      } else {
        group[h] = (n_begin + min(strip * kRows + r, n_rows - 1)) * n_groups;
      }
    }
    const auto pick = [&](const uint4& bits, int c) {  // scale or zero point of chunk c
      if (kGroups == 8) {
        const uint32_t word = c / 2 == 0   ? bits.x
                              : c / 2 == 1 ? bits.y
                              : c / 2 == 2 ? bits.z
                                           : bits.w;
        return float_of_16_bits(c % 2 == 0 ? word & 0xffff : word >> 16, is_bfloat16);
      }
      return float_of_16_bits(c / 4 == 0 ? bits.x : bits.y, is_bfloat16);
    };
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float scale[4], zero[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        if (kGroups > 0) {
          scale[h] = pick(scale_bits[h], c);
          zero[h] = kZero ? pick(zero_bits[h], c) : 0.f;
        } else {
          const int64_t at = group[h] + (min(tile * kChunks + c, n_k32 - 1) >> plan.group_shift);
          scale[h] = load_as_float(p.scale_dtype, p.scale, at);
          zero[h] = kZero ? load_as_float(p.zero_point_dtype, p.zero_point, at) : 0.f;
        }
      }
      uint32_t words[4];
      ldmatrix_x4(words, from + ((c ^ (lane % 8)) * 16));
      uint32_t weights[2][4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        weights[h / 2][h % 2] = words[h] & 0x0f0f0f0fu;
        weights[h / 2][2 + h % 2] = (words[h] >> 4) & 0x0f0f0f0fu;
      }
#pragma unroll
      for (int b = 0; b < kN8; ++b) {
        const uint2 ab = code[(c * kN8 + b) * 32];
        const float4 pair = parameter[(c * kN8 + b) * 4];
        const float s_x[2] = {pair.x, pair.y}, minus[2] = {pair.z, pair.w};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          int32_t dot[4];
          mma_m16n8k32_u8_s8(dot, weights[s], {ab.x, ab.y}, origin);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float centred = __int_as_float(dot[e]);
            if (kZero) {
              centred = fmaf(-zero[2 * s + e / 2], minus[e % 2], centred - kIntegerOrigin);
            } else {
              centred -= minus[e % 2];
            }
            sum[s][b][e] = fmaf(scale[2 * s + e / 2] * s_x[e % 2], centred, sum[s][b][e]);
          }
        }
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load_tile();
  int slot = 0, parity = 0;
  for (int pass = 0; pass < plan.n_passes; ++pass) {
    const int first_tile = pass * plan.pass_tiles;
    const int end_tile = min(first_tile + plan.pass_tiles, plan.n_tiles);
    load_activation(first_tile, end_tile);  // the last pass is read: a barrier follows every strip
    __syncthreads();
    for (int strip = 0; strip < n_strips; ++strip, parity ^= 1) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int b = 0; b < kN8; ++b) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[s][b][e] = 0.f;
        }
      }
      for (int tile = first_tile + warp; tile < end_tile; tile += plan.n_warps) {
        cp_async_wait<kStages - 2>();
        __syncwarp();  // the tile is there for all lanes; the one before has been read
        load_tile();
        multiply_tile(ring + slot * parts.stage, strip, tile, first_tile);
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }

      // ---- reduce and store ----
      float4* mine = partial + (parity * plan.n_warps + warp) * 2 * kN8 * 32 + lane;
#pragma unroll
      for (int i = 0; i < 2 * kN8; ++i) {
        const float* value = sum[i % 2][i / 2];
        mine[i * 32] = {value[0], value[1], value[2], value[3]};
      }
      __syncthreads();  // and nobody writes this half again before the next but one
      for (int i = warp; i < 2 * kN8; i += plan.n_warps) {
        float4 total = {0.f, 0.f, 0.f, 0.f};
        float4* keep = kept + (strip * 2 * kN8 + i) * 32 + lane;
        if (pass > 0) total = *keep;
        for (int w = 0; w < plan.n_warps; ++w) {
          const float4 other = partial[((parity * plan.n_warps + w) * 2 * kN8 + i) * 32 + lane];
          total.x += other.x;
          total.y += other.y;
          total.z += other.z;
          total.w += other.w;
        }
        if (pass + 1 < plan.n_passes) {
          *keep = total;
          continue;
        }
        const float values[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = strip * kRows + i % 2 * 16 + g + 8 * (e / 2), m = i / 2 * 8 + 2 * t + e % 2;
          if (r >= n_rows || m >= M) continue;
          const int64_t n = n_begin + r;
          float value = values[e];
          if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
          store_from_float(p.dtype, p.y, m * p.N + n, value);
        }
      }
    }
  }
}

template <int kN8, int kGroups, bool kZero>
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
  // As many warps as share K out best; of equally good numbers the larger.
  int best = 0;
  for (int warps = kMaxWarps; warps >= 5; --warps) {
    const int rounds = (plan.n_tiles + warps - 1) / warps;
    if (best == 0 || rounds * warps < best) {
      best = rounds * warps;
      plan.n_warps = warps;
    }
  }
  // Two blocks to an SM where both fit, else one; else K in passes.
  int blocks_per_sm = 2, strips = 0, blocks = 0;
  for (;; --blocks_per_sm) {
    const int64_t wanted = (args.N + 7) / 8;
    blocks = static_cast<int>(std::min<int64_t>(wanted, int64_t{n_sms} * blocks_per_sm));
    strips = static_cast<int>((args.N / blocks + kRows) / kRows);
    plan.n_passes = 1;
    plan.pass_tiles = plan.n_tiles;
    const int limit = blocks_per_sm == 2 ? sm_limit / 2 - 1024 : block_limit;
    if (shared_parts(kN8, kZero, plan, strips).total() <= limit) break;
    if (blocks_per_sm == 2) continue;
    while (shared_parts(kN8, kZero, plan, strips).total() > limit) {
      ++plan.n_passes;
      plan.pass_tiles = (plan.n_tiles + plan.n_passes - 1) / plan.n_passes;
      if (plan.n_passes > plan.n_tiles) return cudaErrorInvalidConfiguration;
    }
    plan.n_passes = (plan.n_tiles + plan.pass_tiles - 1) / plan.pass_tiles;
    break;
  }
  const int nbytes = shared_parts(kN8, kZero, plan, strips).total();
  const auto kernel = matvec_w4a8_mma_kernel<kN8, kGroups, kZero>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, nbytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, 32 * plan.n_warps, nbytes, stream>>>(args, plan);
  return cudaGetLastError();
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int kN8, bool kZero>
cudaError_t choose_groups(const W4A8Args& args, cudaStream_t stream) {
  const bool fast = args.scale_dtype != DType::kFloat32 &&
                    args.zero_point_dtype == args.scale_dtype && is_aligned(args.scale) &&
                    is_aligned(args.zero_point);
  if (fast && args.group_size == 32 && args.K % 256 == 0) {
    return launch<kN8, 8, kZero>(args, stream);
  }
  // An odd number of scales: the last would be fetched together with 2 bytes behind them.
  const bool even = args.N * (args.K / args.group_size) % 2 == 0;
  if (fast && even && args.group_size >= 128 && args.group_size % 128 == 0) {
    return launch<kN8, 2, kZero>(args, stream);
  }
  return launch<kN8, 0, kZero>(args, stream);
}

template <int kN8>
cudaError_t choose_zero_point(const W4A8Args& args, cudaStream_t stream) {
  return args.zero_point == nullptr ? choose_groups<kN8, false>(args, stream)
                                    : choose_groups<kN8, true>(args, stream);
}

}  // namespace

cudaError_t launch_matvec_w4a8_mma(const W4A8Args& args, cudaStream_t stream) {
  return args.M <= 8 ? choose_zero_point<1>(args, stream) : choose_zero_point<2>(args, stream);
}

}  // namespace cuda_int4
