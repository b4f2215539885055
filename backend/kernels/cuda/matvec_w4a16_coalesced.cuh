// matvec_w4a16_coalesced: arguments and launcher; the contract is in matvec_w4a16_coalesced.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

struct MatvecW4A16CoalescedArgs {  // device pointers; sizes in elements
  const void* x;
  const uint32_t* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  DType dtype, scale_dtype, zero_point_dtype;
  int64_t M, N, K, group_size;
};

cudaError_t launch_matvec_w4a16_coalesced(const MatvecW4A16CoalescedArgs& args,
                                          cudaStream_t stream);

}  // namespace cuda_int4
