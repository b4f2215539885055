// matvec_w4a8_coalesced -- y[m, n] = sum_g s_x[m, j] * scale[n, g] * sum_k a[m, k] * (q[n, k] -
//                          zero_point[n, g]) + bias[n],  j = k / 32, g = k / group_size
//
//   operand       dtype               shape             order in memory                        align
//   a, parameter  i8; f32, i32        see there         ../quantized_activation.h              16 B
//   qdata         u8                  [N, K/2]          row-major; even k in the low nibble    16 B
//   scale         f16 | bf16 | f32    [N, n_groups]     row-major                              dtype
//   zero_point    of scale | f32      [N, n_groups]     row-major; absent means 8              dtype
//   bias          dtype of y          [N]               contiguous; absent means 0             dtype
//   y (out)       f16 | bf16 | f32    [M, N]            row-major                              dtype
//
// Requires  K % 32 == 0, group_size % 32 == 0, K % group_size == 0   (checked by validate_linear)
// Grid      ceil(N / kWarps) x min(M, 65535) blocks of (32, kWarps) threads; one warp owns one
//           column n and takes rows m in strides of gridDim.y; one lane takes 32 k at a time
// Bytes     reads N*K/2 + N*n_groups scales and zero points per row m; bound by qdata at M = 1
// Numerics  exact int32 dot per 32 k, the rest in fp32, one rounding at the store
// Source    direct from the formula; the baseline that faster rungs are measured against
#include "ptx.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 4;
constexpr int64_t kMaxGridY = 65535;

__global__ void __launch_bounds__(32 * kWarps) matvec_w4a8_coalesced_kernel(W4A8Args p) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (n >= p.N) return;  // n is the same in all 32 lanes: the whole warp leaves together
  const int64_t n_k32 = p.K / kQuantizedGroup, n_groups = p.n_groups;
  const uint4* q_row = reinterpret_cast<const uint4*>(p.qdata + n * (p.K / 2));
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const uint4* even = reinterpret_cast<const uint4*>(p.a + m * p.K);
    const uint4* odd = even + n_k32;
    float sum = 0.f;
    for (int64_t j = threadIdx.x; j < n_k32; j += 32) {
      const int64_t group = n * n_groups + j * kQuantizedGroup / p.group_size;
      const uint4 q = q_row[j], e = even[j], o = odd[j];
      const uint32_t words[4] = {q.x, q.y, q.z, q.w};
      const uint32_t evens[4] = {e.x, e.y, e.z, e.w}, odds[4] = {o.x, o.y, o.z, o.w};
      int32_t dot = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dot = dp4a_u8_s8(words[i] & 0x0f0f0f0fu, evens[i], dot);
        dot = dp4a_u8_s8((words[i] >> 4) & 0x0f0f0f0fu, odds[i], dot);
      }
      const QuantizedParameter parameter = p.parameter[j * p.n_tokens + m];
      const float zero =
          p.zero_point == nullptr ? 8.f : load_as_float(p.zero_point_dtype, p.zero_point, group);
      const float centred = fmaf(-zero, static_cast<float>(parameter.sum), static_cast<float>(dot));
      sum = fmaf(parameter.s_x * load_as_float(p.scale_dtype, p.scale, group), centred, sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
      if (p.bias != nullptr) sum += load_as_float(p.dtype, p.bias, n);
      store_from_float(p.dtype, p.y, m * p.N + n, sum);
    }
  }
}

}  // namespace

cudaError_t launch_matvec_w4a8_coalesced(const W4A8Args& args, cudaStream_t stream) {
  const dim3 block(32, kWarps);
  const dim3 grid(static_cast<unsigned>((args.N + kWarps - 1) / kWarps),
                  static_cast<unsigned>(args.M < kMaxGridY ? args.M : kMaxGridY));
  matvec_w4a8_coalesced_kernel<<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace cuda_int4
