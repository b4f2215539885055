// The table of kernels of a vector instruction set S.
#pragma once

#include "attention_kernel.h"
#include "cpu_kernels.h"
#include "matmul_w4a16.h"
#include "matmul_w4a8.h"
#include "matvec_w4a16.h"
#include "matvec_w4a8.h"
#include "rowwise.h"
#include "unpack_marlin.h"

namespace cuda_int4 {
namespace cpu {

// Below this many rows of x the codes are decoded again for each; measured in README.md.
constexpr int64_t kMatvecBelowM = 4;

template <class S>
static const LinearKernel* choose_linear(const LinearJob& job) {
  static constexpr LinearKernel kMatvecA16 =
      matvec_kernel<S, MatvecW4A16<S>>("matvec_w4a16_coalesced");
  static constexpr LinearKernel kMatvecA8 =
      matvec_kernel<S, MatvecW4A8<S>>("matvec_w4a8_coalesced");
  static constexpr LinearKernel kMatmulA16 =
      matmul_kernel<S, MatmulW4A16<S>>("matmul_w4a16_coalesced");
  static constexpr LinearKernel kMatmulA8 =
      matmul_kernel<S, MatmulW4A8<S>>("matmul_w4a8_coalesced");
  if (job.M < kMatvecBelowM) return job.int8_activation ? &kMatvecA8 : &kMatvecA16;
  return job.int8_activation ? &kMatmulA8 : &kMatmulA16;
}

template <class S>
constexpr CpuKernels vector_kernels(const char* isa) {
  return {isa, choose_linear<S>, unpack_marlin, attention<S>, rms_norm<S>, silu<S>};
}

}  // namespace cpu
}  // namespace cuda_int4
