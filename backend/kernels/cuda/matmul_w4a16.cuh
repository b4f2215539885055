// Launchers of cuda_int4::linear on coalesced.v1 for M > 16, activation "none", x fp16 or bf16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../ops.h"

namespace cuda_int4 {

struct MatmulW4A16Args {  // device pointers; sizes in elements
  const void* x;
  const void* qdata;
  const void* scale;
  const void* zero_point;  // nullptr: 8
  const void* bias;        // nullptr: 0
  void* y;
  DType dtype;  // of x, bias and y
  DType scale_dtype;
  DType zero_point_dtype;
  int64_t M, N, K, group_size;
  bool constant_weights;  // ExecutionContext
};

// Tensor cores of sm_80 and later.
cudaError_t launch_matmul_w4a16_mma(const MatmulW4A16Args& args, cudaStream_t stream);

// Tensor cores of sm_90a, and only there. x at 16 bytes, sizes within 31 bits, a driver that knows
// tensor maps: else false.
bool can_matmul_w4a16_wgmma(const MatmulW4A16Args& args);
uint64_t matmul_w4a16_wgmma_scratch_bytes(const MatmulW4A16Args& args, int n_multiprocessors);
cudaError_t launch_matmul_w4a16_wgmma(const MatmulW4A16Args& args, void* scratch,
                                      int n_multiprocessors, cudaStream_t stream);

// The entries of the table of CUDA kernels (cuda_kernels.h); arguments have passed validate_linear.
uint64_t matmul_w4a16_scratch_bytes(const LinearArgs& args);
Status matmul_w4a16(const LinearArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
