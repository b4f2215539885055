// Compiled with AVX-512 F, BW, VL, DQ and VNNI; run only where isa.cpp found them.
#include "simd_avx512.h"
#include "vector_kernels.h"

namespace cuda_int4 {
namespace cpu {

const CpuKernels kAvx512Kernels = vector_kernels<Avx512Simd>("avx512");

}  // namespace cpu
}  // namespace cuda_int4
