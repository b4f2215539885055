// quantize_int8: arguments and launcher; the contract is in quantize_int8.cu.
#pragma once

#include <cuda_runtime.h>

#include "../quantized_activation.h"
#include "../tensor_view.h"

namespace cuda_int4 {

struct QuantizeInt8Args {  // device pointers; sizes in elements
  const void* x;
  int8_t* a;
  QuantizedParameter* parameter;
  DType dtype;
  int64_t M, K, n_tokens;
};

cudaError_t launch_quantize_int8(const QuantizeInt8Args& args, cudaStream_t stream);

}  // namespace cuda_int4
