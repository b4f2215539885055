// OpArguments -- takes the arguments of one call of an op apart, without ever asserting on what a
// damaged file put there. After the first wrong one, error() is set and the rest come back empty.
//
//   OpArguments a("rms_norm.out", stack, 4);
//   args.x = a.tensor(0);
//   args.y = a.out(3, args.x);
//   if (a.error() != Error::Ok) return context.fail(a.error());
#pragma once

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/span.h>

#include <cstdint>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

// A number argument as the schema's Scalar: kept as it came, so that int64 stays exact.
struct ScalarArgument {
  enum class Kind { kInt, kDouble, kBool } kind = Kind::kInt;
  int64_t as_int = 0;
  double as_double = 0;  // set for every kind
};

class OpArguments {
 public:
  using Stack = executorch::runtime::Span<executorch::runtime::EValue*>;

  /// `op`: name without the namespace. `n_schema`: arguments of its schema, `out` included.
  OpArguments(const char* op, Stack stack, size_t n_schema);

  executorch::runtime::Error error() const { return error_; }
  /// The caller's own finding; the first one stays.
  void set_error(executorch::runtime::Error error);
  const char* op() const { return op_; }

  /// A tensor of sane sizes that has its data.
  TensorView tensor(size_t i);
  TensorView optional_tensor(size_t i);
  bool is_none(size_t i) const;
  int64_t integer(size_t i);
  int64_t integer_or(size_t i, int64_t if_none);
  double number(size_t i);
  bool boolean(size_t i);
  ScalarArgument scalar(size_t i);
  /// Strings of a program are followed by a NUL.
  const char* string(size_t i);
  /// At most `capacity` values into `values`, their count back; None is 0 values.
  size_t integers(size_t i, int64_t* values, size_t capacity);
  /// The length of a list of tensors, and tensor j of it (absent if it is None).
  size_t list_size(size_t i);
  TensorView list_tensor(size_t i, size_t j);

  /// The out tensor, resized to the sizes of `like` with `last` (if >= 0) for the last dimension.
  TensorView out(size_t i, const TensorView& like, int64_t last = -1);
  /// The out tensor, resized to `sizes`.
  TensorView out(size_t i, const int64_t* sizes, int ndim);
  /// Tensor j of a list of out tensors, resized to `sizes`.
  TensorView list_out(size_t i, size_t j, const int64_t* sizes, int ndim);

 private:
  TensorView resized(executorch::aten::Tensor tensor, const int64_t* sizes, int ndim);
  TensorView checked(const TensorView& view);
  const executorch::runtime::EValue* at(size_t i) const;
  void wrong(size_t i, const char* expected);

  const char* op_;
  Stack stack_;
  executorch::runtime::Error error_;
};

}  // namespace cuda_int4
