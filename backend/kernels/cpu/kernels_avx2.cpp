// Compiled with AVX2, FMA and F16C; run only where isa.cpp found them.
#include "simd_avx2.h"
#include "vector_kernels.h"

namespace cuda_int4 {
namespace cpu {

const CpuKernels kAvx2Kernels = vector_kernels<Avx2Simd>("avx2");

}  // namespace cpu
}  // namespace cuda_int4
