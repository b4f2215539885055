// matvec_w4a16_coalesced -- y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g]
//                                     + bias[n],  g = k / group_size
//
//   operand     dtype               shape          order in memory                              align
//   x           f16 | bf16 | f32    [M, K]         row-major                                    dtype
//   qdata       u32                 [N, K/8]       row-major; bits 4i..4i+3 hold k = 8w + i     4 B
//   scale       f16 | bf16 | f32    [N, n_groups]  row-major                                    dtype
//   zero_point  of scale | f32      [N, n_groups]  row-major; absent means 8                    dtype
//   bias        dtype of x          [N]            contiguous; absent means 0                   dtype
//   y (out)     dtype of x          [M, N]         row-major                                    dtype
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      ceil(N / kWarps) x min(M, 65535) blocks of (32, kWarps) threads; one warp owns one
//           column n and takes rows m in strides of gridDim.y
// Bytes     reads N*K/2 + N*n_groups scales and zero points per row m; bound by qdata at M = 1
// Numerics  fp32 sum of (x * (q - z)) per 8 codes, times scale, over lanes; one rounding at the store
// Source    direct from the formula; the baseline that faster rungs are measured against
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matvec_w4a16_coalesced.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;
constexpr int64_t kMaxGridY = 65535;

// X: dtype of x, bias and y; S: of scale; Z: of zero_point.
template <typename X, typename S, typename Z>
__global__ void __launch_bounds__(32 * kWarps)
    matvec_w4a16_coalesced_kernel(MatvecW4A16CoalescedArgs p) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (n >= p.N) return;  // n is the same in all 32 lanes: the whole warp leaves together
  const int64_t n_words = p.K / 8, n_groups = p.K / p.group_size;
  const uint32_t* q_row = p.qdata + n * n_words;
  const S* scale_row = static_cast<const S*>(p.scale) + n * n_groups;
  const Z* zero_row =
      p.zero_point == nullptr ? nullptr : static_cast<const Z*>(p.zero_point) + n * n_groups;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const X* x_row = static_cast<const X*>(p.x) + m * p.K;
    float sum = 0.f;
    for (int64_t word = threadIdx.x; word < n_words; word += 32) {
      const uint32_t q = q_row[word];
      const int64_t group = 8 * word / p.group_size;  // a word is within one group
      const float zero = zero_row == nullptr ? 8.f : as_float(zero_row[group]);
      float dot = 0.f;
      for (int i = 0; i < 8; ++i) {
        dot += as_float(x_row[8 * word + i]) * (static_cast<float>((q >> (4 * i)) & 0xF) - zero);
      }
      sum += dot * as_float(scale_row[group]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
      if (p.bias != nullptr) sum += as_float(static_cast<const X*>(p.bias)[n]);
      static_cast<X*>(p.y)[m * p.N + n] = from_float<X>(sum);
    }
  }
}

template <typename X, typename S, typename Z>
cudaError_t launch(const MatvecW4A16CoalescedArgs& args, cudaStream_t stream) {
  const dim3 block(32, kWarps);
  const dim3 grid(static_cast<unsigned>((args.N + kWarps - 1) / kWarps),
                  static_cast<unsigned>(args.M < kMaxGridY ? args.M : kMaxGridY));
  matvec_w4a16_coalesced_kernel<X, S, Z><<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename X, typename S>
cudaError_t choose_zero_point(const MatvecW4A16CoalescedArgs& args, cudaStream_t stream) {
  const bool is_float32 = args.zero_point_dtype == DType::kFloat32;
  return is_float32 ? launch<X, S, float>(args, stream) : launch<X, S, S>(args, stream);
}

template <typename X>
cudaError_t choose_scale(const MatvecW4A16CoalescedArgs& args, cudaStream_t stream) {
  switch (args.scale_dtype) {
    case DType::kFloat16:
      return choose_zero_point<X, __half>(args, stream);
    case DType::kBFloat16:
      return choose_zero_point<X, __nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose_zero_point<X, float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_matvec_w4a16_coalesced(const MatvecW4A16CoalescedArgs& args,
                                          cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return choose_scale<__half>(args, stream);
    case DType::kBFloat16:
      return choose_scale<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose_scale<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
