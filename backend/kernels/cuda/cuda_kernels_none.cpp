// Stands in for cuda_kernels.cu in a build without nvcc.
#include "cuda_kernels.h"

namespace cuda_int4 {

const CudaKernels* cuda_kernels() { return nullptr; }

}  // namespace cuda_int4
