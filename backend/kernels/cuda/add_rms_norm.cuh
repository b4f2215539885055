// add_rms_norm: launcher; the contract is in add_rms_norm.cu, the arguments in norm_rows.cuh.
#pragma once

#include <cuda_runtime.h>

namespace cuda_int4 {

struct NormRowsArgs;

cudaError_t launch_add_rms_norm(const NormRowsArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
