// matmul_w4a8_wgmma -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                      zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size;  many rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h, M > 2       16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              dtype
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  M > 2, K % 32 == 0, group_size % 32 == 0, K % group_size == 0 (validate_linear); sm_90a
// Grid      a block per tile of 128 columns n x kTokens rows m, rows m fastest; two warpgroups of 64 n
// Bytes     reads qdata once per kTokens rows m, a once per 128 columns n (L2); bound by what an
//           int32 sum of 32 k costs: a conversion, a product of scales, a multiply-add
// Numerics  exact int32 dot per 32 k, the rest in fp32 in the order of k, one rounding at the store
// Source    own. Weights are the A operand of an int8 wgmma, from registers: lane t of a quad holds
//           word t of 16 bytes, 4 even k and 4 odd k, and in shared memory 16 even k of a row of a
//           are followed by their 16 odd k
#include "ptx.cuh"
#include "w4a8.cuh"

#pragma nv_diag_suppress 177  // below sm_90a the kernel is empty, and what it calls unused

namespace cuda_int4 {

namespace {

constexpr int kRows = 128;  // columns n of a tile
constexpr int kChunks = 4;  // groups of 32 k in a stage
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kRowBytes = 16 * kChunks;  // of codes
constexpr int kStride = kRows + 4;       // of the tile of sums, in floats

template <int kTokens>
struct Stage {
  uint8_t a[kTokens * 128];           // 16-byte unit u of row m is at u ^ (m % 8)
  uint8_t qdata[kRows * kRowBytes];   // unit c of row r is at c ^ (r / 2 % 4)
  uint2 parameter[kChunks][kTokens];  // bits of s_x, sum
};

template <int kTokens>
constexpr int kSharedBytes = 1024 + kStages * static_cast<int>(sizeof(Stage<kTokens>));

__device__ __forceinline__ void multiply(int32_t (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  wgmma_m64n32k32_s8(d, a, b, false);
}
__device__ __forceinline__ void multiply(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  wgmma_m64n64k32_s8(d, a, b, false);
}

// A scale or zero point as it lies in memory. kNarrow: it has 16 bits.
template <bool kNarrow>
__device__ __forceinline__ uint32_t load_bits(DType dtype, const void* from, int64_t i) {
  if (!kNarrow && dtype == DType::kFloat32) {
    return load_global_u32(static_cast<const uint32_t*>(from) + i);
  }
  return load_global_u16(static_cast<const uint16_t*>(from) + i);
}

template <bool kNarrow>
__device__ __forceinline__ float float_of_bits(DType dtype, uint32_t bits) {
  if (!kNarrow && dtype == DType::kFloat32) return __uint_as_float(bits);
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return dtype == DType::kBFloat16 ? __uint_as_float(bits << 16) : half;
}

template <int kTokens, bool kZero, bool kNarrow>
__global__ void __launch_bounds__(kThreads, 2)
    matmul_w4a8_wgmma_kernel(W4A8Args p, int group_shift, unsigned token_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const uint32_t aligned = (shared_address(shared) + 1023) / 1024 * 1024;
  uint8_t* base = shared + (aligned - shared_address(shared));
  constexpr int kStageBytes = sizeof(Stage<kTokens>);
  constexpr int kQdataAt = kTokens * 128, kParameterAt = kQdataAt + kRows * kRowBytes;
  static_assert(kStageBytes % 1024 == 0, "the next stage lies on 1024 bytes too");
  static_assert(kTokens * kStride * 4 <= kStages * kStageBytes, "the sums fit into the stages");

  const int64_t m0 = int64_t{blockIdx.x % token_tiles} * kTokens;
  const int64_t n0 = int64_t{blockIdx.x / token_tiles} * kRows;
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup);
  const int n_steps = (n_k32 + kChunks - 1) / kChunks;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int r0 = thread / 32 * 16;  // of the warp

  // ---- load: codes; a and its parameters; what lies beyond N, M or K is 0 ----
  const int q_c = thread % kChunks, q_r = thread / kChunks;  // 64 rows further the same
  const uint8_t* const q_from = p.qdata + ((n0 + q_r) * (p.K / 2) + q_c * 16);
  const int64_t q_stride = kThreads / kChunks * (p.K / 2);
  const uint32_t q_to = aligned + kQdataAt + q_r * kRowBytes + (q_c ^ (q_r / 2 % 4)) * 16;
  const auto load_codes = [&](int step, int slot) {
    const uint8_t* from = q_from + step * kRowBytes;
    const uint32_t to = q_to + slot * kStageBytes;
    const int64_t rows = step * kChunks + q_c < n_k32 ? p.N - n0 - q_r : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kThreads / kChunks) {
      cp_async_16_or_zero(to + i * kRowBytes, i < rows ? from : p.qdata, i < rows);
      from += q_stride;
    }
  };
  const int u = thread % 8, a_m = thread / 8;  // unit of 16 bytes, row; 32 rows further the same
  const int8_t* const a_from = p.a + ((m0 + a_m) * p.K + u % 2 * (p.K / 2) + u / 2 * 16);
  const int64_t a_stride = kThreads / 8 * p.K;
  const uint32_t a_to = aligned + a_m * 128 + (u ^ (a_m % 8)) * 16;
  const int pair_c = thread / (kTokens / 2), pair_m = thread % (kTokens / 2) * 2;
  const bool pair_here = pair_c < kChunks && m0 + pair_m < p.n_tokens;
  const QuantizedParameter* const pair_from = p.parameter + (pair_c * p.n_tokens + m0 + pair_m);
  const int64_t pair_stride = kChunks * p.n_tokens;
  const uint32_t pair_to = aligned + kParameterAt + thread * 16;
  const auto load_activation = [&](int step, int slot) {
    const int8_t* from = a_from + step * kRowBytes;
    const int64_t rows = step * kChunks + u / 2 < n_k32 ? p.M - m0 - a_m : 0;
#pragma unroll
    for (int i = 0; i < kTokens; i += kThreads / 8) {
      cp_async_16_or_zero(a_to + slot * kStageBytes + i * 128, i < rows ? from : p.a, i < rows);
      from += a_stride;
    }
    if (pair_c < kChunks) {
      const bool here = pair_here && step * kChunks + pair_c < n_k32;
      cp_async_16_or_zero(pair_to + slot * kStageBytes,
                          here ? pair_from + step * pair_stride : p.parameter, here);
    }
  };
  // Scales of columns n0 + r0 + g and 8 further, of one group of 32 k.
  uint32_t scale_bits[2][kChunks], zero_bits[2][kChunks];
  int64_t scale_row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n = n0 + r0 + g + 8 * h;
    scale_row[h] = (n < p.N ? n : p.N - 1) * p.n_groups;
  }
  const auto load_scales = [&](int step, int c) {
    const int group = min(step * kChunks + c, n_k32 - 1) >> group_shift;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale_bits[h][c] = load_bits<kNarrow>(p.scale_dtype, p.scale, scale_row[h] + group);
      if (kZero) {
        zero_bits[h][c] =
            load_bits<kNarrow>(p.zero_point_dtype, p.zero_point, scale_row[h] + group);
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < n_steps) load_codes(s, s);
  }
  griddepcontrol_wait();  // nothing above reads what kernels write
  griddepcontrol_launch_dependents();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < n_steps) load_activation(s, s);
    cp_async_commit();
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) load_scales(0, c);

  int32_t dot[kTokens / 2];
  float sum[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.f;
  const uint32_t parameter_at = aligned + kParameterAt + 2 * t * 8;
  const uint32_t matrix_row = r0 + lane % 16;
  const uint32_t matrix_at = aligned + kQdataAt + matrix_row * kRowBytes;

  for (int step = 0, slot = 0; step < n_steps; ++step) {
    cp_async_wait<kStages - 2>();
    fence_proxy_async();  // wgmma reads what ordinary copies wrote
    __syncthreads();      // the stage is there for all; the one before has been read
    {
      const int ahead = step + kStages - 1, to = slot == 0 ? kStages - 1 : slot - 1;
      if (ahead < n_steps) {
        load_codes(ahead, to);
        load_activation(ahead, to);
      }
      cp_async_commit();
    }
    const uint64_t descriptor = wgmma_descriptor_swizzle_128(aligned + slot * kStageBytes);
    const uint32_t matrix = matrix_at + slot * kStageBytes;
    const uint32_t parameter = parameter_at + slot * kStageBytes;
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      uint32_t words[4];  // rows g and g + 8 of two chunks
      ldmatrix_x4(words, matrix + ((c + lane / 16) ^ (matrix_row / 2 % 4)) * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t w0 = words[2 * half], w1 = words[2 * half + 1];
        const uint32_t weights[4] = {signed_low_nibbles(w0), signed_low_nibbles(w1),
                                     signed_high_nibbles(w0), signed_high_nibbles(w1)};
        wgmma_fence();
        multiply(dot, weights, descriptor + (c + half) * 2);
        wgmma_commit_group();
        float scale[2], zero[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[h] = float_of_bits<kNarrow>(p.scale_dtype, scale_bits[h][c + half]);
          zero[h] = 0.f;
          if (kZero) {  // in the units of a dot
            const uint32_t bits = zero_bits[h][c + half];
            zero[h] = 128.f - 16.f * float_of_bits<kNarrow>(p.zero_point_dtype, bits);
          }
        }
        load_scales(min(step + 1, n_steps - 1), c + half);  // of the stage behind
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
          const uint4 pair = load_shared_v4(parameter + ((c + half) * kTokens + 8 * i) * 8);
          const float s_x[2] = {__uint_as_float(pair.x), __uint_as_float(pair.z)};
          const float x_sum[2] = {static_cast<float>(static_cast<int32_t>(pair.y)),
                                  static_cast<float>(static_cast<int32_t>(pair.w))};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float centred = static_cast<float>(dot[4 * i + e]);
            if (kZero) centred = fmaf(zero[e / 2], x_sum[e % 2], centred);
            sum[4 * i + e] = fmaf(scale[e / 2] * s_x[e % 2], centred, sum[4 * i + e]);
          }
        }
      }
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  // ---- store: through shared memory, so that n runs along the lanes ----
  cp_async_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(base);  // [kTokens][kStride]
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int m = i / 4 * 8 + 2 * t + i % 2;
    tile[m * kStride + r0 + g + i / 2 % 2 * 8] = sum[i] * kNibbleUnit;
  }
  __syncthreads();
  for (int i = thread; i < kTokens * kRows; i += kThreads) {
    const int64_t m = m0 + i / kRows, n = n0 + i % kRows;
    if (m >= p.M || n >= p.N) continue;
    float value = tile[i / kRows * kStride + i % kRows];
    if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
    store_from_float(p.dtype, p.y, m * p.N + n, value);
  }
#endif
}

template <int kTokens, bool kZero, bool kNarrow>
cudaError_t launch(const W4A8Args& args, cudaStream_t stream) {
  const auto kernel = matmul_w4a8_wgmma_kernel<kTokens, kZero, kNarrow>;
  constexpr int kBytes = kSharedBytes<kTokens>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = (args.N + kRows - 1) / kRows;
  const unsigned token_tiles = static_cast<unsigned>((args.M + kTokens - 1) / kTokens);
  return launch_w4a8(kernel, static_cast<unsigned>(row_tiles * token_tiles), kThreads, kBytes,
                     stream, args, w4a8_group_shift(args), token_tiles);
}

template <int kTokens>
cudaError_t choose(const W4A8Args& args, cudaStream_t stream) {
  const bool narrow =
      args.scale_dtype != DType::kFloat32 && args.zero_point_dtype != DType::kFloat32;
  if (args.zero_point == nullptr) {
    return narrow ? launch<kTokens, false, true>(args, stream)
                  : launch<kTokens, false, false>(args, stream);
  }
  return narrow ? launch<kTokens, true, true>(args, stream)
                : launch<kTokens, true, false>(args, stream);
}

}  // namespace

cudaError_t launch_matmul_w4a8_wgmma(const W4A8Args& args, cudaStream_t stream) {
  int device = 0, n_sms = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (code != cudaSuccess) return code;
  // Tiles of 64 rows m cost less for each row; where they would leave half of the multiprocessors
  // without a block, twice as many tiles are quicker.
  const int64_t tiles = (args.N + kRows - 1) / kRows * ((args.M + 63) / 64);
  return args.M <= 32 || 2 * tiles <= n_sms ? choose<32>(args, stream) : choose<64>(args, stream);
}

}  // namespace cuda_int4
