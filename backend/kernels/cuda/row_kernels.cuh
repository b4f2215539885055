// The launchers for row_args.h; each contract is in the .cu of its name.
#pragma once

#include <cuda_runtime.h>

#include "row_args.h"

namespace cuda_int4 {

cudaError_t launch_softmax(const SoftmaxArgs& args, cudaStream_t stream);
cudaError_t launch_layer_norm(const LayerNormArgs& args, cudaStream_t stream);
cudaError_t launch_group_norm(const GroupNormArgs& args, cudaStream_t stream);
cudaError_t launch_batch_norm(const BatchNormArgs& args, cudaStream_t stream);
cudaError_t launch_cumsum(const CumsumArgs& args, cudaStream_t stream);
cudaError_t launch_glu(const GluArgs& args, cudaStream_t stream);

uint64_t topk_scratch_bytes(const TopkArgs& args);
cudaError_t launch_topk(const TopkArgs& args, void* scratch, cudaStream_t stream);

}  // namespace cuda_int4
