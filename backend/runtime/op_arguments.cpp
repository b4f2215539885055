#include "op_arguments.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <cstdio>
#include <limits>

#include "../kernels/checks.h"
#include "errors.h"
#include "tensor_bridge.h"

namespace cuda_int4 {

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;

OpArguments::OpArguments(const char* op, Stack stack, size_t n_schema)
    : op_(op), stack_(stack), error_(Error::Ok) {
  // The emitter appends what an out variant returns, which is `out` again.
  if (stack.size() != n_schema && stack.size() != n_schema + 1)
    error_ = fail(Error::InvalidProgram,
                  "cuda_int4::%s: expected %zu arguments, got %zu; the .pte is damaged, export it "
                  "again",
                  op, n_schema, stack.size());
}

void OpArguments::set_error(Error error) {
  if (error_ == Error::Ok) error_ = error;
}

const EValue* OpArguments::at(size_t i) const {
  return error_ == Error::Ok && i < stack_.size() ? stack_[i] : nullptr;
}

void OpArguments::wrong(size_t i, const char* expected) {
  if (error_ != Error::Ok) return;  // the first one is what went wrong
  error_ = fail(Error::InvalidProgram,
                "cuda_int4::%s: expected argument %zu to be %s; the .pte is damaged, export it "
                "again",
                op_, i, expected);
}

TensorView OpArguments::tensor(size_t i) {
  TensorView view = absent_view();
  const EValue* value = at(i);
  if (value == nullptr) return view;
  auto t = value->tryToTensor();
  if (!t.ok() || !view_of(t.get(), &view)) wrong(i, "a tensor");
  return checked(view);
}

/// A program can have tensors that nothing gives memory to, and sizes whose product wraps around.
TensorView OpArguments::checked(const TensorView& view) {
  if (error_ != Error::Ok || !view.present()) return view;
  char who[96];
  std::snprintf(who, sizeof(who), "cuda_int4::%s", op_);
  const TensorCheck check = {who, "a tensor", "the .pte is damaged, export it again"};
  int64_t numel = 0;
  Status status = check_sizes(check, view, &numel);
  if (status.ok() && numel > 0) status = check_data(check, view);
  error_ = fail(status);
  return view;
}

bool OpArguments::is_none(size_t i) const {
  const EValue* value = at(i);
  return value == nullptr || value->isNone();
}

TensorView OpArguments::optional_tensor(size_t i) { return is_none(i) ? absent_view() : tensor(i); }

int64_t OpArguments::integer(size_t i) {
  const EValue* value = at(i);
  auto v = value == nullptr ? Error::InvalidType : value->tryToInt();
  return v.ok() ? v.get() : (wrong(i, "an int"), 0);
}

int64_t OpArguments::integer_or(size_t i, int64_t if_none) {
  return is_none(i) ? if_none : integer(i);
}

double OpArguments::number(size_t i) { return scalar(i).as_double; }

bool OpArguments::boolean(size_t i) {
  const EValue* value = at(i);
  auto v = value == nullptr ? Error::InvalidType : value->tryToBool();
  return v.ok() ? v.get() : (wrong(i, "a bool"), false);
}

ScalarArgument OpArguments::scalar(size_t i) {
  ScalarArgument scalar;
  const EValue* value = at(i);
  if (value != nullptr && value->isInt()) {
    scalar.as_int = value->toInt();
    scalar.as_double = double(scalar.as_int);
  } else if (value != nullptr && value->isBool()) {
    scalar.kind = ScalarArgument::Kind::kBool;
    scalar.as_int = value->toBool();
    scalar.as_double = double(scalar.as_int);
  } else if (value != nullptr && value->isDouble()) {
    scalar.kind = ScalarArgument::Kind::kDouble;
    scalar.as_double = value->toDouble();
  } else {
    wrong(i, "a number");
  }
  return scalar;
}

const char* OpArguments::string(size_t i) {
  const EValue* value = at(i);
  auto v = value == nullptr ? Error::InvalidType : value->tryToString();
  return v.ok() ? v.get().data() : (wrong(i, "a string"), "");
}

size_t OpArguments::integers(size_t i, int64_t* values, size_t capacity) {
  if (is_none(i)) return 0;
  auto list = at(i)->tryToIntList();
  if (!list.ok() || list->size() > capacity) {
    char expected[64];
    std::snprintf(expected, sizeof(expected), "a list of at most %zu ints", capacity);
    wrong(i, expected);
    return 0;
  }
  for (size_t j = 0; j < list->size(); ++j) values[j] = (*list)[j];
  return list->size();
}

TensorView OpArguments::out(size_t i, const TensorView& like, int64_t last) {
  int64_t sizes[kMaxDims] = {0};
  for (int d = 0; d < like.ndim; ++d) sizes[d] = like.sizes[d];
  if (last >= 0 && like.ndim > 0) sizes[like.ndim - 1] = last;
  return out(i, sizes, like.ndim);
}

size_t OpArguments::list_size(size_t i) {
  const EValue* value = at(i);
  if (value == nullptr) return 0;
  if (value->isListOptionalTensor()) {
    auto list = value->tryToListOptionalTensor();
    return list.ok() ? list->size() : (wrong(i, "a list of tensors"), 0);
  }
  auto list = value->tryToTensorList();
  return list.ok() ? list->size() : (wrong(i, "a list of tensors"), 0);
}

TensorView OpArguments::list_tensor(size_t i, size_t j) {
  TensorView view = absent_view();
  if (j >= list_size(i)) return view;  // of a list that was refused there is none either
  const EValue* value = at(i);
  bool known = true;
  if (value->isListOptionalTensor()) {
    const auto& t = (*value->tryToListOptionalTensor())[j];
    if (t.has_value()) known = view_of(*t, &view);
  } else {
    known = view_of((*value->tryToTensorList())[j], &view);
  }
  if (!known) wrong(i, "a list of tensors of known dtypes");
  return checked(view);
}

TensorView OpArguments::out(size_t i, const int64_t* sizes, int ndim) {
  const EValue* value = at(i);
  if (value == nullptr || ndim < 0) return absent_view();
  auto t = value->tryToTensor();
  if (t.ok()) return resized(t.get(), sizes, ndim);
  wrong(i, "a tensor");
  return absent_view();
}

TensorView OpArguments::list_out(size_t i, size_t j, const int64_t* sizes, int ndim) {
  const EValue* value = at(i);
  if (value == nullptr || ndim < 0) return absent_view();
  auto list = value->tryToTensorList();
  if (list.ok() && j < list->size()) return resized((*list)[j], sizes, ndim);
  wrong(i, "a list of as many tensors as the op gives");
  return absent_view();
}

TensorView OpArguments::resized(Tensor tensor, const int64_t* sizes, int ndim) {
  TensorView view = absent_view();
  if (ndim > kMaxDims) {
    set_error(fail(Error::NotSupported,
                   "cuda_int4::%s: expected a result of at most %d dimensions, got %d", op_,
                   kMaxDims, ndim));
    return view;
  }
  SizesType as_sizes[kMaxDims] = {0};
  bool fits = true;
  for (int d = 0; d < ndim; ++d) {
    fits = fits && sizes[d] >= 0 && sizes[d] <= std::numeric_limits<SizesType>::max();
    as_sizes[d] = SizesType(sizes[d]);
  }
  if (!fits || executorch::runtime::resize_tensor(tensor, {as_sizes, size_t(ndim)}) != Error::Ok) {
    error_ = fail(Error::InvalidArgument,
                  "cuda_int4::%s: the result does not fit the memory planned for it; run with at "
                  "most the sizes the model was exported for",
                  op_);
    return view;
  }
  if (!view_of(tensor, &view))
    set_error(fail(Error::InvalidProgram,
                   "cuda_int4::%s: expected a result of a known dtype; the .pte is damaged, export "
                   "it again",
                   op_));
  return checked(view);
}

}  // namespace cuda_int4
