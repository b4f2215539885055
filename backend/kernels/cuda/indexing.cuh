// Reading and writing by index: indexing.cu; adding up by index: accumulate.cu chooses.
#pragma once

#include <cuda_runtime.h>

#include "fault.cuh"
#include "tensor_kernels.h"

namespace cuda_int4 {

Status launch_gather(const IndexArgs& args, const FaultNote& note, cudaStream_t stream);
Status launch_scatter(const IndexArgs& args, const FaultNote& note, cudaStream_t stream);
uint64_t accumulate_scratch_bytes(const IndexArgs& args);
Status launch_accumulate(const IndexArgs& args, const FaultNote& note, void* scratch,
                         cudaStream_t stream);
// accumulate_sorted.cu
uint64_t accumulate_sorted_scratch_bytes(const IndexArgs& args);
Status launch_accumulate_sorted(const IndexArgs& args, const FaultNote& note, void* scratch,
                                cudaStream_t stream);

}  // namespace cuda_int4
