// gate_mul: arguments and launcher; the contract is in gate_mul.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../gate_functions.h"
#include "../tensor_view.h"
#include "quantize_group.cuh"

namespace cuda_int4 {

struct GateMulKernelArgs {  // device pointers; sizes in elements
  const void* gate_up;
  void* y;
  DType dtype;
  GateFunction function;
  int64_t numel, N;         // of y
  QuantizedRows quantized;  // y once more
};

cudaError_t launch_gate_mul(const GateMulKernelArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
