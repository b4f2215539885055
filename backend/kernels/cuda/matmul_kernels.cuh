// The kernels for matmul.h; each contract is in the .cu of its name.
#pragma once

#include <cuda_runtime.h>

#include "matmul.h"

namespace cuda_int4 {

cudaError_t launch_matmul_plain(const MatmulArgs& args, cudaStream_t stream);

// One row, of float32 up to 8.
bool matvec_dense_accepts(const MatmulArgs& args);
cudaError_t launch_matvec_dense(const MatmulArgs& args, cudaStream_t stream);

// At most 16 rows of 16-bit floats.
bool matvec_w16a16_accepts(const MatmulArgs& args);
cudaError_t launch_matvec_w16a16_mma(const MatmulArgs& args, cudaStream_t stream);

// 16-bit floats, rows of whole 16 bytes.
bool matmul_w16a16_accepts(const MatmulArgs& args);
cudaError_t launch_matmul_w16a16_mma(const MatmulArgs& args, cudaStream_t stream);

// cuBLASLt, where the machine has it. *scratch_bytes is for the call that follows.
bool cublaslt_accepts(const MatmulArgs& args, uint64_t* scratch_bytes);
cudaError_t launch_matmul_cublaslt(const MatmulArgs& args, void* scratch, uint64_t scratch_bytes,
                                   cudaStream_t stream);

// Picks one of them.
uint64_t matmul_scratch_bytes(const MatmulArgs& args);
cudaError_t launch_matmul(const MatmulArgs& args, void* scratch, uint64_t scratch_bytes,
                          cudaStream_t stream);

}  // namespace cuda_int4
