// silu: arguments and launcher; the contract is in silu.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

struct SiluKernelArgs {  // device pointers; sizes in elements
  const void* x;
  void* y;
  DType dtype;
  int64_t numel;
};

cudaError_t launch_silu(const SiluKernelArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
