// Mat-vecs on marlin24.v1: their arguments, and one launcher per kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../ops.h"
#include "../quantized_activation.h"

namespace cuda_int4 {

struct MatvecMarlin24Args {  // device pointers; sizes in elements
  const void* x;             // nullptr: the activation is `a`
  const int8_t* a;           // quantized_activation.h
  const QuantizedParameter* parameter;
  const uint8_t* qdata;
  const uint8_t* meta;
  const void* scale;
  const void* bias;  // nullptr: 0
  void* y;
  DType dtype, scale_dtype;  // dtype: of x, bias and y
  int64_t M, N, padded_N, K, group_size;
  int64_t n_tokens;       // of `parameter`
  bool constant_weights;  // ExecutionContext
};

cudaError_t launch_matvec_marlin24_plain(const MatvecMarlin24Args& args, cudaStream_t stream);

// M <= 16, dtype fp16 or bf16. *launched is false where the shape is beyond this kernel: nothing has
// happened then.
cudaError_t launch_matvec_marlin24_mma(const MatvecMarlin24Args& args, cudaStream_t stream,
                                       bool* launched);

// The entry of the table of CUDA kernels (cuda_kernels.h); arguments have passed validate_linear.
Status matvec_marlin24(const LinearArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
