// matmul_w4a8_mma -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                    zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size;  many rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h, M > 2       16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              dtype
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      a block of kRowWarps x kTokenWarps warps per tile of kRows columns n x kTokens rows m;
//           rows m fastest, so that blocks that run together share weights
// Bytes     reads qdata once per kTokens rows m, a once per kRows columns n; bound by the fp32 work
//           per 32 k (below), not by memory, from M = 64 or so
// Numerics  exact int32 dot per 32 k, the rest in fp32 in the order of k, one rounding at the store
// Source    own. The weights are the A operand of mma.m16n8k32 (its rows are n), so that 16 bytes of
//           a row, one group of 32 k, are one ldmatrix row: lane t of a quad gets word t, whose low
//           nibbles are 4 even k and whose high nibbles are 4 odd k, and the B operand takes the
//           same words from the even and odd planes of a
#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kStages = 3;
constexpr int kChunks = 4;                 // groups of 32 k in a stage
constexpr int kRowBytes = 16 * kChunks;    // of qdata in a stage, per column n
constexpr int kTokenBytes = 32 * kChunks;  // of a in a stage, per row m
constexpr float kIntegerOrigin =
    12582912.f;  // 1.5 * 2^23: as an int32 plus i, it is the float plus i
constexpr int32_t kIntegerOriginBits = 0x4b400000;

// One stage of the ring in shared memory. Units of 16 bytes are swizzled so that the 8 rows of an
// ldmatrix lie in different banks.
template <int kRows, int kTokens, bool kZero>
struct Stage {
  uint8_t qdata[kRows * kRowBytes];     // unit c of row r at c ^ (r / 2 % 4)
  uint8_t a[kTokens * kTokenBytes];     // unit u of token m at u ^ (m % 8); u = 4 * odd + c
  float2 parameter[kChunks * kTokens];  // [c][m]: s_x, sum as int
  float scale[kChunks * kRows];         // [c][r]
  float zero[kZero ? kChunks * kRows : 4];
};

template <int kRowWarps, int kTokenWarps, int kN8, bool kZero>
__global__ void __launch_bounds__(32 * kRowWarps * kTokenWarps,
                                  256 / (16 * kRowWarps * kTokenWarps))
    matmul_w4a8_mma_kernel(W4A8Args p, int group_shift, unsigned token_tiles) {
  constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  constexpr int kRows = 32 * kRowWarps, kTokens = 8 * kN8 * kTokenWarps;
  using S = Stage<kRows, kTokens, kZero>;
  extern __shared__ __align__(128) uint8_t shared[];
  S* stages = reinterpret_cast<S*>(shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % kRowWarps, token_warp = warp / kRowWarps;
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup),
            n_groups = static_cast<int>(p.n_groups);
  const int64_t m0 = int64_t{blockIdx.x % token_tiles} * kTokens;
  const int64_t n0 = int64_t{blockIdx.x / token_tiles} * kRows;
  const int n_steps = (n_k32 + kChunks - 1) / kChunks;

  // ---- load_tile ----
  constexpr int kScales = (kRows * kChunks + kThreads - 1) / kThreads;  // of a thread
  float scale[kScales], zero[kScales];
  const auto load_scales = [&](int step) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int at = threadIdx.x + i * kThreads, r = at % kRows, j = step * kChunks + at / kRows;
      scale[i] = zero[i] = 0.f;
      if (at >= kRows * kChunks || n0 + r >= p.N || j >= n_k32) continue;
      const int64_t group = (n0 + r) * n_groups + (j >> group_shift);
      scale[i] = load_as_float(p.scale_dtype, p.scale, group);
      if (kZero) zero[i] = load_as_float(p.zero_point_dtype, p.zero_point, group);
    }
  };
  const auto store_scales = [&](int step) {
    S& stage = stages[step % kStages];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at >= kRows * kChunks) continue;
      stage.scale[at] = scale[i];
      if (kZero) stage.zero[at] = zero[i];
    }
  };
  // A thread copies the same unit of rows and of tokens that lie kThreads / units apart.
  const int copy_c = threadIdx.x % kChunks, copy_r = threadIdx.x / kChunks;
  const int copy_u = threadIdx.x % (2 * kChunks), copy_m = threadIdx.x / (2 * kChunks);
  constexpr int kRowStep = kThreads / kChunks, kTokenStep = kThreads / (2 * kChunks);
  static_assert(kRowStep % 8 == 0 && kTokenStep % 8 == 0,
                "the swizzle is the same for all of them");
  const uint8_t* q_from = p.qdata + (n0 + copy_r) * (p.K / 2) + copy_c * 16;
  const int8_t* a_from =
      p.a + (m0 + copy_m) * p.K + copy_u / kChunks * (p.K / 2) + copy_u % kChunks * 16;
  const uint32_t q_to = copy_r * kRowBytes + (copy_c ^ (copy_r / 2 % 4)) * 16;
  const uint32_t a_to = copy_m * kTokenBytes + (copy_u ^ (copy_m % 8)) * 16;
  const int rows_left = static_cast<int>(min(p.N - n0, int64_t{kRows})) - copy_r;
  const int tokens_left = static_cast<int>(min(p.M - m0, int64_t{kTokens})) - copy_m;
  const auto copy_tile = [&](int step) {
    S& stage = stages[step % kStages];
    const uint32_t qdata = shared_address(stage.qdata) + q_to, a = shared_address(stage.a) + a_to;
    const int first = step * kChunks;  // group of 32 k
    const bool c_here = first + copy_c < n_k32, u_here = first + copy_u % kChunks < n_k32;
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const bool here = c_here && i * kRowStep < rows_left;
      const uint8_t* from = q_from + (int64_t{i * kRowStep} * (p.K / 2) + first * 16);
      cp_async_16_or_zero(qdata + i * kRowStep * kRowBytes, here ? from : p.qdata, here);
    }
#pragma unroll
    for (int i = 0; i < kTokens / kTokenStep; ++i) {
      const bool here = u_here && i * kTokenStep < tokens_left;
      const int8_t* from = a_from + (i * kTokenStep * p.K + first * 16);
      cp_async_16_or_zero(a + i * kTokenStep * kTokenBytes, here ? from : p.a, here);
    }
    const uint32_t parameter = shared_address(stage.parameter);
#pragma unroll
    for (int i = threadIdx.x; i < kChunks * kTokens / 2; i += kThreads) {
      const int c = i / (kTokens / 2), m = i % (kTokens / 2) * 2;
      const bool here = m0 + m < p.n_tokens && first + c < n_k32;
      const int64_t from = here ? int64_t{first + c} * p.n_tokens + m0 + m : 0;
      cp_async_16_or_zero(parameter + (c * kTokens + m) * 8, p.parameter + from, here);
    }
  };

  float sum[2][kN8][4] = {};
  const int32_t origin[4] = {kIntegerOriginBits, kIntegerOriginBits, kIntegerOriginBits,
                             kIntegerOriginBits};

  // ---- mma, 32 k at a time; sums in fp32 ----
  const auto compute = [&](int step) {
    const S& stage = stages[step % kStages];
    const uint32_t qdata = shared_address(stage.qdata), a = shared_address(stage.a);
#pragma unroll 1  // 4 times the code would hoist addresses into more registers than there are
    for (int c = 0; c < kChunks; ++c) {
      uint32_t weights[2][4];
      float scales[2][2], zeros[2][2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int r0 = row_warp * 32 + s * 16;
        uint32_t words[2];
        const int r = r0 + lane % 16;
        ldmatrix_x2(words, qdata + r * kRowBytes + (c ^ (r / 2 % 4)) * 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weights[s][h] = words[h] & 0x0f0f0f0fu;
          weights[s][2 + h] = (words[h] >> 4) & 0x0f0f0f0fu;
          scales[s][h] = stage.scale[c * kRows + r0 + g + 8 * h];
          zeros[s][h] = kZero ? stage.zero[c * kRows + r0 + g + 8 * h] : 0.f;
        }
      }
#pragma unroll
      for (int b2 = 0; b2 < kN8; b2 += 2) {
        uint32_t codes[4];
        const int m = (token_warp * kN8 + b2) * 8 + lane % 8 + lane / 16 * 8;
        const int u = lane / 8 % 2 * kChunks + c;
        ldmatrix_x4(codes, a + m * kTokenBytes + (u ^ (m % 8)) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = (token_warp * kN8 + b2 + i) * 8 + 2 * t;
          const float4 parameter =
              *reinterpret_cast<const float4*>(stage.parameter + c * kTokens + token);
          const float s_x[2] = {parameter.x, parameter.z};
          const float sums[2] = {static_cast<float>(__float_as_int(parameter.y)),
                                 static_cast<float>(__float_as_int(parameter.w))};
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            int32_t dot[4];
            mma_m16n8k32_u8_s8(dot, weights[s], {codes[2 * i], codes[2 * i + 1]}, origin);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float centred;
              if (kZero) {
                centred = __int_as_float(dot[e]) - kIntegerOrigin;
                centred = fmaf(-zeros[s][e / 2], sums[e % 2], centred);
              } else {
                // exact: both are integers below 2^24
                centred = __int_as_float(dot[e]) - fmaf(8.f, sums[e % 2], kIntegerOrigin);
              }
              sum[s][b2 + i][e] = fmaf(scales[s][e / 2] * s_x[e % 2], centred, sum[s][b2 + i][e]);
            }
          }
        }
      }
    }
  };

  load_scales(0);
  copy_tile(0);
  cp_async_commit();
  store_scales(0);
  if (n_steps > 1) {
    load_scales(1);
    copy_tile(1);
    store_scales(1);
  }
  cp_async_commit();
  for (int step = 0; step < n_steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is there for all; the stage of the step before is free
    const bool more = step + kStages - 1 < n_steps;
    if (more) {
      load_scales(step + kStages - 1);
      copy_tile(step + kStages - 1);
    }
    cp_async_commit();
    compute(step);
    if (more) store_scales(step + kStages - 1);
  }

  // ---- store: through shared memory, so that n runs along the lanes ----
  cp_async_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(shared);  // [kTokens][kRows + 4]
  constexpr int kStride = kRows + 4;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int b = 0; b < kN8; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = (token_warp * kN8 + b) * 8 + 2 * t + e % 2;
        tile[m * kStride + row_warp * 32 + s * 16 + g + 8 * (e / 2)] = sum[s][b][e];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
    const int64_t m = m0 + i / kRows, n = n0 + i % kRows;
    if (m >= p.M || n >= p.N) continue;
    float value = tile[i / kRows * kStride + i % kRows];
    if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
    store_from_float(p.dtype, p.y, m * p.N + n, value);
  }
}

template <int kRowWarps, int kTokenWarps, int kN8, bool kZero>
cudaError_t launch(const W4A8Args& args, cudaStream_t stream) {
  constexpr int kRows = 32 * kRowWarps, kTokens = 8 * kN8 * kTokenWarps;
  constexpr int kRingBytes = kStages * static_cast<int>(sizeof(Stage<kRows, kTokens, kZero>));
  constexpr int kTileBytes = kTokens * (kRows + 4) * 4;
  constexpr int kBytes = kRingBytes > kTileBytes ? kRingBytes : kTileBytes;
  const auto kernel = matmul_w4a8_mma_kernel<kRowWarps, kTokenWarps, kN8, kZero>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = (args.N + kRows - 1) / kRows;
  const unsigned token_tiles = static_cast<unsigned>((args.M + kTokens - 1) / kTokens);
  kernel<<<static_cast<unsigned>(row_tiles * token_tiles), 32 * kRowWarps * kTokenWarps, kBytes,
           stream>>>(args, w4a8_group_shift(args), token_tiles);
  return cudaGetLastError();
}

template <bool kZero>
cudaError_t choose(const W4A8Args& args, cudaStream_t stream) {
  if (args.M <= 32) return launch<2, 2, 2, kZero>(args, stream);
  if (args.M <= 64) return launch<2, 2, 4, kZero>(args, stream);
  return launch<4, 2, 8, kZero>(args, stream);
}

}  // namespace

cudaError_t launch_matmul_w4a8_mma(const W4A8Args& args, cudaStream_t stream) {
  return args.zero_point == nullptr ? choose<false>(args, stream) : choose<true>(args, stream);
}

}  // namespace cuda_int4
