// The launchers for convolution.h; each contract is in the .cu of its name.
#pragma once

#include <cuda_runtime.h>

#include "convolution.h"

namespace cuda_int4 {

uint64_t convolution_scratch_bytes(const ConvolutionArgs& args);
cudaError_t launch_convolution(const ConvolutionArgs& args, void* scratch, uint64_t scratch_bytes,
                               cudaStream_t stream);
cudaError_t launch_pool(const PoolArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
