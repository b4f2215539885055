// Reading and writing by index: indexing.cu; adding up by index: accumulate.cu.
#pragma once

#include <cuda_runtime.h>

#include "fault.cuh"
#include "tensor_kernels.h"

namespace cuda_int4 {

Status launch_gather(const IndexArgs& args, const FaultNote& note, cudaStream_t stream);
Status launch_scatter(const IndexArgs& args, const FaultNote& note, cudaStream_t stream);
Status launch_accumulate(const IndexArgs& args, const FaultNote& note, cudaStream_t stream);

}  // namespace cuda_int4
