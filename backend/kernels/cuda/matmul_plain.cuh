// matmul_plain: launcher; the contract is in matmul_plain.cu.
#pragma once

#include <cuda_runtime.h>

#include "matmul.h"

namespace cuda_int4 {

cudaError_t launch_matmul_plain(const MatmulArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
