// The seam between the library and its CUDA kernels: one table, null in a build without nvcc.
//
// cuda_kernels.cu fills it; cuda_kernels_none.cpp stands in where there is no nvcc. Nothing outside
// backend/kernels/cuda includes a CUDA header.
#pragma once

#include "../ops.h"
#include "../sampling.h"
#include "math_kernels.h"
#include "tensor_kernels.h"

namespace cuda_int4 {

struct CudaKernels {
  // coalesced.v1, activation "none"; arguments have passed validate_linear. Asynchronous: returns
  // when the work is on context.stream.
  Status (*linear_coalesced_w4a16)(const LinearArgs& args, const ExecutionContext& context);
  // x to quantized_activation.h; x has passed quantize_activation or validate_linear.
  Status (*quantize_int8)(const TensorView& x, void* to, const ExecutionContext& context);
  // coalesced.v1, activation "int8"; context.quantized_x holds x.
  Status (*linear_coalesced_w4a8)(const LinearArgs& args, const ExecutionContext& context);
  // coalesced.v1, activation "none", x fp16 or bf16: tensor cores.
  uint64_t (*matmul_w4a16_scratch_bytes)(const LinearArgs& args);
  Status (*matmul_w4a16)(const LinearArgs& args, const ExecutionContext& context);
  const MathKernels* math;  // reductions, norms, products: math_kernels.h
  // Arguments have passed validate_attention; scratch depends on shapes only.
  uint64_t (*attention_scratch_bytes)(const AttentionArgs& args);
  Status (*attention)(const AttentionArgs& args, const ExecutionContext& context);
  const TensorKernels* tensor;  // elementwise, copies, indices: tensor_kernels.h
  // marlin.v1 and marlin24.v1, activation "none", M > 16, x fp16 or bf16.
  uint64_t (*matmul_marlin_scratch_bytes)(const LinearArgs& args);
  Status (*matmul_marlin)(const LinearArgs& args, const ExecutionContext& context);
  uint64_t (*matmul_marlin24_scratch_bytes)(const LinearArgs& args);
  Status (*matmul_marlin24)(const LinearArgs& args, const ExecutionContext& context);
  // marlin.v1: M <= 16, or any M of fp32 and of activation "int8" (context.quantized_x holds x).
  uint64_t (*matvec_marlin_scratch_bytes)(const LinearArgs& args);
  Status (*matvec_marlin)(const LinearArgs& args, const ExecutionContext& context);
  // marlin24.v1, any M and dtype of x; activation "int8": context.quantized_x holds x.
  Status (*matvec_marlin24)(const LinearArgs& args, const ExecutionContext& context);
  // What a decode loop on the device queues behind each step.
  Status (*sample)(const SampleArgs& args, const ExecutionContext& context);
};

// nullptr: built without CUDA.
const CudaKernels* cuda_kernels();

}  // namespace cuda_int4
