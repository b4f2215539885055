// add_rms_norm: arguments and launcher; the contract is in add_rms_norm.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

struct AddRmsNormKernelArgs {  // device pointers; sizes in elements
  const void* x;
  const void* residual;
  const void* weight;  // nullptr: 1
  void* sum;
  void* y;
  DType dtype, weight_dtype;
  int64_t n_rows, D;
  float eps;
};

cudaError_t launch_add_rms_norm(const AddRmsNormKernelArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
