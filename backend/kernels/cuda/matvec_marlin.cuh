// The kernels of marlin.v1 for few rows of x: arguments and launchers. ../marlin.h has the order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../ops.h"
#include "../quantized_activation.h"

namespace cuda_int4 {

struct MatvecMarlinArgs {               // device pointers; sizes in elements
  const void* x;                        // of w4a8: the codes a of ../quantized_activation.h, int8
  const QuantizedParameter* parameter;  // of w4a8; nullptr: w4a16
  const uint8_t* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  void* scratch;  // matvec_marlin_mma_scratch_bytes, 16-byte aligned; need not be cleared
  DType dtype, scale_dtype, zero_point_dtype;  // dtype: of bias and y, and of x in w4a16
  int64_t M, N, K, group_size, n_tokens;       // n_tokens: of parameter
  bool constant_weights;                       // ExecutionContext has what it means
};

// The entries of the table (cuda_kernels.h).
uint64_t matvec_marlin_scratch_bytes(const LinearArgs& args);
Status matvec_marlin(const LinearArgs& args, const ExecutionContext& context);

// Any M, any dtype, w4a16 and w4a8.
cudaError_t launch_matvec_marlin_plain(const MatvecMarlinArgs& args, cudaStream_t stream);

// w4a16 of fp16 and bf16, M <= 16.
uint64_t matvec_marlin_mma_scratch_bytes(const MatvecMarlinArgs& args);
cudaError_t launch_matvec_marlin_mma(const MatvecMarlinArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
