// Compiled with AVX-512 as kernels_avx512.cpp and BF16; run only where isa.cpp found them.
//
// bfloat16 activations get kernels of their own, everything else is kernels_avx512.cpp's.
#include "matmul_w4a16_bf16.h"
#include "matvec_w4a16_bf16.h"
#include "simd_avx512bf16.h"
#include "vector_kernels.h"

namespace cuda_int4 {
namespace cpu {

namespace {

const LinearKernel* choose_linear_bf16(const LinearJob& job) {
  using S = Avx512Bf16Simd;
  static constexpr LinearKernel kMatvec =
      matvec_kernel<S, MatvecW4A16Bf16<S>>("matvec_w4a16_coalesced_bf16");
  static constexpr LinearKernel kMatmul =
      matmul_kernel<S, MatmulW4A16Bf16<S>>("matmul_w4a16_coalesced_bf16");
  if (job.dtype != DType::kBFloat16 || job.int8_activation) {
    return kAvx512Kernels.choose_linear(job);
  }
  return job.M < kMatvecBelowM ? &kMatvec : &kMatmul;
}

void attention_avx512(const AttentionJob& job, int64_t begin, int64_t end) {
  kAvx512Kernels.attention(job, begin, end);
}
void rms_norm_avx512(const RmsNormJob& job, int64_t begin, int64_t end) {
  kAvx512Kernels.rms_norm(job, begin, end);
}
void silu_avx512(const SiluJob& job, int64_t begin, int64_t end) {
  kAvx512Kernels.silu(job, begin, end);
}

}  // namespace

const CpuKernels kAvx512Bf16Kernels = {"avx512bf16",     choose_linear_bf16, unpack_marlin,
                                       attention_avx512, rms_norm_avx512,    silu_avx512};

}  // namespace cpu
}  // namespace cuda_int4
