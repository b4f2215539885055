// Reductions, order, softmax and norms on CUDA. Shapes, dtypes and what is refused are ATen's, and
// those of ExecuTorch's CPU kernels where the two differ.
#include <algorithm>
#include <iterator>

#include "../kernels/checks.h"
#include "../kernels/cuda/reduce.h"
#include "../kernels/cuda/row_args.h"
#include "cuda_op_call.h"
#include "cuda_ops.h"
#include "errors.h"
#include "execution.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

namespace {

using Stack = Span<EValue*>;

bool is_floating(DType dtype) { return is_float_kind(dtype) || dtype == DType::kFloat64; }

void expect_floating(OpArguments& a, const char* part, const TensorView& view) {
  expect(a, is_floating(view.dtype), "expected %s of a float dtype, got %s; cast it first", part,
         dtype_name(view.dtype));
}

void expect_dtype(OpArguments& a, const char* part, const TensorView& view, DType dtype) {
  expect(a, view.dtype == dtype, "expected %s of dtype %s, got %s; export the model again", part,
         dtype_name(dtype), dtype_name(view.dtype));
}

int64_t numel_of(const TensorView& view) {
  int64_t numel = 1;
  for (int d = 0; d < view.ndim; ++d) numel *= view.sizes[d];
  return numel;
}

/// Adds a dimension inside those that are there, merged with the last where memory allows.
void push(Walk* walk, int64_t size, int64_t stride) {
  if (size == 1) return;
  if (walk->ndim > 0 && walk->strides[walk->ndim - 1] == size * stride) {
    walk->sizes[walk->ndim - 1] *= size;
    walk->strides[walk->ndim - 1] = stride;
    return;
  }
  walk->sizes[walk->ndim] = size;
  walk->strides[walk->ndim++] = stride;
}

// A reduction taken apart: which dimensions go, and the sizes of what is left.
struct Plan {
  ReduceArgs args = {};
  int64_t out_sizes[kMaxDims] = {0};
  int out_ndim = 0;
};

Plan plan_reduction(const TensorView& x, const bool (&goes)[kMaxDims], bool keepdim,
                    Reduction reduction) {
  Plan plan;
  plan.args.x = x.data;
  plan.args.dtype = x.dtype;
  plan.args.reduction = reduction;
  plan.args.n_out = plan.args.n_reduced = 1;
  for (int d = 0; d < x.ndim; ++d) {
    if (goes[d]) {
      plan.args.n_reduced *= x.sizes[d];
      push(&plan.args.reduced, x.sizes[d], x.strides[d]);
      if (keepdim) plan.out_sizes[plan.out_ndim++] = 1;
    } else {
      plan.args.n_out *= x.sizes[d];
      push(&plan.args.kept, x.sizes[d], x.strides[d]);
      plan.out_sizes[plan.out_ndim++] = x.sizes[d];
    }
  }
  return plan;
}

/// Over the dimensions in argument `i`, an int[] or None; none of them means all.
Plan plan_dims(OpArguments& a, const TensorView& x, size_t i, bool keepdim, Reduction reduction) {
  int64_t dims[kMaxDims];
  const size_t n = a.integers(i, dims, kMaxDims);
  bool goes[kMaxDims] = {false};
  for (size_t j = 0; j < n && a.error() == Error::Ok; ++j) {
    const int d = dimension(a, dims[j], x.ndim);
    expect(a, !goes[d], "expected each dim once, got %d twice; fix the call", d);
    goes[d] = true;
  }
  if (n == 0) std::fill(goes, goes + kMaxDims, true);
  return plan_reduction(x, goes, keepdim, reduction);
}

/// Over one dimension.
Plan plan_dim(OpArguments& a, const TensorView& x, int64_t dim, bool keepdim, Reduction reduction) {
  bool goes[kMaxDims] = {false};
  goes[dimension(a, dim, x.ndim)] = true;
  return plan_reduction(x, goes, keepdim, reduction);
}

Plan plan_all(const TensorView& x, Reduction reduction) {
  bool goes[kMaxDims];
  std::fill(goes, goes + kMaxDims, true);
  return plan_reduction(x, goes, false, reduction);
}

/// The out tensor of a reduction, of the plan's sizes.
TensorView reduced_out(OpArguments& a, size_t i, const Plan& plan) {
  const TensorView out = a.out(i, plan.out_sizes, plan.out_ndim);
  expect_contiguous(a, "out", out);
  return out;
}

void run_reduction(KernelRuntimeContext& context, OpArguments& a, const ReduceArgs& args) {
  const bool is_extreme =
      args.reduction == Reduction::kMaximum || args.reduction == Reduction::kMinimum;
  expect(a, !is_extreme || args.n_out == 0 || args.n_reduced > 0,
         "expected at least one value to choose from, got none; pass a tensor that is not empty");
  if (const MathKernels* math = math_kernels(a)) {
    ExecutionContext execution = current_execution();
    a.set_error(give_scratch(context, math->reduce_scratch_bytes(args), &execution));
    if (a.error() == Error::Ok) a.set_error(fail(math->reduce(args, execution)));
  }
  finish(context, a);
}

void run_into(KernelRuntimeContext& context, OpArguments& a, Plan plan, size_t out) {
  const TensorView view = reduced_out(a, out, plan);
  plan.args.out = view.data;
  plan.args.out_dtype = view.dtype;
  run_reduction(context, a, plan.args);
}

// ---- sums and products ----

// sum.IntList(self, dim?, keepdim, dtype?, *, out), mean.out(likewise): out's dtype says dtype
template <Reduction kReduction>
void sum_dims(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kReduction == Reduction::kMean ? "mean.out" : "sum.IntList_out", stack, 5);
  const TensorView x = a.tensor(0), planned = a.tensor(4);
  const Plan plan = plan_dims(a, x, 1, a.boolean(2), kReduction);
  if (kReduction == Reduction::kMean) expect_floating(a, "out", planned);
  run_into(context, a, plan, 4);
}

// mean.dtype(self, dtype?, *, out)
void mean_all(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("mean.dtype_out", stack, 3);
  const TensorView x = a.tensor(0);
  expect_floating(a, "out", a.tensor(2));
  run_into(context, a, plan_all(x, Reduction::kMean), 2);
}

// prod.int(self, dim, keepdim, dtype?, *, out)
void prod_dim(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("prod.int_out", stack, 5);
  const TensorView x = a.tensor(0);
  run_into(context, a, plan_dim(a, x, a.integer(1), a.boolean(2), Reduction::kProduct), 4);
}

// prod(self, dtype?, *, out)
void prod_all(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("prod.out", stack, 3);
  const TensorView x = a.tensor(0);
  run_into(context, a, plan_all(x, Reduction::kProduct), 2);
}

// ---- any ----

void expect_bool_out(OpArguments& a, size_t i) {
  const TensorView out = a.tensor(i);
  expect(a, out.dtype == DType::kBool || out.dtype == DType::kUInt8,
         "expected out of dtype bool or uint8, got %s; export the model again",
         dtype_name(out.dtype));
}

// any.all(self, *, out)
void any_all(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("any.all_out", stack, 2);
  const TensorView x = a.tensor(0);
  expect_bool_out(a, 1);
  run_into(context, a, plan_all(x, Reduction::kAny), 1);
}

// any(self, dim, keepdim, *, out)
void any_dim(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("any.out", stack, 4);
  const TensorView x = a.tensor(0);
  expect_bool_out(a, 3);
  run_into(context, a, plan_dim(a, x, a.integer(1), a.boolean(2), Reduction::kAny), 3);
}

// any.dims(self, dim?, keepdim, *, out): an empty list, unlike None, keeps every dimension
void any_dims(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("any.dims_out", stack, 4);
  const TensorView x = a.tensor(0);
  expect_bool_out(a, 3);
  int64_t dims[kMaxDims];
  const bool keeps_all = !a.is_none(1) && a.integers(1, dims, kMaxDims) == 0;
  const bool goes[kMaxDims] = {false};
  const bool keepdim = a.boolean(2);
  run_into(context, a,
           keeps_all ? plan_reduction(x, goes, keepdim, Reduction::kAny)
                     : plan_dims(a, x, 1, keepdim, Reduction::kAny),
           3);
}

// ---- extremes ----

// amax(self, dim[], keepdim, *, out), amin
template <Reduction kReduction>
void amax(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kReduction == Reduction::kMaximum ? "amax.out" : "amin.out", stack, 4);
  const TensorView x = a.tensor(0);
  const Plan plan = plan_dims(a, x, 1, a.boolean(2), kReduction);
  expect_dtype(a, "out", a.tensor(3), x.dtype);
  run_into(context, a, plan, 3);
}

// max.unary(self, *, out), min.unary
template <Reduction kReduction>
void max_all(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kReduction == Reduction::kMaximum ? "max.unary_out" : "min.unary_out", stack, 2);
  const TensorView x = a.tensor(0);
  expect_dtype(a, "out", a.tensor(1), x.dtype);
  run_into(context, a, plan_all(x, kReduction), 1);
}

// max.dim(self, dim, keepdim, *, values, indices), min.dim
template <Reduction kReduction>
void max_dim(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kReduction == Reduction::kMaximum ? "max.dim_max" : "min.dim_min", stack, 5);
  const TensorView x = a.tensor(0);
  Plan plan = plan_dim(a, x, a.integer(1), a.boolean(2), kReduction);
  const TensorView values = reduced_out(a, 3, plan), indices = reduced_out(a, 4, plan);
  expect_dtype(a, "values", values, x.dtype);
  expect_dtype(a, "indices", indices, DType::kInt64);
  plan.args.out = values.data;
  plan.args.out_dtype = values.dtype;
  plan.args.index = indices.data;
  run_reduction(context, a, plan.args);
}

// argmax(self, dim?, keepdim, *, out), argmin: without dim, of the tensor laid out flat
template <Reduction kReduction>
void argmax(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kReduction == Reduction::kMaximum ? "argmax.out" : "argmin.out", stack, 4);
  const TensorView x = a.tensor(0);
  const bool keepdim = a.boolean(2);
  bool goes[kMaxDims] = {false};
  if (a.is_none(1)) {
    std::fill(goes, goes + kMaxDims, true);
  } else {
    goes[dimension(a, a.integer(1), x.ndim)] = true;
  }
  Plan plan = plan_reduction(x, goes, keepdim, kReduction);
  const TensorView out = reduced_out(a, 3, plan);
  expect_dtype(a, "out", out, DType::kInt64);
  plan.args.index = out.data;
  run_reduction(context, a, plan.args);
}

// ---- variance ----

/// mean_out: 0 where there is none.
void run_variance(KernelRuntimeContext& context, OpArguments& a, const TensorView& x, Plan plan,
                  double correction, size_t out, size_t mean_out) {
  expect_floating(a, "self", x);
  const TensorView view = reduced_out(a, out, plan);
  expect_floating(a, "out", view);
  plan.args.out = view.data;
  plan.args.out_dtype = view.dtype;
  plan.args.correction = correction;
  if (mean_out != 0) {
    const TensorView mean = reduced_out(a, mean_out, plan);
    expect_dtype(a, "mean", mean, view.dtype);
    plan.args.mean = mean.data;
  }
  run_reduction(context, a, plan.args);
}

// var(self, dim?, unbiased, keepdim, *, out)
void var_unbiased(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("var.out", stack, 5);
  const TensorView x = a.tensor(0);
  const double correction = a.boolean(2) ? 1 : 0;
  const Plan plan = plan_dims(a, x, 1, a.boolean(3), Reduction::kVariance);
  run_variance(context, a, x, plan, correction, 4, 0);
}

// var.correction(self, dim?, *, correction?, keepdim, out)
void var_correction(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("var.correction_out", stack, 5);
  const TensorView x = a.tensor(0);
  const double correction = a.is_none(2) ? 1 : a.number(2);
  const Plan plan = plan_dims(a, x, 1, a.boolean(3), Reduction::kVariance);
  run_variance(context, a, x, plan, correction, 4, 0);
}

// var_mean.correction(self, dim?, *, correction?, keepdim, out0, out1)
void var_mean_correction(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("var_mean.correction_out", stack, 6);
  const TensorView x = a.tensor(0);
  const double correction = a.is_none(2) ? 1 : a.number(2);
  const Plan plan = plan_dims(a, x, 1, a.boolean(3), Reduction::kVariance);
  run_variance(context, a, x, plan, correction, 4, 5);
}

// ---- along one dimension, shape kept ----

// The sizes before, at and after a dimension; a scalar is one row of one.
struct Split {
  int64_t n_outer = 1, n = 1, n_inner = 1;
};

Split split_at(const TensorView& x, int dim) {
  Split split;
  for (int d = 0; d < x.ndim; ++d)
    (d < dim ? split.n_outer : d == dim ? split.n : split.n_inner) *= x.sizes[d];
  return split;
}

template <typename Args>
void run(KernelRuntimeContext& context, OpArguments& a, const Args& args,
         Status (*const MathKernels::*kernel)(const Args&, const ExecutionContext&)) {
  if (const MathKernels* math = math_kernels(a))
    a.set_error(fail((math->*kernel)(args, current_execution())));
  finish(context, a);
}

// _softmax(self, dim, half_to_float, *, out), _log_softmax
template <bool kIsLog>
void softmax(KernelRuntimeContext& context, Stack stack) {
  OpArguments a(kIsLog ? "_log_softmax.out" : "_softmax.out", stack, 4);
  const TensorView x = a.tensor(0);
  const int dim = dimension(a, a.integer(1), x.ndim);
  const bool half_to_float = a.boolean(2);
  const TensorView y = a.out(3, x);
  expect_floating(a, "self", x);
  expect(a, !half_to_float || x.dtype == DType::kFloat16 || x.dtype == DType::kBFloat16,
         "expected self of dtype float16 or bfloat16 with half_to_float, got %s; leave it off",
         dtype_name(x.dtype));
  expect_dtype(a, "out", y, half_to_float ? DType::kFloat32 : x.dtype);
  expect_contiguous(a, "self", x);
  expect_contiguous(a, "out", y);
  const Split split = split_at(x, dim);
  const SoftmaxArgs args = {x.data,        y.data,  x.dtype,       y.dtype,
                            split.n_outer, split.n, split.n_inner, kIsLog};
  run(context, a, args, &MathKernels::softmax);
}

// cumsum(self, dim, dtype?, *, out)
void cumsum(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("cumsum.out", stack, 4);
  const TensorView x = a.tensor(0);
  const int dim = dimension(a, a.integer(1), x.ndim);
  const TensorView y = a.out(3, x);
  expect_contiguous(a, "self", x);
  expect_contiguous(a, "out", y);
  const Split split = split_at(x, dim);
  const CumsumArgs args = {x.data, y.data, x.dtype, y.dtype, split.n_outer, split.n, split.n_inner};
  run(context, a, args, &MathKernels::cumsum);
}

// glu(self, dim, *, out)
void glu(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("glu.out", stack, 3);
  const TensorView x = a.tensor(0);
  const int dim = dimension(a, a.integer(1), x.ndim);
  expect_floating(a, "self", x);
  expect(a, x.ndim > 0 && x.sizes[dim] % 2 == 0,
         "expected an even size of dim %d, got self %s; fix the call", dim, ShapeText(x).text);
  if (a.error() != Error::Ok) return finish(context, a);
  int64_t sizes[kMaxDims];
  std::copy(x.sizes, x.sizes + kMaxDims, sizes);
  sizes[dim] /= 2;
  const TensorView y = a.out(2, sizes, x.ndim);
  expect_dtype(a, "out", y, x.dtype);
  expect_contiguous(a, "self", x);
  expect_contiguous(a, "out", y);
  const Split split = split_at(x, dim);
  const GluArgs args = {x.data, y.data, x.dtype, split.n_outer, split.n / 2, split.n_inner};
  run(context, a, args, &MathKernels::glu);
}

// topk(self, k, dim, largest, sorted, *, values, indices): sorted in either case
void topk(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("topk.values", stack, 7);
  const TensorView x = a.tensor(0);
  const int64_t k = a.integer(1);
  const int dim = dimension(a, a.integer(2), x.ndim);
  const Split split = split_at(x, dim);
  expect(a, k >= 0 && k <= split.n,
         "expected k in 0..%lld, the size of dim %d, got %lld; fix the call",
         static_cast<long long>(split.n), dim, static_cast<long long>(k));
  expect(a, x.dtype != DType::kBool, "expected numbers, got bool; cast them first");
  if (a.error() != Error::Ok) return finish(context, a);
  int64_t sizes[kMaxDims];
  std::copy(x.sizes, x.sizes + kMaxDims, sizes);
  sizes[dim] = k;
  const TensorView values = a.out(5, sizes, x.ndim), indices = a.out(6, sizes, x.ndim);
  expect_dtype(a, "values", values, x.dtype);
  expect_dtype(a, "indices", indices, DType::kInt64);
  expect_contiguous(a, "self", x);
  expect_contiguous(a, "values", values);
  expect_contiguous(a, "indices", indices);
  TopkArgs args = {};
  args.x = x.data;
  args.values = values.data;
  args.indices = static_cast<int64_t*>(indices.data);
  args.dtype = x.dtype;
  args.elem_bytes = static_cast<int>(dtype_bytes(x.dtype));
  args.n_outer = split.n_outer;
  args.n = split.n;
  args.n_inner = split.n_inner;
  args.k = k;
  args.is_largest = a.boolean(3);
  if (const MathKernels* math = math_kernels(a)) {
    ExecutionContext execution = current_execution();
    a.set_error(give_scratch(context, math->topk_scratch_bytes(args), &execution));
    if (a.error() == Error::Ok) a.set_error(fail(math->topk(args, execution)));
  }
  finish(context, a);
}

// ---- norms ----

/// A weight or bias: absent, or n contiguous floats.
void expect_channel_vector(OpArguments& a, const char* part, const TensorView& view, int64_t n) {
  if (!view.present()) return;
  expect_contiguous(a, part, view);
  expect_floating(a, part, view);
  expect(a, numel_of(view) == n, "expected %s of %lld elements, got %s; fix the call", part,
         static_cast<long long>(n), ShapeText(view).text);
}

const void* data_or_null(const TensorView& view) { return view.present() ? view.data : nullptr; }

/// mean and rstd of a norm, both of `sizes`, and of one float dtype.
void norm_moments(OpArguments& a, size_t i, const int64_t* sizes, int ndim, TensorView* mean,
                  TensorView* rstd) {
  *mean = a.out(i, sizes, ndim);
  *rstd = a.out(i + 1, sizes, ndim);
  expect_contiguous(a, "mean", *mean);
  expect_contiguous(a, "rstd", *rstd);
  expect_floating(a, "mean", *mean);
  expect_dtype(a, "rstd", *rstd, mean->dtype);
}

// native_layer_norm(input, normalized_shape, weight?, bias?, eps, *, out, mean, rstd)
void layer_norm(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("native_layer_norm.out", stack, 8);
  const TensorView x = a.tensor(0), weight = a.optional_tensor(2), bias = a.optional_tensor(3);
  int64_t normalized[kMaxDims];
  const int n_normalized = static_cast<int>(a.integers(1, normalized, kMaxDims));
  bool fits = n_normalized >= 1 && n_normalized <= x.ndim;
  for (int d = 0; fits && d < n_normalized; ++d)
    fits = normalized[d] == x.sizes[x.ndim - n_normalized + d];
  expect(a, fits,
         "expected normalized_shape to be the last sizes of input, got input %s; fix the "
         "call",
         ShapeText(x).text);
  expect_floating(a, "input", x);
  expect_contiguous(a, "input", x);
  const TensorView y = a.out(5, x);
  expect_dtype(a, "out", y, x.dtype);
  expect_contiguous(a, "out", y);
  if (a.error() != Error::Ok) return finish(context, a);
  LayerNormArgs args = {};
  args.n_rows = args.D = 1;
  int64_t sizes[kMaxDims];
  for (int d = 0; d < x.ndim; ++d) {
    const bool is_row = d < x.ndim - n_normalized;
    (is_row ? args.n_rows : args.D) *= x.sizes[d];
    sizes[d] = is_row ? x.sizes[d] : 1;
  }
  expect_channel_vector(a, "weight", weight, args.D);
  expect_channel_vector(a, "bias", bias, args.D);
  TensorView mean, rstd;
  norm_moments(a, 6, sizes, x.ndim, &mean, &rstd);
  args.x = x.data;
  args.weight = data_or_null(weight);
  args.bias = data_or_null(bias);
  args.y = y.data;
  args.mean = mean.data;
  args.rstd = rstd.data;
  args.dtype = x.dtype;
  args.weight_dtype = weight.dtype;
  args.bias_dtype = bias.dtype;
  args.moments_dtype = mean.dtype;
  args.eps = a.number(4);
  run(context, a, args, &MathKernels::layer_norm);
}

// native_group_norm(input, weight?, bias?, N, C, HxW, group, eps, *, out, mean, rstd)
void group_norm(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("native_group_norm.out", stack, 11);
  const TensorView x = a.tensor(0), weight = a.optional_tensor(1), bias = a.optional_tensor(2);
  GroupNormArgs args = {};
  args.N = a.integer(3);
  args.C = a.integer(4);
  args.inner = a.integer(5);
  args.n_groups = a.integer(6);
  args.eps = a.number(7);
  expect_floating(a, "input", x);
  expect_contiguous(a, "input", x);
  const TensorView y = a.out(8, x);
  expect_dtype(a, "out", y, x.dtype);
  expect_contiguous(a, "out", y);
  expect(a, args.n_groups > 0 && args.C % std::max<int64_t>(args.n_groups, 1) == 0,
         "expected C in whole groups, got C=%lld and %lld groups; fix the call",
         static_cast<long long>(args.C), static_cast<long long>(args.n_groups));
  const bool fits = x.ndim >= 2 && args.inner >= 0 && args.inner <= kMaxDim &&
                    x.sizes[0] == args.N && x.sizes[1] == args.C &&
                    numel_of(x) == args.N * args.C * args.inner;
  expect(a, fits, "expected input of [N, C, ...] with HxW elements a channel, got %s; fix the call",
         ShapeText(x).text);
  expect_channel_vector(a, "weight", weight, args.C);
  expect_channel_vector(a, "bias", bias, args.C);
  const int64_t sizes[] = {args.N, args.n_groups};
  if (a.error() != Error::Ok) return finish(context, a);
  TensorView mean, rstd;
  norm_moments(a, 9, sizes, 2, &mean, &rstd);
  args.x = x.data;
  args.weight = data_or_null(weight);
  args.bias = data_or_null(bias);
  args.y = y.data;
  args.mean = mean.data;
  args.rstd = rstd.data;
  args.dtype = x.dtype;
  args.weight_dtype = weight.dtype;
  args.bias_dtype = bias.dtype;
  args.moments_dtype = mean.dtype;
  run(context, a, args, &MathKernels::group_norm);
}

// _native_batch_norm_legit_no_training(input, weight?, bias?, running_mean, running_var, momentum,
// eps, *, out, save_mean [0], save_invstd [0])
void batch_norm(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("_native_batch_norm_legit_no_training.out", stack, 10);
  const TensorView x = a.tensor(0), weight = a.optional_tensor(1), bias = a.optional_tensor(2);
  const TensorView mean = a.tensor(3), variance = a.tensor(4);
  expect_floating(a, "input", x);
  expect_contiguous(a, "input", x);
  expect(a, x.ndim >= 2, "expected input [N, C, ...], got %s; fix the call", ShapeText(x).text);
  const TensorView y = a.out(7, x);
  expect_dtype(a, "out", y, x.dtype);
  expect_contiguous(a, "out", y);
  const int64_t no_elements[] = {0};
  a.out(8, no_elements, 1);
  a.out(9, no_elements, 1);
  if (a.error() != Error::Ok) return finish(context, a);
  const Split split = split_at(x, 1);
  expect_channel_vector(a, "weight", weight, split.n);
  expect_channel_vector(a, "bias", bias, split.n);
  expect_channel_vector(a, "running_mean", mean, split.n);
  expect_channel_vector(a, "running_var", variance, split.n);
  BatchNormArgs args = {};
  args.x = x.data;
  args.weight = data_or_null(weight);
  args.bias = data_or_null(bias);
  args.mean = mean.data;
  args.variance = variance.data;
  args.y = y.data;
  args.dtype = x.dtype;
  args.weight_dtype = weight.dtype;
  args.bias_dtype = bias.dtype;
  args.mean_dtype = mean.dtype;
  args.variance_dtype = variance.dtype;
  args.N = split.n_outer;
  args.C = split.n;
  args.inner = split.n_inner;
  args.eps = a.number(6);
  run(context, a, args, &MathKernels::batch_norm);
}

constexpr Reduction kMax = Reduction::kMaximum, kMin = Reduction::kMinimum;

constexpr CudaOp kOps[] = {
    {"aten::_log_softmax.out", &softmax<true>},
    {"aten::_native_batch_norm_legit_no_training.out", &batch_norm},
    {"aten::_softmax.out", &softmax<false>},
    {"aten::amax.out", &amax<kMax>},
    {"aten::amin.out", &amax<kMin>},
    {"aten::any.all_out", &any_all},
    {"aten::any.dims_out", &any_dims},
    {"aten::any.out", &any_dim},
    {"aten::argmax.out", &argmax<kMax>},
    {"aten::argmin.out", &argmax<kMin>},
    {"aten::cumsum.out", &cumsum},
    {"aten::glu.out", &glu},
    {"aten::max.dim_max", &max_dim<kMax>},
    {"aten::max.unary_out", &max_all<kMax>},
    {"aten::mean.dtype_out", &mean_all},
    {"aten::mean.out", &sum_dims<Reduction::kMean>},
    {"aten::min.dim_min", &max_dim<kMin>},
    {"aten::min.unary_out", &max_all<kMin>},
    {"aten::native_group_norm.out", &group_norm},
    {"aten::native_layer_norm.out", &layer_norm},
    {"aten::prod.int_out", &prod_dim},
    {"aten::prod.out", &prod_all},
    {"aten::sum.IntList_out", &sum_dims<Reduction::kSum>},
    {"aten::topk.values", &topk},
    {"aten::var.correction_out", &var_correction},
    {"aten::var.out", &var_unbiased},
    {"aten::var_mean.correction_out", &var_mean_correction},
};

}  // namespace

CudaOps cuda_reduce_ops() { return {kOps, std::size(kOps)}; }

}  // namespace cuda_int4
