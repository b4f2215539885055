// matvec_w4a8_slices -- y[m, n] = sum_g scale[n, g] * sum_j s_x[m, j] * sum_k a[m, k] *
//                       (q[n, k] - 8) + bias[n],  j = k / 32, g = k / group_size;  few rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h, M > 2       16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16          [N, n_groups]     row-major                              16 B
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  sm_90, 3 <= M <= 16, no zero points, group_size 32, 64 or 128, K % 256 == 0, K <= 32768, and
//           that the sums of a cluster fit in its shared memory (all looked at by
//           launch_matvec_w4a8_slices: false means another kernel)
// Grid      clusters of 1, 2, 4 or 8 blocks, as many as fit at once; a cluster owns columns n from
//           N * cluster / clusters on, a warp one slice of 256 k of all of them
// Bytes     reads N*K/2 + 2*N*n_groups once, a once per cluster (L2)
// Numerics  exact int32 dot per 32 k, the rest in fp32 in a fixed order, one rounding at the store
// Source    own. A warp keeps its slice of a in registers as B fragments and streams 16 columns at a
//           time through its own ring; the weights are the A operand of mma.m16n8k32, as in
//           matvec_w4a8_mma.cu. All warps add their sums up together every 32 columns; between the
//           blocks of a cluster each stores to the one that adds, and all meet once, at the end
#include <type_traits>

#include "multiprocessors.cuh"
#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 16;
constexpr int kChunks = 8;  // groups of 32 k of a slice: whole lines of 128 bytes
constexpr int kSliceK = kChunks * static_cast<int>(kQuantizedGroup);
constexpr int kMaxRanks = 8;
constexpr int kStages = 2;          // of a ring; 3 and 4 are slower by up to 10 %
constexpr int kStrip = 16;          // columns n of a tile
constexpr int kTurn = 2 * kStrip;   // columns after which sums are added up
constexpr int kStride = kTurn + 4;  // floats between rows m of sums: no two lanes hit one bank

// Shared memory in bytes: per warp a ring, a place for its part of a and then its sums (twice), s_x.
template <int kN8, int kGroups>
struct Sizes {
  static constexpr int kTile = kStrip * kChunks * 16;
  static constexpr int kScales = kGroups * 2;  // of a column and slice
  static constexpr int kStage = kTile + (kStrip * kScales + 127) / 128 * 128;
  static constexpr int kSums = kN8 * 8 * kStride * 4;
  static constexpr int kPlace = 2 * kSums + 64;  // two warps lie 16 banks apart
  static constexpr int kFactors = kN8 * 8 * kChunks * 4;
  static constexpr int kAllWarps = kWarps * (kStages * kStage + kPlace + kFactors);
  static constexpr int kSent = kN8 * 8 * kTurn * 4;  // sums of a turn, to the block that adds them
  static_assert(kN8 * 8 * kSliceK <= kPlace && kPlace % 128 == 64,
                "a of a warp fits where its sums go, and two places lie 16 banks apart");
};

// A 16-bit float in the low or the high half of a word.
template <typename T>
__device__ __forceinline__ float half_of(uint32_t word, bool high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(high ? word & 0xffff0000u : word << 16);
  } else {
    const uint32_t bits = high ? word >> 16 : word & 0xffffu;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

// kGroups: scales of a column and slice.
template <int kN8, int kGroups, typename T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    matvec_w4a8_slices_kernel(const __grid_constant__ W4A8Args p, int n_ranks) {
#if __CUDA_ARCH__ >= 900
  using S = Sizes<kN8, kGroups>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % n_ranks, cluster = blockIdx.x / n_ranks;
  const int n_clusters = gridDim.x / n_ranks, slice = rank * kWarps + warp;
  const bool has_slice = slice * kSliceK < p.K;
  const int M = static_cast<int>(p.M);
  const uint32_t row_bytes = static_cast<uint32_t>(p.K / 2);
  const uint32_t scale_row_bytes = static_cast<uint32_t>(p.n_groups) * 2;
  const int64_t n_begin = p.N * cluster / n_clusters;
  const int n_rows = static_cast<int>(p.N * (cluster + 1) / n_clusters - n_begin);
  const int n_strips = (n_rows + kStrip - 1) / kStrip;

  uint8_t* const ring = shared + warp * kStages * S::kStage;
  uint8_t* const places = shared + kWarps * kStages * S::kStage;
  uint8_t* const place = places + warp * S::kPlace;
  float* const factors = reinterpret_cast<float*>(places + kWarps * S::kPlace + warp * S::kFactors);
  const uint8_t* const inbox = shared + S::kAllWarps;  // [turn of this rank][rank][m][kTurn]
  if (n_ranks > 1) cluster_arrive_relaxed();

  // ---- load_weights: strips in order ----
  // Columns beyond the last are left as they are: they end in sums that nobody stores.
  const uint32_t ring_address = shared_address(ring);
  const int copy_r = lane / 8,
            copy_c = lane % 8;  // rows copy_r + 4i; the swizzle: unit c ^ (row % 8)
  const uint32_t copy_even = ring_address + copy_r * 128 + (copy_c ^ copy_r) * 16;
  const uint32_t copy_odd = ring_address + copy_r * 128 + (copy_c ^ (copy_r + 4)) * 16;
  const uint32_t copy_scales = ring_address + S::kTile + lane * S::kScales;
  const uint8_t* weights_from =
      p.qdata + (n_begin + copy_r) * row_bytes + slice * (kSliceK / 2) + copy_c * 16;
  const uint8_t* scales_from = static_cast<const uint8_t*>(p.scale) +
                               (n_begin + lane) * scale_row_bytes + slice * S::kScales;
  int rows_left = has_slice ? n_rows : 0;  // to load
  const auto load_weights = [&](uint32_t slot) {
    const uint8_t* from = weights_from;
#pragma unroll
    for (int i = 0; i < kStrip / 4; ++i) {
      if (copy_r + 4 * i < rows_left) {
        cp_async_16((i % 2 == 0 ? copy_even : copy_odd) + slot + i * 512, from);
      }
      from += 4 * row_bytes;
    }
    if (lane < min(rows_left, kStrip)) {
      if constexpr (S::kScales == 16) {
        cp_async_16(copy_scales + slot, scales_from);
      } else if constexpr (S::kScales == 8) {
        cp_async_l1_up_to<8>(copy_scales + slot, scales_from, 8);
      } else {
        cp_async_4(copy_scales + slot, scales_from);
      }
    }
    cp_async_commit();
    weights_from = from;
    scales_from += kStrip * scale_row_bytes;
    rows_left -= kStrip;
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load_weights(stage * S::kStage);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();  // nothing above reads what kernels write

  // ---- load_activation: through shared memory to B fragments; tokens beyond M reach no other token ----
  uint32_t code[kN8][kChunks][2];  // words of even k, of odd k
  {
    uint4 unit[4 * kN8] = {}, parameter[kN8] = {};
    if (has_slice) {
#pragma unroll
      for (int i = 0; i < 4 * kN8; ++i) {
        const int row = copy_r + 4 * i, plane = row / (8 * kN8), m = row % (8 * kN8);
        if (m >= M) continue;
        unit[i] = load_global_early_v4(p.a + m * p.K + plane * row_bytes + slice * (kSliceK / 2) +
                                       copy_c * 16);
      }
#pragma unroll
      for (int b = 0; b < kN8; ++b) {
        parameter[b] =
            load_global_early_v4(p.parameter + (slice * kChunks + g) * p.n_tokens + 8 * b + 2 * t);
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kN8; ++i) {
      const int row = copy_r + 4 * i;
      *reinterpret_cast<uint4*>(place + row * 128 + (copy_c ^ (row % 8)) * 16) = unit[i];
    }
#pragma unroll
    for (int b = 0; b < kN8; ++b) {
      *reinterpret_cast<float2*>(factors + (g * kN8 + b) * 8 + 2 * t) = {
          __uint_as_float(parameter[b].x), __uint_as_float(parameter[b].z)};
    }
    __syncwarp();
    const uint32_t place_address = shared_address(place);
#pragma unroll
    for (int b = 0; b < kN8; ++b) {
#pragma unroll
      for (int pair = 0; pair < kChunks / 2; ++pair) {
        uint32_t words[4];  // even, odd k of one chunk, then of the other
        const int row = lane / 8 % 2 * 8 * kN8 + 8 * b + lane % 8;
        ldmatrix_x4(words, place_address + row * 128 + ((2 * pair + lane / 16) ^ (row % 8)) * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) code[b][2 * pair + i / 2][i % 2] = words[i];
      }
    }
    __syncwarp();
  }
  float* const sums = reinterpret_cast<float*>(place) + 2 * t * kStride + g;
  if (!has_slice) {  // adds nothing, in either place of sums
    for (int i = lane; i < 2 * S::kSums / 4; i += 32) reinterpret_cast<float*>(place)[i] = 0.f;
  }
  if (n_ranks > 1) cluster_wait();  // all blocks have started: they can be stored to

  // An int32 dot started at these bits is, read as a float, the origin plus the dot.
  constexpr int32_t kDotOriginBits = 0x4b400000;  // 1.5 * 2^23
  constexpr float kDotOrigin = 12582912.f;
  const int32_t origin[4] = {kDotOriginBits, kDotOriginBits, kDotOriginBits, kDotOriginBits};
  const uint32_t matrix_address =
      ring_address + lane % 16 * 128 + (lane / 16 ^ (lane % 8)) * 16;  // of pair 0
  const float2* const factor = reinterpret_cast<const float2*>(factors) + t;
  // What this thread adds up: column `turn_r` of a turn, row `warp / 2` of each 8, every second warp.
  const int turn_r = warp % 2 * kStrip + lane % 16;
  const float* const added = reinterpret_cast<const float*>(places) + lane / 16 * (S::kPlace / 4) +
                             warp / 2 * kStride + turn_r;
  const uint32_t sent = shared_address(inbox) + (warp / 2 * kTurn + turn_r) * 4;
  const auto store = [&](int m, int r, float value) {
    if (r >= n_rows || m >= M) return;
    if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n_begin + r);
    store_from_float(p.dtype, p.y, m * p.N + n_begin + r, value);
  };

  uint32_t slot = 0;
  int adder = 0, adder_turn = 0;  // the block that adds up this turn, and which of its turns it is
  for (int strip = 0; strip < n_strips; ++strip) {
    const int half = strip % 2, buffer = strip / 2 % 2 * (S::kSums / 4);
    if (has_slice) {
      cp_async_wait<kStages - 1>();
      __syncwarp();  // the tile is there for all lanes
      uint32_t scale_words[2][(kGroups + 1) / 2], words[kChunks / 2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint8_t* at = ring + slot + S::kTile + (g + 8 * h) * S::kScales;
#pragma unroll
        for (int i = 0; i < (kGroups + 1) / 2; ++i) {
          scale_words[h][i] = reinterpret_cast<const uint32_t*>(at)[i];
        }
      }
#pragma unroll
      for (int pair = 0; pair < kChunks / 2; ++pair) {
        ldmatrix_x4(words[pair], (matrix_address + slot) ^ (pair * 32));
      }
      __syncwarp();  // it has been read
      load_weights(slot);
      slot = slot == 0 ? S::kStage : 0;

      // ---- mma ----
      float sum[kN8][4] = {}, group_sum[kN8][4];
      constexpr int kPer = kChunks / kGroups;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint32_t w0 = words[c / 2][c % 2 * 2], w1 = words[c / 2][c % 2 * 2 + 1];
        const uint32_t weights[4] = {signed_low_nibbles(w0), signed_low_nibbles(w1),
                                     signed_high_nibbles(w0), signed_high_nibbles(w1)};
#pragma unroll
        for (int b = 0; b < kN8; ++b) {
          const float2 s_x = factor[(c * kN8 + b) * 4];
          int32_t dot[4];
          mma_m16n8k32_s8_s8(dot, weights, {code[b][c][0], code[b][c][1]}, origin);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float value = __int_as_float(dot[e]) - kDotOrigin, s = e % 2 == 0 ? s_x.x : s_x.y;
            group_sum[b][e] = c % kPer == 0 ? value * s : fmaf(value, s, group_sum[b][e]);
          }
        }
        if (c % kPer < kPer - 1) continue;
        const int group = c / kPer;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float scale = half_of<T>(scale_words[e / 2][group / 2], group % 2 == 1);
#pragma unroll
          for (int b = 0; b < kN8; ++b) sum[b][e] = fmaf(scale, group_sum[b][e], sum[b][e]);
        }
      }
#pragma unroll
      for (int b = 0; b < kN8; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[buffer + half * kStrip + (8 * b + e % 2) * kStride + e / 2 * 8] = sum[b][e];
        }
      }
    }
    if (half == 0 && strip + 1 < n_strips) continue;

    // ---- reduce over the warps ----
    __syncthreads();  // the other buffer has been read, too
#pragma unroll
    for (int b = 0; b < kN8; ++b) {
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; w += 2) {
        value += added[buffer + w * (S::kPlace / 4) + 8 * b * kStride];
      }
      value = (value + __shfl_xor_sync(0xffffffffu, value, 16)) * kNibbleUnit;
      if (lane >= 16) continue;
      if (n_ranks == 1) {
        store(8 * b + warp / 2, strip / 2 * kTurn + turn_r, value);
      } else {
        const uint32_t to = sent + (adder_turn * n_ranks + rank) * S::kSent + 8 * b * kTurn * 4;
        store_cluster(address_in_rank(to, adder), value);
      }
    }
    if (++adder == n_ranks) {
      adder = 0;
      ++adder_turn;
    }
  }
  if (n_ranks == 1) return;

  // ---- reduce over the cluster ----
  cluster_arrive();
  cluster_wait();
  const int n_turns = ((n_strips + 1) / 2 - rank + n_ranks - 1) / n_ranks;  // of this block
  for (int i = warp; i < n_turns * kN8 * 8; i += kWarps) {
    const int turn = i / (kN8 * 8), m = i % (kN8 * 8);
    float value = 0.f;
    for (int from = 0; from < n_ranks; ++from) {
      value += reinterpret_cast<const float*>(
          inbox)[((turn * n_ranks + from) * kN8 * 8 + m) * kTurn + lane];
    }
    store(m, (turn * n_ranks + rank) * kTurn + lane, value);
  }
#endif
}

template <int kN8, int kGroups, typename T>
cudaError_t launch(const W4A8Args& args, int n_sms, cudaStream_t stream, bool* is_done) {
  using S = Sizes<kN8, kGroups>;
  int n_ranks = 1;
  while (args.K > int64_t{n_ranks} * kWarps * kSliceK) n_ranks *= 2;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(n_ranks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;

  const auto kernel = matvec_w4a8_slices_kernel<kN8, kGroups, T>;
  int device = 0, limit = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return code;
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (code != cudaSuccess) return code;
  int n_clusters = n_sms;
  if (n_ranks > 1) {  // a multiprocessor has room for one block, whatever is sent
    config.gridDim = dim3(static_cast<unsigned>(n_sms / n_ranks * n_ranks));
    config.dynamicSmemBytes = S::kAllWarps;
    code = cudaOccupancyMaxActiveClusters(&n_clusters, kernel, &config);
    if (code != cudaSuccess) return code;
    if (n_clusters == 0) return cudaSuccess;
  }
  const int64_t columns = (args.N + n_clusters - 1) / n_clusters;
  const int64_t turns = (columns + kTurn - 1) / kTurn;
  const int64_t sent = n_ranks > 1 ? (turns + n_ranks - 1) / n_ranks * n_ranks * S::kSent : 0;
  if (S::kAllWarps + sent > limit) return cudaSuccess;
  config.gridDim = dim3(static_cast<unsigned>(n_clusters * n_ranks));
  config.dynamicSmemBytes = static_cast<size_t>(S::kAllWarps + sent);
  config.numAttrs = args.constant_weights ? 2 : 1;
  *is_done = true;
  return cudaLaunchKernelEx(&config, kernel, args, n_ranks);
}

template <int kN8, typename T>
cudaError_t choose_groups(const W4A8Args& args, int n_sms, cudaStream_t stream, bool* is_done) {
  if (args.group_size == 32) return launch<kN8, 8, T>(args, n_sms, stream, is_done);
  if (args.group_size == 64) return launch<kN8, 4, T>(args, n_sms, stream, is_done);
  return launch<kN8, 2, T>(args, n_sms, stream, is_done);
}

template <typename T>
cudaError_t choose_rows(const W4A8Args& args, int n_sms, cudaStream_t stream, bool* is_done) {
  return args.M <= 8 ? choose_groups<1, T>(args, n_sms, stream, is_done)
                     : choose_groups<2, T>(args, n_sms, stream, is_done);
}

}  // namespace

cudaError_t launch_matvec_w4a8_slices(const W4A8Args& args, cudaStream_t stream, bool* is_done) {
  *is_done = false;
  const int n_sms = hopper_multiprocessors();
  if (n_sms == 0 || args.M <= 2 || args.M > 16 || args.zero_point != nullptr) return cudaSuccess;
  if (args.K % kSliceK != 0 || args.K > int64_t{kMaxRanks} * kWarps * kSliceK) return cudaSuccess;
  if (args.group_size != 32 && args.group_size != 64 && args.group_size != 128) return cudaSuccess;
  if (reinterpret_cast<uintptr_t>(args.scale) % 16 != 0) return cudaSuccess;
  if (args.scale_dtype == DType::kBFloat16) {
    return choose_rows<__nv_bfloat16>(args, n_sms, stream, is_done);
  }
  if (args.scale_dtype == DType::kFloat16) return choose_rows<__half>(args, n_sms, stream, is_done);
  return cudaSuccess;
}

}  // namespace cuda_int4
