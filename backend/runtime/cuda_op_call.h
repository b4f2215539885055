// What the OpFunctions of reductions and products share: saying what a call got wrong, and reaching
// the kernels.
#pragma once

#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include "../kernels/cuda/math_kernels.h"
#include "op_arguments.h"

namespace cuda_int4 {

/// Unless `right`, the call fails: "cuda_int4::<op>: <reason>". The first failure stays.
void expect(OpArguments& a, bool right, const char* reason, ...)
    __attribute__((format(printf, 3, 4)));

/// Row-major without gaps, with all its bytes there.
void expect_contiguous(OpArguments& a, const char* part, const TensorView& view);

/// The kernels, or nullptr and a failed call in a build without nvcc or after an earlier failure.
const MathKernels* math_kernels(OpArguments& a);

/// Hands what went wrong, if anything did, to ExecuTorch.
void finish(executorch::runtime::KernelRuntimeContext& context, const OpArguments& a);

/// A dimension of the schema, negative ones counted from the end, as 0..ndim-1; a scalar has one.
int dimension(OpArguments& a, int64_t dim, int ndim);

}  // namespace cuda_int4
