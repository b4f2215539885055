// matvec_w4a16_mma: arguments and launcher; the contract is in matvec_w4a16_mma.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

struct MatvecW4A16MmaArgs {  // device pointers; sizes in elements
  const void* x;
  const uint8_t* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  DType dtype, scale_dtype, zero_point_dtype;  // dtype: of x, bias and y
  int64_t M, N, K, group_size;
  bool constant_weights;  // ExecutionContext
};

// *launched is false where the shape is beyond this kernel (K too long for shared memory): nothing
// has happened then.
cudaError_t launch_matvec_w4a16_mma(const MatvecW4A16MmaArgs& args, cudaStream_t stream,
                                    bool* launched);

}  // namespace cuda_int4
