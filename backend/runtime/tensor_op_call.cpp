#include "tensor_op_call.h"

#include "errors.h"
#include "execution.h"
#include "tensor_bridge.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

namespace {

constexpr char kContiguousCure[] = "export the model with contiguous tensors";

bool is_float(DType dtype) { return is_float_kind(dtype) || dtype == DType::kFloat64; }

}  // namespace

Number number_of(const ScalarArgument& scalar) {
  const bool is_double = scalar.kind == ScalarArgument::Kind::kDouble;
  // Of a number that int64 does not hold nothing is left: no op computes in int64 with one.
  const bool fits = scalar.as_double > -9.2e18 && scalar.as_double < 9.2e18;
  return {scalar.as_double, !is_double ? scalar.as_int : fits ? int64_t(scalar.as_double) : 0};
}

Number number_of(int64_t value) { return {double(value), value}; }

TensorOpCall::TensorOpCall(const char* op, Stack stack, size_t n_schema)
    : OpArguments(op, stack, n_schema) {}

void TensorOpCall::check(const Status& status) {
  if (ok()) set_error(fail(status));
}

void TensorOpCall::require(bool holds, const char* expected) {
  if (!holds && ok())
    set_error(fail(Error::InvalidArgument, "cuda_int4::%s: expected %s; %s", op(), expected,
                   "run with sizes the model was exported for"));
}

void TensorOpCall::require_contiguous(const TensorView& view) {
  int64_t n = 0;
  if (ok()) check(check_contiguous({op(), "a tensor", kContiguousCure}, view, &n));
}

int TensorOpCall::dim(int64_t given, int ndim) {
  const int64_t n = ndim == 0 ? 1 : ndim;
  const bool fits = given >= -n && given < n;
  require(fits, "a dimension that the tensor has");
  return fits ? int(given < 0 ? given + n : given) : 0;
}

const TensorKernels* TensorOpCall::kernels() {
  if (!ok()) return nullptr;
  if (cuda_kernels() == nullptr) {
    check(built_without_cuda(op()));
    return nullptr;
  }
  return cuda_kernels()->tensor;
}

void TensorOpCall::move(const TensorView& to, const TensorView& from) {
  if (!ok()) return;
  require(same_sizes(to, from), "operands whose sizes fit each other");
  if (to.dtype == from.dtype) {
    const CopyPart part = {to, from};
    if (const TensorKernels* table = kernels())
      check(table->copy(op(), &part, 1, current_execution()));
    return;
  }
  ElementwiseArgs args = {};
  args.op = ElementwiseOp::kCopy;
  args.compute = !is_float(from.dtype)           ? ComputeType::kInt64
                 : from.dtype == DType::kFloat64 ? ComputeType::kFloat64
                                                 : ComputeType::kFloat32;
  args.n_in = 1;
  args.in[0] = from;
  args.out = to;
  elementwise(args);
}

void TensorOpCall::add_part(const TensorView& to, const TensorView& from) {
  if (!ok()) return;
  if (to.dtype != from.dtype) return move(to, from);
  require(same_sizes(to, from), "operands whose sizes fit each other");
  if (numel(to) == 0) return;
  if (n_parts_ > 0 && dtype_bytes(to.dtype) != dtype_bytes(parts_[0].to.dtype)) flush();
  parts_[n_parts_++] = {to, from};
  if (n_parts_ == kMaxParts) flush();
}

void TensorOpCall::flush() {
  if (n_parts_ == 0) return;
  if (const TensorKernels* table = kernels())
    check(table->copy(op(), parts_, n_parts_, current_execution()));
  n_parts_ = 0;
}

void TensorOpCall::elementwise(const ElementwiseArgs& args) {
  if (const TensorKernels* table = kernels()) {
    ElementwiseArgs named = args;
    named.who = op();
    check(table->elementwise(named, current_execution()));
  }
}

void TensorOpCall::fill(const TensorView& out, Number start, Number step) {
  if (const TensorKernels* table = kernels())
    check(table->fill({op(), out, start, step}, current_execution()));
}

void TensorOpCall::finish(KernelRuntimeContext& context) {
  flush();
  if (!ok()) context.fail(error());
}

TensorView sliced(const TensorView& view, int dim, int64_t start, int64_t length, int64_t step) {
  TensorView part = view;
  const int64_t offset = start * view.strides[dim] * dtype_bytes(view.dtype);
  if (length > 0 && view.data != nullptr) part.data = static_cast<char*>(view.data) + offset;
  part.sizes[dim] = length;
  part.strides[dim] = view.strides[dim] * step;
  return part;
}

TensorView selected(const TensorView& view, int dim, int64_t index) {
  TensorView part = sliced(view, dim, index, 1);
  --part.ndim;
  for (int d = dim; d < part.ndim; ++d) {
    part.sizes[d] = view.sizes[d + 1];
    part.strides[d] = view.strides[d + 1];
  }
  return part;
}

bool expanded(const TensorView& view, const int64_t* sizes, int ndim, TensorView* out) {
  *out = view;
  out->ndim = ndim;
  const int missing = ndim - view.ndim;
  if (missing < 0) return false;
  for (int d = 0; d < ndim; ++d) {
    const bool there = d >= missing;
    if (there && view.sizes[d - missing] != sizes[d] && view.sizes[d - missing] != 1) return false;
    out->sizes[d] = sizes[d];
    out->strides[d] = there && view.sizes[d - missing] == sizes[d] ? view.strides[d - missing] : 0;
  }
  return true;
}

TensorView reshaped(const TensorView& view, const int64_t* sizes, int ndim) {
  TensorView other = view;
  other.ndim = ndim;
  for (int d = 0; d < ndim; ++d) other.sizes[d] = sizes[d];
  make_contiguous(&other);
  return other;
}

int64_t numel(const TensorView& view) {
  int64_t n = 1;
  for (int d = 0; d < view.ndim; ++d) n *= view.sizes[d];
  return n;
}

bool same_sizes(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

}  // namespace cuda_int4
