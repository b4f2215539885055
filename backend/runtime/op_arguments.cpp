#include "op_arguments.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

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
    wrong(i, "a list of ints of at most 8 values");
    return 0;
  }
  for (size_t j = 0; j < list->size(); ++j) values[j] = (*list)[j];
  return list->size();
}

size_t OpArguments::tensors(size_t i, TensorView* views, size_t capacity) {
  const EValue* value = at(i);
  if (value == nullptr) return 0;
  size_t n = 0;
  if (value->isListOptionalTensor()) {
    auto list = value->tryToListOptionalTensor();
    if (!list.ok() || list->size() > capacity) return wrong(i, "a list of tensors"), 0;
    for (const auto& t : *list) {
      views[n] = absent_view();
      if (t.has_value() && !view_of(*t, &views[n])) return wrong(i, "a list of tensors"), 0;
      ++n;
    }
    return n;
  }
  auto list = value->tryToTensorList();
  if (!list.ok() || list->size() > capacity) return wrong(i, "a list of tensors"), 0;
  for (const Tensor& t : *list)
    if (!view_of(t, &views[n++])) return wrong(i, "a list of tensors"), 0;
  return n;
}

TensorView OpArguments::out(size_t i, const TensorView& like, int64_t last) {
  int64_t sizes[kMaxDims] = {0};
  for (int d = 0; d < like.ndim; ++d) sizes[d] = like.sizes[d];
  if (last >= 0 && like.ndim > 0) sizes[like.ndim - 1] = last;
  return out(i, sizes, like.ndim);
}

TensorView OpArguments::out(size_t i, const int64_t* sizes, int ndim) {
  TensorView view = absent_view();
  const EValue* value = at(i);
  if (value == nullptr || ndim < 0) return view;
  auto t = value->tryToTensor();
  if (!t.ok()) {
    wrong(i, "a tensor");
    return view;
  }
  SizesType as_sizes[kMaxDims] = {0};
  for (int d = 0; d < ndim; ++d) as_sizes[d] = SizesType(sizes[d]);
  Tensor tensor = t.get();
  if (executorch::runtime::resize_tensor(tensor, {as_sizes, size_t(ndim)}) != Error::Ok) {
    error_ = fail(Error::InvalidArgument,
                  "cuda_int4::%s: the result does not fit the memory planned for it; run with at "
                  "most the sizes the model was exported for",
                  op_);
    return view;
  }
  if (!view_of(tensor, &view)) wrong(i, "a tensor of a known dtype");
  return view;
}

}  // namespace cuda_int4
