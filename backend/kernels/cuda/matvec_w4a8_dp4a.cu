// matvec_w4a8_dp4a -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                     zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size;  one or two rows m
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h              16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              dtype
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  M <= 2, K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (validate_linear)
// Grid      one warp per kRows columns n, or a grid that stays and takes them in strides
//           (kHeldX); a lane takes groups of 32 k, 16 bytes, that lie 32 groups apart
// Bytes     reads N*K/2 + N*n_groups scales and zero points once, bound by them; a once per warp
//           (L1), or once per lane (kHeldX)
// Numerics  exact int32 dot per 32 k, the rest in fp32 in a fixed order, one rounding at the store
// Source    own; all loads of kSteps * kRows groups are in flight before the first is used. High
//           nibbles are multiplied where they are and the dot shifted once. The first weights are asked
//           for before the kernel ahead has ended (kEarly: with W4A8Args::constant_weights)
#include <algorithm>

#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;

// A scale or zero point as it lies in memory, in the low bits. kNarrow: it has 16 bits.
// kEarly: asked for ahead of a griddepcontrol_wait.
template <bool kNarrow, bool kEarly>
__device__ __forceinline__ uint32_t load_bits(DType dtype, const void* from, int64_t i) {
  if (!kNarrow && dtype == DType::kFloat32) {
    const uint32_t* at = static_cast<const uint32_t*>(from) + i;
    return kEarly ? load_global_early_u32(at) : load_global_u32(at);
  }
  const uint16_t* at = static_cast<const uint16_t*>(from) + i;
  return kEarly ? load_global_early_u16(at) : load_global_u16(at);
}

template <bool kNarrow>
__device__ __forceinline__ float float_of_bits(DType dtype, uint32_t bits) {
  if (!kNarrow && dtype == DType::kFloat32) return __uint_as_float(bits);
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return dtype == DType::kBFloat16 ? __uint_as_float(bits << 16) : half;
}

// What a lane needs of kM rows of x for one group of 32 k.
template <int kM>
struct Activation {
  uint4 even[kM], odd[kM];
  uint2 parameter[kM];  // bits of s_x, sum

  __device__ __forceinline__ void load(const W4A8Args& p, int j, int n_k32) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      even[m] = load_global_written_v4(p.a + (int64_t{2 * m} * n_k32 + j) * 16);
      odd[m] = load_global_written_v4(p.a + (int64_t{2 * m + 1} * n_k32 + j) * 16);
    }
    if (kM == 1) {
      parameter[0] = load_global_written_v2(p.parameter + j);
    } else {
      const uint4 both = load_global_written_v4(p.parameter + 2 * j);
      parameter[0] = {both.x, both.y};
      parameter[kM - 1] = {both.z, both.w};
    }
  }
};

// kHeldX: a lane's groups of every column are those of its kSteps activations, which it keeps.
// kEarly: weights are asked for ahead of the wait.
template <int kM, int kRows, int kSteps, int kMinBlocks, bool kHeldX, bool kEarly, bool kZero,
          bool kNarrow>
__global__ void __launch_bounds__(32 * kWarps, kMinBlocks)
    matvec_w4a8_dp4a_kernel(W4A8Args p, int group_shift) {
  const int lane = threadIdx.x % 32, row_bytes = static_cast<int>(p.K / 2);
  const int n_k32 = static_cast<int>(p.K / kQuantizedGroup);
  const int n_groups = static_cast<int>(p.n_groups);
  const uint32_t N = static_cast<uint32_t>(p.N), stride = gridDim.x * kWarps * kRows;
  uint32_t n0 = (blockIdx.x * kWarps + threadIdx.x / 32) * kRows;
  if (n0 >= N) return;  // the whole warp

  griddepcontrol_launch_dependents();
  if (!kEarly) griddepcontrol_wait();
  // ---- load ----
  uint4 q[kRows][kSteps];
  uint32_t scale[kRows][kSteps], zero[kRows][kSteps];
  const auto load = [&](uint32_t n, int r, int j, int step) {
    if (n + r >= N || j >= n_k32) {
      q[r][step] = {};
      scale[r][step] = zero[r][step] = 0;
      return;
    }
    const uint8_t* from = p.qdata + (int64_t{n + r} * row_bytes + j * 16);
    q[r][step] = kEarly ? load_global_early_v4(from) : load_global_once_v4(from);
    const int64_t group = int64_t{n + r} * n_groups + (j >> group_shift);
    scale[r][step] = load_bits<kNarrow, kEarly>(p.scale_dtype, p.scale, group);
    if (kZero) zero[r][step] = load_bits<kNarrow, kEarly>(p.zero_point_dtype, p.zero_point, group);
  };
  Activation<kM> held[kHeldX ? kSteps : 1];
  if (kHeldX) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) load(n0, r, step * 32 + lane, step);
    }
    griddepcontrol_wait();  // nothing above reads what kernels write
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      held[step].load(p, min(step * 32 + lane, n_k32 - 1), n_k32);
    }
  }

  do {
    float sum[kRows][kM] = {};
    for (int j0 = 0; j0 < (kHeldX ? 1 : n_k32); j0 += 32 * kSteps) {
      if (!kHeldX) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) load(n0, r, j0 + step * 32 + lane, step);
        }
        if (kEarly && j0 == 0) griddepcontrol_wait();  // nothing above reads what kernels write
      }
      // ---- dot, 32 k at a time; sums in fp32 ----
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Activation<kM> x;
        if (kHeldX) {
          x = held[step];
        } else {
          x.load(p, min(j0 + step * 32 + lane, n_k32 - 1), n_k32);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t words[4] = {q[r][step].x, q[r][step].y, q[r][step].z, q[r][step].w};
          const float s = float_of_bits<kNarrow>(p.scale_dtype, scale[r][step]);
          const float z = kZero ? float_of_bits<kNarrow>(p.zero_point_dtype, zero[r][step]) : 0.f;
          if (kHeldX && n0 + stride < N)
            load(n0 + stride, r, step * 32 + lane, step);  // the next columns
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const uint32_t evens[4] = {x.even[m].x, x.even[m].y, x.even[m].z, x.even[m].w};
            const uint32_t odds[4] = {x.odd[m].x, x.odd[m].y, x.odd[m].z, x.odd[m].w};
            const int32_t x_sum = static_cast<int32_t>(x.parameter[m].y);
            int32_t low = kZero ? 0 : -8 * x_sum, high = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              low = dp4a_u8_s8(words[i] & 0x0f0f0f0fu, evens[i], low);
              high = dp4a_u8_s8(words[i] & 0xf0f0f0f0u, odds[i], high);
            }
            float dot = static_cast<float>(low + (high >> 4));  // high is a multiple of 16
            if (kZero) dot = fmaf(-z, static_cast<float>(x_sum), dot);
            sum[r][m] = fmaf(s * __uint_as_float(x.parameter[m].x), dot, sum[r][m]);
          }
        }
      }
    }
    // ---- reduce and store ----
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t n = n0 + r;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        float value = warp_sum(sum[r][m]);
        if (lane != 0 || n >= N) continue;
        if (p.bias != nullptr) value += load_as_float(p.dtype, p.bias, n);
        store_from_float(p.dtype, p.y, m * p.N + n, value);
      }
    }
    n0 += stride;
  } while (kHeldX && n0 < N);
}

template <int kM, int kRows, int kSteps, int kMinBlocks, bool kHeldX, bool kZero,
          bool kNarrow = true>
cudaError_t launch(const W4A8Args& args, int n_sms, cudaStream_t stream) {
  constexpr int kBlockRows = kWarps * kRows;
  const int64_t blocks = (args.N + kBlockRows - 1) / kBlockRows;
  const int group_shift = w4a8_group_shift(args);
  if constexpr (kHeldX) {
    const int64_t stays = std::min(blocks, int64_t{n_sms} * kMinBlocks);
    return launch_w4a8(
        matvec_w4a8_dp4a_kernel<kM, kRows, kSteps, kMinBlocks, true, true, kZero, kNarrow>,
        static_cast<unsigned>(stays), 32 * kWarps, 0, stream, args, group_shift);
  } else {
    // Ahead of the wait is the first of the rounds of loads along K; of more than 4, and with two rows m,
    // it does not pay.
    const bool is_early =
        kM == 1 && args.constant_weights && args.K <= int64_t{4} * 32 * kSteps * kQuantizedGroup;
    const auto kernel =
        is_early
            ? matvec_w4a8_dp4a_kernel<kM, kRows, kSteps, kMinBlocks, false, true, kZero, kNarrow>
            : matvec_w4a8_dp4a_kernel<kM, kRows, kSteps, kMinBlocks, false, false, kZero, kNarrow>;
    return launch_dependent(kernel, static_cast<unsigned>(blocks), 32 * kWarps, 0, stream, args,
                            group_shift);
  }
}

constexpr int64_t kLongRun = int64_t{64} << 20;  // weights from which a grid that stays pays

template <bool kZero>
cudaError_t choose_one_row(const W4A8Args& args, int n_sms, cudaStream_t stream) {
  const int64_t n_k32 = args.K / kQuantizedGroup;
  const bool is_long = args.N * args.K >= kLongRun;
  if (is_long && n_k32 <= 4 * 32) return launch<1, 1, 4, 5, true, kZero>(args, n_sms, stream);
  if (is_long && n_k32 <= 6 * 32 && !kZero) {
    return launch<1, 1, 6, 4, true, false>(args, n_sms, stream);
  }
  // 6 groups of 32 k a lane where that leaves far fewer lanes idle at the end of a row, else 4.
  const auto slots = [&](int64_t steps) { return (n_k32 + 32 * steps - 1) / (32 * steps) * steps; };
  if (5 * slots(6) <= 4 * slots(4)) {
    return launch<1, 1, 6, kZero ? 6 : 8, false, kZero>(args, n_sms, stream);
  }
  return launch<1, 1, 4, 8, false, kZero>(args, n_sms, stream);
}

// Much work for two rows m needs two columns n to a lane, or L1, which brings x, is the limit.
template <bool kZero>
cudaError_t choose_two_rows(const W4A8Args& args, int n_sms, cudaStream_t stream) {
  const bool is_long = args.N * args.K >= kLongRun;
  if (is_long && args.K <= 4 * 32 * kQuantizedGroup && !kZero) {
    return launch<2, 2, 4, 3, true, false>(args, n_sms, stream);
  }
  if (is_long) return launch<2, 2, 2, kZero ? 6 : 8, false, kZero>(args, n_sms, stream);
  return launch<2, 1, 4, kZero ? 6 : 8, false, kZero>(args, n_sms, stream);
}

template <bool kZero>
cudaError_t choose(const W4A8Args& args, int n_sms, cudaStream_t stream) {
  if (args.scale_dtype == DType::kFloat32 || args.zero_point_dtype == DType::kFloat32) {
    return args.M == 1 ? launch<1, 1, 4, 8, false, kZero, false>(args, n_sms, stream)
                       : launch<2, 1, 4, 6, false, kZero, false>(args, n_sms, stream);
  }
  return args.M == 1 ? choose_one_row<kZero>(args, n_sms, stream)
                     : choose_two_rows<kZero>(args, n_sms, stream);
}

}  // namespace

cudaError_t launch_matvec_w4a8_dp4a(const W4A8Args& args, cudaStream_t stream) {
  if (args.M > 2) return cudaErrorInvalidValue;
  int device = 0, n_sms = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (code != cudaSuccess) return code;
  return args.zero_point == nullptr ? choose<false>(args, n_sms, stream)
                                    : choose<true>(args, n_sms, stream);
}

}  // namespace cuda_int4
