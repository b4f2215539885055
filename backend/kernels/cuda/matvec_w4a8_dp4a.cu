// matvec_w4a8_dp4a -- y[n] = sum_g s_x[j] * scale[n, g] * sum_k a[k] * (q[n, k] - zero_point[n, g])
//                     + bias[n],  j = k / 32, g = k / group_size;  one row m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h              16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              dtype
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [1, N]            row-major                              dtype
//
// Requires  M == 1, K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (validate_linear)
// Grid      one warp per kRows columns n, or a grid that stays and takes them in strides
//           (kHeldX); a lane takes groups of 32 k, 16 bytes, that lie 32 groups apart
// Bytes     reads N*K/2 + N*n_groups scales and zero points once, bound by them; a once per warp
//           (L1), or once per lane (kHeldX)
// Numerics  exact int32 dot per 32 k, the rest in fp32 in a fixed order, one rounding at the store
// Source    own; all loads of kSteps * kRows groups are in flight before the first is used. High
//           nibbles are multiplied where they are and the dot shifted once
#include <algorithm>

#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;

// A scale or zero point as it lies in memory, in the low bits. kNarrow: it has 16 bits.
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

// What a lane needs of x for one group of 32 k.
struct Activation {
  uint4 even, odd;
  uint2 parameter;  // bits of s_x, sum

  __device__ __forceinline__ void load(const W4A8Args& p, int j, int n_k32) {
    even = load_global_v4(p.a + int64_t{j} * 16);
    odd = load_global_v4(p.a + (int64_t{n_k32} + j) * 16);
    parameter = load_global_v2(p.parameter + j);
  }
};

// kHeldX: a lane's groups of every column are those of its kSteps activations, which it keeps.
template <int kRows, int kSteps, int kMinBlocks, bool kHeldX, bool kZero, bool kNarrow>
__global__ void __launch_bounds__(32 * kWarps, kMinBlocks)
    matvec_w4a8_dp4a_kernel(W4A8Args p, int group_shift) {
  const int lane = threadIdx.x % 32, row_bytes = static_cast<int>(p.K / 2);
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup);
  const int n_groups = static_cast<int>(p.K / p.group_size);
  const uint32_t N = static_cast<uint32_t>(p.N), stride = gridDim.x * kWarps * kRows;
  uint32_t n0 = (blockIdx.x * kWarps + threadIdx.x / 32) * kRows;
  if (n0 >= N) return;  // the whole warp

  // ---- load ----
  uint4 q[kRows][kSteps];
  uint32_t scale[kRows][kSteps], zero[kRows][kSteps];
  const auto load = [&](uint32_t n, int r, int j, int step) {
    if (n + r >= N || j >= n_k32) {
      q[r][step] = {};
      scale[r][step] = zero[r][step] = 0;
      return;
    }
    q[r][step] = load_global_once_v4(p.qdata + (int64_t{n + r} * row_bytes + j * 16));
    const int64_t group = int64_t{n + r} * n_groups + (j >> group_shift);
    scale[r][step] = load_bits<kNarrow>(p.scale_dtype, p.scale, group);
    if (kZero) zero[r][step] = load_bits<kNarrow>(p.zero_point_dtype, p.zero_point, group);
  };
  Activation held[kHeldX ? kSteps : 1];
  if (kHeldX) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) load(n0, r, step * 32 + lane, step);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      held[step].load(p, min(step * 32 + lane, n_k32 - 1), n_k32);
    }
  }

  do {
    float sum[kRows] = {};
    for (int j0 = 0; j0 < (kHeldX ? 1 : n_k32); j0 += 32 * kSteps) {
      if (!kHeldX) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) load(n0, r, j0 + step * 32 + lane, step);
        }
      }
      // ---- dot, 32 k at a time; sums in fp32 ----
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Activation x;
        if (kHeldX) {
          x = held[step];
        } else {
          x.load(p, min(j0 + step * 32 + lane, n_k32 - 1), n_k32);
        }
        const uint32_t evens[4] = {x.even.x, x.even.y, x.even.z, x.even.w};
        const uint32_t odds[4] = {x.odd.x, x.odd.y, x.odd.z, x.odd.w};
        const float s_x = __uint_as_float(x.parameter.x);
        const int32_t x_sum = static_cast<int32_t>(x.parameter.y);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t words[4] = {q[r][step].x, q[r][step].y, q[r][step].z, q[r][step].w};
          const float s = float_of_bits<kNarrow>(p.scale_dtype, scale[r][step]);
          const float z = kZero ? float_of_bits<kNarrow>(p.zero_point_dtype, zero[r][step]) : 0.f;
          if (kHeldX && n0 + stride < N)
            load(n0 + stride, r, step * 32 + lane, step);  // the next columns
          int32_t low = kZero ? 0 : -8 * x_sum, high = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            low = dp4a_u8_s8(words[i] & 0x0f0f0f0fu, evens[i], low);
            high = dp4a_u8_s8(words[i] & 0xf0f0f0f0u, odds[i], high);
          }
          float dot = static_cast<float>(low + (high >> 4));  // high is a multiple of 16
          if (kZero) dot = fmaf(-z, static_cast<float>(x_sum), dot);
          sum[r] = fmaf(s * s_x, dot, sum[r]);
        }
      }
    }
    // ---- reduce and store ----
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float value = warp_sum(sum[r]);
      const uint32_t n = n0 + r;
      if (lane != 0 || n >= N) continue;
      if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
      store_from_float(p.dtype, p.y, n, value);
    }
    n0 += stride;
  } while (kHeldX && n0 < N);
}

template <int kRows, int kSteps, int kMinBlocks, bool kHeldX, bool kZero, bool kNarrow>
cudaError_t launch(const W4A8Args& args, int64_t max_blocks, cudaStream_t stream) {
  constexpr int kBlockRows = kWarps * kRows;
  const int64_t blocks = std::min((args.N + kBlockRows - 1) / kBlockRows, max_blocks);
  matvec_w4a8_dp4a_kernel<kRows, kSteps, kMinBlocks, kHeldX, kZero, kNarrow>
      <<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(args, w4a8_group_shift(args));
  return cudaGetLastError();
}

template <bool kZero>
cudaError_t choose(const W4A8Args& args, cudaStream_t stream) {
  constexpr int64_t kAnyBlocks = int64_t{1} << 30;
  constexpr int64_t kLongRun = int64_t{64} << 20;  // weights from which a grid that stays pays
  if (args.scale_dtype == DType::kFloat32 || args.zero_point_dtype == DType::kFloat32) {
    return launch<1, 4, 8, false, kZero, false>(args, kAnyBlocks, stream);
  }
  const int64_t n_k32 = args.K / kQuantizedGroup;
  if (n_k32 <= 6 * 32 && args.N * args.K >= kLongRun) {
    int device = 0, n_sms = 0;
    cudaGetDevice(&device);
    const cudaError_t error =
        cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    if (n_k32 <= 4 * 32) return launch<2, 4, 4, true, kZero, true>(args, n_sms * 4, stream);
    return launch<1, 6, 4, true, kZero, true>(args, n_sms * 4, stream);
  }
  // Steps of 7 or 4 groups of 32 k a lane, whichever leaves fewer lanes idle at the end of a row.
  const auto slots = [&](int64_t steps) { return (n_k32 + 32 * steps - 1) / (32 * steps) * steps; };
  return slots(7) <= slots(4)
             ? launch<1, 7, kZero ? 6 : 8, false, kZero, true>(args, kAnyBlocks, stream)
             : launch<1, 4, 8, false, kZero, true>(args, kAnyBlocks, stream);
}

}  // namespace

cudaError_t launch_matvec_w4a8_dp4a(const W4A8Args& args, cudaStream_t stream) {
  return args.zero_point == nullptr ? choose<false>(args, stream) : choose<true>(args, stream);
}

}  // namespace cuda_int4
