// Convolutions and pooling on CUDA. Sizes and what is refused are ATen's.
#include <algorithm>
#include <iterator>

#include "../kernels/checks.h"
#include "../kernels/cuda/convolution.h"
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

/// An int[n] argument for the last n of two dimensions: one value stands for all, none for
/// `otherwise`; at least `least`.
void along_dimensions(OpArguments& a, size_t i, const char* part, int n, int64_t otherwise,
                      int64_t least, int64_t (&values)[2]) {
  int64_t given[kMaxDims];
  const size_t n_given = a.integers(i, given, kMaxDims);
  expect(a, n_given <= 1 || n_given == size_t(n),
         "expected %s of 1 or %d values, got %zu; fix the "
         "call",
         part, n, n_given);
  if (a.error() != Error::Ok) return;
  for (int d = 0; d < n; ++d) {
    const int64_t value = n_given == 0 ? otherwise : given[n_given == 1 ? 0 : d];
    expect(a, value >= least && value <= kMaxDim,
           "expected %s of at least %lld, got %lld; fix the call", part,
           static_cast<long long>(least), static_cast<long long>(value));
    values[2 - n + d] = value;
  }
}

/// Strides of [n, channel, width] or [n, channel, height, width] as those of the latter.
void four_strides(const TensorView& view, int64_t (&strides)[4]) {
  const int last = view.ndim - 1;
  strides[0] = view.strides[0];
  strides[1] = view.strides[1];
  strides[3] = view.strides[last];
  strides[2] = view.ndim == 4 ? view.strides[2] : view.sizes[last] * strides[3];
}

// convolution(input, weight, bias?, stride, padding, dilation, transposed, output_padding, groups, *,
// out)
void convolution(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("convolution.out", stack, 10);
  const TensorView x = a.tensor(0), weight = a.tensor(1), bias = a.optional_tensor(2);
  expect(a, (x.ndim == 3 || x.ndim == 4) && weight.ndim == x.ndim,
         "expected input and weight of 3 or 4 dimensions, got %s and %s; export the model with "
         "convolutions over 1 or 2 dimensions",
         ShapeText(x).text, ShapeText(weight).text);
  expect(a, weight.dtype == x.dtype && x.dtype != DType::kBool,
         "expected input and weight of one dtype that is not bool, got %s and %s; cast one",
         dtype_name(x.dtype), dtype_name(weight.dtype));
  if (a.error() != Error::Ok) return finish(context, a);

  const int n = x.ndim - 2;
  ConvolutionArgs args = {};
  args.window = {{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  args.in_sizes[0] = args.out_sizes[0] = 1;
  int64_t output_padding[2] = {0, 0};
  along_dimensions(a, 3, "stride", n, 1, 1, args.window.stride);
  along_dimensions(a, 4, "padding", n, 0, 0, args.window.padding);
  along_dimensions(a, 5, "dilation", n, 1, 1, args.window.dilation);
  args.is_transposed = a.boolean(6);
  if (args.is_transposed) along_dimensions(a, 7, "output_padding", n, 0, 0, output_padding);
  args.groups = a.integer(8);
  const int64_t groups = std::clamp<int64_t>(args.groups, 1, kMaxDim);
  args.N = x.sizes[0];
  args.in_channels = x.sizes[1];
  args.out_channels = args.is_transposed ? weight.sizes[1] * groups : weight.sizes[0];
  const int64_t weight_channels = args.is_transposed ? weight.sizes[0] : weight.sizes[1] * groups;
  expect(
      a,
      args.groups == groups && weight_channels == args.in_channels && weight.sizes[0] % groups == 0,
      "expected the channels of input and weight to agree and to fall in %lld groups, got input "
      "%s and weight %s; fix the call",
      static_cast<long long>(args.groups), ShapeText(x).text, ShapeText(weight).text);
  expect(a, !bias.present() || (bias.ndim == 1 && bias.sizes[0] == args.out_channels),
         "expected bias [%lld], got %s; fix the call", static_cast<long long>(args.out_channels),
         ShapeText(bias).text);
  int64_t sizes[kMaxDims] = {args.N, args.out_channels};
  for (int d = 2 - n; d < 2 && a.error() == Error::Ok; ++d) {
    const Window& w = args.window;
    args.in_sizes[d] = x.sizes[x.ndim - 2 + d];
    args.window.kernel[d] = weight.sizes[x.ndim - 2 + d];
    const int64_t span = w.dilation[d] * (w.kernel[d] - 1) + 1, in = args.in_sizes[d];
    const int64_t room = in + 2 * w.padding[d] - span;
    args.out_sizes[d] = args.is_transposed
                            ? (in - 1) * w.stride[d] - 2 * w.padding[d] + span + output_padding[d]
                        : room < 0 ? 0
                                   : room / w.stride[d] + 1;
    expect(a, w.kernel[d] > 0 && args.out_sizes[d] > 0 && args.out_sizes[d] <= kMaxDim,
           "expected input of at least the kernel's size, got input %s and weight %s; fix the call",
           ShapeText(x).text, ShapeText(weight).text);
    sizes[x.ndim - 2 + d] = args.out_sizes[d];
  }
  if (a.error() != Error::Ok) return finish(context, a);
  const TensorView y = a.out(9, sizes, x.ndim);
  expect(a, y.dtype == x.dtype, "expected out of dtype %s, got %s; export the model again",
         dtype_name(x.dtype), dtype_name(y.dtype));
  if (a.error() != Error::Ok) return finish(context, a);
  args.x = x.data;
  args.weight = weight.data;
  args.bias = bias.present() ? bias.data : nullptr;
  args.y = y.data;
  args.dtype = x.dtype;
  args.bias_dtype = bias.dtype;
  four_strides(x, args.x_strides);
  four_strides(y, args.y_strides);
  four_strides(weight, args.weight_strides);
  if (const MathKernels* math = math_kernels(a)) {
    ExecutionContext execution = current_execution();
    a.set_error(give_scratch(context, math->convolution_scratch_bytes(args), &execution));
    if (a.error() == Error::Ok) a.set_error(fail(math->convolution(args, execution)));
  }
  finish(context, a);
}

// ---- pooling ----

/// x [C, H, W] or [N, C, H, W], and y of the same with out_sizes.
TensorView pool_out(OpArguments& a, size_t out, const TensorView& x, PoolArgs* args) {
  int64_t sizes[kMaxDims];
  std::copy(x.sizes, x.sizes + kMaxDims, sizes);
  sizes[x.ndim - 2] = args->out_sizes[0];
  sizes[x.ndim - 1] = args->out_sizes[1];
  return a.out(out, sizes, x.ndim);
}

void pool_input(OpArguments& a, const TensorView& x, PoolArgs* args) {
  expect(a, x.ndim == 3 || x.ndim == 4,
         "expected self [C, H, W] or [N, C, H, W], got %s; fix the "
         "call",
         ShapeText(x).text);
  expect(a, is_float_kind(x.dtype) || x.dtype == DType::kFloat64 || x.dtype == DType::kInt64,
         "expected self of a float dtype or int64, got %s; cast it first", dtype_name(x.dtype));
  expect_contiguous(a, "self", x);
  if (a.error() != Error::Ok) return;
  args->x = x.data;
  args->dtype = x.dtype;
  args->n_planes = 1;
  for (int d = 0; d < x.ndim - 2; ++d) args->n_planes *= x.sizes[d];
  args->in_sizes[0] = x.sizes[x.ndim - 2];
  args->in_sizes[1] = x.sizes[x.ndim - 1];
}

/// Sizes of the result of a window that slides.
void slide(OpArguments& a, const TensorView& x, bool ceil_mode, PoolArgs* args) {
  for (int d = 0; d < 2 && a.error() == Error::Ok; ++d) {
    const Window& w = args->window;
    expect(a, w.padding[d] * 2 <= w.kernel[d],
           "expected padding of at most half the kernel %lld, got %lld; fix the call",
           static_cast<long long>(w.kernel[d]), static_cast<long long>(w.padding[d]));
    const int64_t room =
        args->in_sizes[d] + 2 * w.padding[d] - w.dilation[d] * (w.kernel[d] - 1) - 1;
    int64_t out = room < 0 ? 0 : (room + (ceil_mode ? w.stride[d] - 1 : 0)) / w.stride[d] + 1;
    // The last window starts inside, or in the padding before it.
    if (ceil_mode && (out - 1) * w.stride[d] >= args->in_sizes[d] + w.padding[d]) --out;
    expect(a, out > 0 && out <= kMaxDim,
           "expected self of at least the kernel's size, got %s; fix the call", ShapeText(x).text);
    args->out_sizes[d] = out;
  }
}

void run_pool(KernelRuntimeContext& context, OpArguments& a, PoolArgs args, const TensorView& y) {
  expect_contiguous(a, "out", y);
  expect(a, y.dtype == args.dtype, "expected out of dtype %s, got %s; export the model again",
         dtype_name(args.dtype), dtype_name(y.dtype));
  args.y = y.data;
  if (const MathKernels* math = math_kernels(a))
    a.set_error(fail(math->pool(args, current_execution())));
  finish(context, a);
}

/// The window in arguments 1 (kernel), 2 (stride, by default the kernel) and 3 (padding).
void pool_window(OpArguments& a, PoolArgs* args) {
  Window& window = args->window;
  window = {{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  along_dimensions(a, 1, "kernel_size", 2, 1, 1, window.kernel);
  int64_t none[kMaxDims];
  if (a.integers(2, none, kMaxDims) == 0) {
    std::copy(window.kernel, window.kernel + 2, window.stride);
  } else {
    along_dimensions(a, 2, "stride", 2, 1, 1, window.stride);
  }
  along_dimensions(a, 3, "padding", 2, 0, 0, window.padding);
}

// avg_pool2d(self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor?, *, out)
void avg_pool(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("avg_pool2d.out", stack, 8);
  const TensorView x = a.tensor(0);
  PoolArgs args = {};
  args.pooling = Pooling::kAverage;
  pool_input(a, x, &args);
  pool_window(a, &args);
  args.counts_padding = a.boolean(5);
  args.divisor = a.integer_or(6, 0);
  expect(a, a.is_none(6) || args.divisor != 0,
         "expected a divisor_override other than 0; leave it "
         "off");
  slide(a, x, a.boolean(4), &args);
  if (a.error() != Error::Ok) return finish(context, a);
  const TensorView y = pool_out(a, 7, x, &args);
  run_pool(context, a, args, y);
}

// _adaptive_avg_pool2d(self, output_size, *, out)
void adaptive_avg_pool(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("_adaptive_avg_pool2d.out", stack, 3);
  const TensorView x = a.tensor(0);
  PoolArgs args = {};
  args.pooling = Pooling::kAdaptiveAverage;
  pool_input(a, x, &args);
  along_dimensions(a, 1, "output_size", 2, 1, 0, args.out_sizes);
  expect(a, args.in_sizes[0] > 0 && args.in_sizes[1] > 0,
         "expected self of at least one element a plane, got %s; fix the call", ShapeText(x).text);
  if (a.error() != Error::Ok) return finish(context, a);
  const TensorView y = pool_out(a, 2, x, &args);
  run_pool(context, a, args, y);
}

// max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode, *, out, indices)
void max_pool(KernelRuntimeContext& context, Stack stack) {
  OpArguments a("max_pool2d_with_indices.out", stack, 8);
  const TensorView x = a.tensor(0);
  PoolArgs args = {};
  args.pooling = Pooling::kMaximum;
  pool_input(a, x, &args);
  pool_window(a, &args);
  along_dimensions(a, 4, "dilation", 2, 1, 1, args.window.dilation);
  slide(a, x, a.boolean(5), &args);
  if (a.error() != Error::Ok) return finish(context, a);
  const TensorView y = pool_out(a, 6, x, &args), indices = pool_out(a, 7, x, &args);
  expect(a, indices.dtype == DType::kInt64,
         "expected indices of dtype int64, got %s; export the "
         "model again",
         dtype_name(indices.dtype));
  expect_contiguous(a, "indices", indices);
  args.indices = static_cast<int64_t*>(indices.data);
  run_pool(context, a, args, y);
}

constexpr CudaOp kOps[] = {
    {"aten::_adaptive_avg_pool2d.out", &adaptive_avg_pool},
    {"aten::avg_pool2d.out", &avg_pool},
    {"aten::convolution.out", &convolution},
    {"aten::max_pool2d_with_indices.out", &max_pool},
};

}  // namespace

CudaOps cuda_convolution_ops() { return {kOps, std::size(kOps)}; }

}  // namespace cuda_int4
