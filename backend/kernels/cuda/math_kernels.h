// The generic CUDA kernels of reduction, norm and product kind, as one table of functions on plain
// arguments: what runtime/cuda_ops_reduce.cpp and cuda_ops_matmul.cpp call. math_kernels.cu fills it.
#pragma once

#include "../ops.h"
#include "convolution.h"
#include "matmul.h"
#include "reduce.h"
#include "row_args.h"

namespace cuda_int4 {

struct MathKernels {
  // Arguments have passed validate_rms_norm and validate_silu.
  Status (*rms_norm)(const RmsNormArgs& args, const ExecutionContext& context);
  Status (*silu)(const SiluArgs& args, const ExecutionContext& context);
  // Likewise validate_add_rms_norm, validate_gate_mul and validate_rope_append.
  Status (*add_rms_norm)(const AddRmsNormArgs& args, const ExecutionContext& context);
  Status (*gate_mul)(const GateMulArgs& args, const ExecutionContext& context);
  Status (*rope_append)(const RopeAppendArgs& args, const ExecutionContext& context);

  // Any real dtype; shapes and strides are the caller's to have checked.
  uint64_t (*matmul_scratch_bytes)(const MatmulArgs& args);
  Status (*matmul)(const MatmulArgs& args, const ExecutionContext& context);

  uint64_t (*reduce_scratch_bytes)(const ReduceArgs& args);
  Status (*reduce)(const ReduceArgs& args, const ExecutionContext& context);
  Status (*softmax)(const SoftmaxArgs& args, const ExecutionContext& context);
  Status (*layer_norm)(const LayerNormArgs& args, const ExecutionContext& context);
  Status (*group_norm)(const GroupNormArgs& args, const ExecutionContext& context);
  Status (*batch_norm)(const BatchNormArgs& args, const ExecutionContext& context);
  Status (*cumsum)(const CumsumArgs& args, const ExecutionContext& context);
  Status (*glu)(const GluArgs& args, const ExecutionContext& context);
  uint64_t (*topk_scratch_bytes)(const TopkArgs& args);
  Status (*topk)(const TopkArgs& args, const ExecutionContext& context);

  uint64_t (*convolution_scratch_bytes)(const ConvolutionArgs& args);
  Status (*convolution)(const ConvolutionArgs& args, const ExecutionContext& context);
  Status (*pool)(const PoolArgs& args, const ExecutionContext& context);
};

extern const MathKernels kMathKernels;  // only in a build with nvcc: go through cuda_kernels()

// For an op on CUDA in a build without nvcc, where cuda_kernels() is null.
Status built_without_cuda(const char* who);

}  // namespace cuda_int4
