// ExecuTorch tensors as TensorViews and back.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

/// A view of `tensor`, which must outlive it. False: more than kMaxDims dimensions, or a dtype that
/// TensorView does not carry.
bool view_of(const executorch::aten::Tensor& tensor, TensorView* out);

/// "No tensor".
TensorView absent_view();

/// Sets contiguous strides and nbytes from dtype, ndim and sizes.
void make_contiguous(TensorView* view);

}  // namespace cuda_int4
