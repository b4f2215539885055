#include "tensor_bridge.h"

#include "../kernels/checks.h"

namespace cuda_int4 {

bool view_of(const executorch::aten::Tensor& tensor, TensorView* out) {
  *out = TensorView{};
  out->dtype = static_cast<DType>(tensor.scalar_type());
  if (tensor.dim() > kMaxDims || dtype_bytes(out->dtype) == 0) return false;
  out->data = const_cast<void*>(tensor.const_data_ptr());
  out->nbytes = tensor.nbytes();
  out->ndim = int32_t(tensor.dim());
  for (int i = 0; i < out->ndim; ++i) {
    out->sizes[i] = tensor.sizes()[size_t(i)];
    out->strides[i] = tensor.strides()[size_t(i)];
  }
  return true;
}

TensorView absent_view() {
  TensorView view{};
  view.ndim = -1;
  return view;
}

void make_contiguous(TensorView* view) {
  uint64_t stride = 1;  // of a tensor without elements it may wrap around, and means nothing
  for (int i = view->ndim - 1; i >= 0; --i) {
    view->strides[i] = int64_t(stride);
    stride *= uint64_t(view->sizes[i]);
  }
  view->nbytes = stride * uint64_t(dtype_bytes(view->dtype));
}

}  // namespace cuda_int4
