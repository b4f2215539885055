// What the w4a8 kernels of coalesced.v1 share: their arguments and one launcher per kernel.
#pragma once

#include <cuda_runtime.h>

#include "../quantized_activation.h"
#include "../tensor_view.h"

namespace cuda_int4 {

struct W4A8Args {  // device pointers; sizes in elements
  const int8_t* a;
  const QuantizedParameter* parameter;
  const uint8_t* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  DType dtype, scale_dtype, zero_point_dtype;  // dtype: of bias and y
  int64_t M, N, K, group_size, n_tokens;
};

cudaError_t launch_matvec_w4a8_coalesced(const W4A8Args& args, cudaStream_t stream);

}  // namespace cuda_int4
