// matvec_marlin24_plain -- y[m, n] = sum_k x[m, k] * (q[n, k] - 8) * scale[n, k / group_size] + bias[n]
//                          over the k that are kept; or with x[m, k] = a[m, k] * s_x[m, k / 32]
//
//   operand    dtype              shape           order in memory                         align
//   x          f16 | bf16 | f32   [M, K]          row-major                               dtype
//   a, s_x     i8, f32            [M, K], ..      quantized_activation.h, in place of x   16 B
//   qdata      u32                [K/32, 2*Np]    marlin24.v1 (marlin.h)                  16 B
//   meta       u16                [K/32, 2*Np]    marlin24.v1                             16 B
//   scale      f16 | bf16 | f32   [n_groups, Np]  marlin24.v1                             16 B
//   bias       dtype of y         [N]             contiguous; absent means 0              dtype
//   y (out)    f16 | bf16 | f32   [M, N]          row-major                               dtype
//
// Requires  K % 32 == 0, group_size % 32 == 0, Np = N rounded up to 64  (checked by validate_linear)
// Grid      Np / 64 x min(M, 65535) blocks of (32, kWarps) threads; a block owns 64 columns n and
//           takes rows m in strides of gridDim.y; its warps share K, a lane owns two columns
// Bytes     reads qdata, meta and scales per row m; bound by qdata at M = 1
// Numerics  fp32 sum of 16 products, times scale (and s_x), over k; one rounding at the store
// Source    direct from the formula; the baseline that faster rungs are measured against
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matvec_marlin24.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 64;  // n of a block, 8 rows of lanes (i / 4) x 2 halves x 4 (i % 4)
constexpr int64_t kMaxGridY = 65535;

// Where x[m, k] comes from: its value is at(k) * factor(k / 32).
template <typename X>
struct Floats {
  const X* row;
  __device__ Floats(const MatvecMarlin24Args& p, int64_t m)
      : row(static_cast<const X*>(p.x) + m * p.K) {}
  __device__ float at(int64_t k) const { return as_float(row[k]); }
  __device__ float factor(int64_t) const { return 1.f; }
};

struct Int8 {
  const int8_t* row;
  const QuantizedParameter* parameter;
  int64_t n_tokens, half_K;
  __device__ Int8(const MatvecMarlin24Args& p, int64_t m)
      : row(p.a + m * p.K), parameter(p.parameter + m), n_tokens(p.n_tokens), half_K(p.K / 2) {}
  __device__ float at(int64_t k) const { return row[k % 2 * half_K + k / 2]; }
  __device__ float factor(int64_t block) const { return parameter[block * n_tokens].s_x; }
};

template <typename Activation, typename S, typename Y>
__global__ void __launch_bounds__(32 * kWarps) matvec_marlin24_plain_kernel(MatvecMarlin24Args p) {
  __shared__ float sums[kWarps][kColumns];
  const int i = threadIdx.x, word_n = i % 4;
  const int64_t n_words = 2 * p.padded_N, n_groups = p.K / p.group_size;
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(p.qdata) + 128 * int64_t{blockIdx.x} +
                          16 * (i / 4) + word_n;
  // 4 words of 16 bits: of k % 32 < 16 for column n and n + 4, then of the other k.
  const uint16_t* places = reinterpret_cast<const uint16_t*>(p.meta) + 128 * int64_t{blockIdx.x} +
                           64 * (word_n / 2) + 8 * (i / 4) + 4 * (word_n % 2);
  const int n_in_block = 8 * (i / 4) + word_n;
  // Columns n and n + 4 are neighbours in a row of scale, unless there is one group for all k.
  const S* scale = static_cast<const S*>(p.scale) + kColumns * int64_t{blockIdx.x} +
                   (n_groups == 1 ? n_in_block : 8 * (i / 4) + 2 * word_n);
  const int scale_step = n_groups == 1 ? 4 : 1;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const Activation x(p, m);
    float sum[2] = {0.f, 0.f};  // columns n, n + 4
    for (int64_t kt = threadIdx.y; kt < p.K / 32; kt += kWarps) {
      float dot[2] = {0.f, 0.f};
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t word = codes[kt * n_words + 4 * pair];
        for (int upper = 0; upper < 2; ++upper) {
          const int64_t k = 32 * kt + 16 * upper + 4 * pair;  // of 4 weights, two are kept
          for (int half = 0; half < 2; ++half) {
            const uint32_t two = word >> (4 * (2 * half + upper));
            const uint32_t place = places[kt * n_words + 2 * upper + half] >> (4 * pair);
            dot[half] += x.at(k + (place & 3)) * (static_cast<float>(two & 0xF) - 8.f) +
                         x.at(k + (place >> 2 & 3)) * (static_cast<float>(two >> 16 & 0xF) - 8.f);
          }
        }
      }
      const S* group = scale + 32 * kt / p.group_size * p.padded_N;
      const float factor = x.factor(kt);
      for (int half = 0; half < 2; ++half) {
        sum[half] += dot[half] * (as_float(group[half * scale_step]) * factor);
      }
    }
    __syncthreads();  // sums of the row of x before have been read
    sums[threadIdx.y][n_in_block] = sum[0];
    sums[threadIdx.y][n_in_block + 4] = sum[1];
    __syncthreads();
    const int c = threadIdx.y * 32 + threadIdx.x;
    const int64_t n = kColumns * int64_t{blockIdx.x} + c;
    if (c < kColumns && n < p.N) {
      float total = p.bias == nullptr ? 0.f : as_float(static_cast<const Y*>(p.bias)[n]);
      for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][c];
      static_cast<Y*>(p.y)[m * p.N + n] = from_float<Y>(total);
    }
  }
}

template <typename Activation, typename S, typename Y>
cudaError_t launch(const MatvecMarlin24Args& args, cudaStream_t stream) {
  const dim3 block(32, kWarps);
  const dim3 grid(static_cast<unsigned>(args.padded_N / kColumns),
                  static_cast<unsigned>(args.M < kMaxGridY ? args.M : kMaxGridY));
  matvec_marlin24_plain_kernel<Activation, S, Y><<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename Activation, typename Y>
cudaError_t choose_scale(const MatvecMarlin24Args& args, cudaStream_t stream) {
  switch (args.scale_dtype) {
    case DType::kFloat16:
      return launch<Activation, __half, Y>(args, stream);
    case DType::kBFloat16:
      return launch<Activation, __nv_bfloat16, Y>(args, stream);
    case DType::kFloat32:
      return launch<Activation, float, Y>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Y>
cudaError_t choose_activation(const MatvecMarlin24Args& args, cudaStream_t stream) {
  return args.x == nullptr ? choose_scale<Int8, Y>(args, stream)
                           : choose_scale<Floats<Y>, Y>(args, stream);
}

}  // namespace

cudaError_t launch_matvec_marlin24_plain(const MatvecMarlin24Args& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return choose_activation<__half>(args, stream);
    case DType::kBFloat16:
      return choose_activation<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose_activation<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
