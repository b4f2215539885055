#include "../checks.h"
#include "math_kernels.h"

namespace cuda_int4 {

Status built_without_cuda(const char* who) {
  return error(StatusCode::kUnsupported,
               "%.200s: expected a library with CUDA kernels, this one was built without nvcc; "
               "use device cpu, or build again with nvcc on the PATH",
               who);
}

}  // namespace cuda_int4
