// Checks on TensorViews that all validators share, and the one way to make an error Status.
//
// Each returns Status: kOk, or a message of the form "who: expected what, got what; what to do".
#pragma once

#include "tensor_view.h"

namespace cuda_int4 {

// Sizes above this are refused before anything is multiplied: products of two stay inside int64.
constexpr int64_t kMaxDim = INT32_MAX;
constexpr int64_t kMaxElems = int64_t{1} << 48;

__attribute__((format(printf, 2, 3))) Status error(StatusCode code, const char* format, ...);

const char* dtype_name(DType dtype);
int64_t dtype_bytes(DType dtype);  // 0: not a dtype of ours
bool is_float_kind(DType dtype);   // float16, bfloat16, float32: what kernels compute with

// "[2, 3, 64]", or "none" for an absent tensor; lives as long as the object.
struct ShapeText {
  explicit ShapeText(const TensorView& view);
  char text[192];
};

// `who` is the weight or op, `part` the tensor in it; `cure` ends the message of every failure.
struct TensorCheck {
  const char* who;
  const char* part;
  const char* cure;
};

// Present, of a known dtype, each size and their product in range. *numel is set on success.
Status check_sizes(const TensorCheck& check, const TensorView& view, int64_t* numel);
// check_sizes, strides not negative, and nbytes reaching to the last element.
Status check_strided(const TensorCheck& check, const TensorView& view, int64_t* numel);
// check_sizes, row-major without gaps (strides of dimensions of size 1 do not matter), and nbytes
// exactly that of the elements.
Status check_contiguous(const TensorCheck& check, const TensorView& view, int64_t* numel);
Status check_float_kind(const TensorCheck& check, const TensorView& view);
Status check_shape(const TensorCheck& check, const TensorView& view, int ndim,
                   const int64_t* sizes);
Status check_same_shape(const TensorCheck& check, const TensorView& view,
                        const TensorView& expected);
// data % alignment == 0; a null pointer passes (metadata only).
Status check_alignment(const TensorCheck& check, const TensorView& view, int64_t alignment);
// data != nullptr unless the tensor has no bytes.
Status check_data(const TensorCheck& check, const TensorView& view);

// The scratch the op asked for is there.
Status check_scratch(const char* who, const ExecutionContext& context, uint64_t needed_bytes);

// For ops that have CPU kernels only.
Status check_cpu_device(const char* who, const ExecutionContext& context);

#define CUDA_INT4_RETURN_IF_ERROR(expr)              \
  do {                                               \
    ::cuda_int4::Status status_of_expr = (expr);     \
    if (!status_of_expr.ok()) return status_of_expr; \
  } while (0)

}  // namespace cuda_int4
