// Copies of views: bytes as they are (copy), values that are made (fill), a triangle (tril): copy.cu.
#pragma once

#include <cuda_runtime.h>

#include "tensor_kernels.h"

namespace cuda_int4 {

Status launch_copy(const char* who, const CopyPart* parts, int n_parts, cudaStream_t stream);
Status launch_fill(const FillArgs& args, cudaStream_t stream);
Status launch_tril(const TrilArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
