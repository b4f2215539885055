// matvec_marlin_plain -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g] + bias[n],
//                        g = k / group_size; w4a8: x[m, k] = s_x[m, k / 32] * a[m, k]
//
//   operand       dtype               shape           order in memory                        align
//   x             f16 | bf16 | f32    [M, K]          row-major                              dtype
//   a, parameter  i8; f32, i32        see there       ../quantized_activation.h; or x        16 B
//   qdata         u8 (32-bit words)   [K/16, 8*Np]    marlin.v1: ../marlin.h                 16 B
//   scale         f16 | bf16 | f32    [n_groups, Np]  marlin.v1                              dtype
//   zero_point    of scale | f32      [n_groups, Np]  as scale; absent means 8               dtype
//   bias          dtype of y          [N]             contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]          row-major                              dtype
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      Np / 64 x min(M, 65535) blocks of 32 * kWarps threads; a block owns 64 columns n and takes
//           rows m in strides of gridDim.y; its warps share out K, 32 at a time
// Bytes     reads qdata, scales and zero points once per row m; bound by qdata at M = 1
// Numerics  fp32 sums, in w4a8 of whole numbers up to scale; a fixed order; one rounding at the store
// Source    direct from the formula; the baseline that faster rungs are measured against
#include "matvec_marlin.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 8;
constexpr int kTileN = 64, kStepK = 16;
constexpr int64_t kMaxGridY = 65535;

// One row of x: its values and what they are multiplied by, per 32 k.
struct FloatRow {
  const MatvecMarlinArgs& p;
  int64_t m;
  __device__ float value(int64_t k) const { return load_as_float(p.dtype, p.x, m * p.K + k); }
  __device__ float factor(int64_t) const { return 1.f; }
};

struct QuantizedRow {
  const MatvecMarlinArgs& p;
  int64_t m;
  __device__ float value(int64_t k) const {
    const int8_t* const row = static_cast<const int8_t*>(p.x) + m * p.K;
    return static_cast<float>(row[k % 2 * (p.K / 2) + k / 2]);
  }
  __device__ float factor(int64_t k32) const { return p.parameter[k32 * p.n_tokens + m].s_x; }
};

// Where row n of a tile is in the tile's scales; they are permuted in blocks of 64, or of 32 where a
// row of w has one group.
__device__ __forceinline__ int scale_place(int n, bool has_one_group) {
  if (has_one_group) return n - n % 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2;
  return n % 8 * 8 + n / 8;
}

template <typename Row>
__global__ void __launch_bounds__(32 * kWarps) matvec_marlin_plain_kernel(MatvecMarlinArgs p) {
  __shared__ float sums[kWarps][kTileN];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;  // a lane has 8 rows of w: g, g + 8, ..
  const int64_t n_tiles = (p.N + kTileN - 1) / kTileN, tile = blockIdx.x;
  const bool has_one_group = p.group_size == p.K;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const Row x = {p, m};
    float sum[8] = {};
    for (int64_t k32 = warp; k32 < p.K / 32; k32 += kWarps) {
      const int64_t group = (k32 * 32 / p.group_size * n_tiles + tile) * kTileN;
      float zero[8], dot[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int64_t at = group + scale_place(g + 8 * i, has_one_group);
        zero[i] =
            p.zero_point == nullptr ? 8.f : load_as_float(p.zero_point_dtype, p.zero_point, at);
      }
      for (int64_t step = 2 * k32; step < 2 * k32 + 2; ++step) {
        const uint4 q =
            reinterpret_cast<const uint4*>(p.qdata)[(step * n_tiles + tile) * 32 + lane];
        const uint32_t words[4] = {q.x, q.y, q.z, q.w};
        const int64_t k = step * kStepK + 2 * t;
        const float x_of[4] = {x.value(k), x.value(k + 8), x.value(k + 1), x.value(k + 9)};
#pragma unroll
        for (int nibble = 0; nibble < 8; ++nibble) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int i = 2 * j + nibble / 2 % 2;
            const float code = static_cast<float>((words[j] >> (4 * nibble)) & 0xF);
            dot[i] += x_of[nibble / 4 * 2 + nibble % 2] * (code - zero[i]);
          }
        }
      }
      for (int i = 0; i < 8; ++i) {
        const int64_t at = group + scale_place(g + 8 * i, has_one_group);
        sum[i] += x.factor(k32) * load_as_float(p.scale_dtype, p.scale, at) * dot[i];
      }
    }
    for (int i = 0; i < 8; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      if (t == 0) sums[warp][g + 8 * i] = sum[i];
    }
    __syncthreads();
    const int64_t n = tile * kTileN + threadIdx.x;
    if (threadIdx.x < kTileN && n < p.N) {
      float y = 0.f;
      for (int w = 0; w < kWarps; ++w) y += sums[w][threadIdx.x];
      if (p.bias != nullptr) y += load_as_float(p.dtype, p.bias, n);
      store_from_float(p.dtype, p.y, m * p.N + n, y);
    }
    __syncthreads();  // the next row may write its sums
  }
}

}  // namespace

cudaError_t launch_matvec_marlin_plain(const MatvecMarlinArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.N + kTileN - 1) / kTileN),
                  static_cast<unsigned>(args.M < kMaxGridY ? args.M : kMaxGridY));
  if (args.parameter == nullptr) {
    matvec_marlin_plain_kernel<FloatRow><<<grid, 32 * kWarps, 0, stream>>>(args);
  } else {
    matvec_marlin_plain_kernel<QuantizedRow><<<grid, 32 * kWarps, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace cuda_int4
