// The generic ops on CUDA: one OpFunction each, which takes the call apart (op_arguments.h), resizes
// `out`, and calls a kernel of kernels/cuda through cuda_kernels().
//
// The lists are the same in a build without nvcc, so a .pte exported there holds the same graph.
#pragma once

#include <executorch/runtime/core/span.h>
#include <executorch/runtime/kernel/operator_registry.h>

namespace cuda_int4 {

struct CudaOp {
  const char* graph_name;  // "aten::mul.out"
  executorch::runtime::OpFunction kernel;
};
using CudaOps = executorch::runtime::Span<const CudaOp>;

CudaOps cuda_elementwise_ops();  // cuda_ops_elementwise.cpp: arithmetic, comparisons, where, casts
CudaOps cuda_shape_ops();        // cuda_ops_shape.cpp: views that copy, cat, pad, making tensors
CudaOps cuda_index_ops();        // cuda_ops_index.cpp: embedding, gather, index, index_put, scatter
CudaOps cuda_reduce_ops();       // cuda_ops_reduce.cpp: sum, argmax, softmax, norms, cumsum, topk
CudaOps cuda_convolution_ops();  // cuda_ops_convolution.cpp: convolution, pooling
CudaOps cuda_matmul_ops();       // cuda_ops_matmul.cpp: linear, bmm, mm, addmm

/// All of them.
executorch::runtime::Span<const CudaOps> cuda_op_families();

}  // namespace cuda_int4
