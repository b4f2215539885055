// Products on CUDA: linear, mm, addmm, bmm.
#include <algorithm>
#include <iterator>

#include "../kernels/checks.h"
#include "../kernels/cuda/matmul.h"
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

void expect_dtype(OpArguments& a, const char* part, const TensorView& view, DType dtype) {
  expect(a, view.dtype == dtype, "expected %s of dtype %s, got %s; cast one to the other", part,
         dtype_name(dtype), dtype_name(view.dtype));
}

void expect_ndim(OpArguments& a, const char* part, const TensorView& view, int ndim) {
  expect(a, view.ndim == ndim, "expected %s of %d dimensions, got %s; fix the call", part, ndim,
         ShapeText(view).text);
}

/// Sizes that have to agree.
void expect_same(OpArguments& a, const char* what, int64_t left, int64_t right) {
  expect(a, left == right, "expected %s to agree, got %lld and %lld; fix the call", what,
         static_cast<long long>(left), static_cast<long long>(right));
}

void run_matmul(KernelRuntimeContext& context, OpArguments& a, const MatmulArgs& args) {
  expect(a, args.dtype != DType::kBool, "expected numbers, got bool; cast them first");
  if (const MathKernels* math = math_kernels(a)) {
    ExecutionContext execution = current_execution();
    a.set_error(give_scratch(context, math->matmul_scratch_bytes(args), &execution));
    if (a.error() == Error::Ok) a.set_error(fail(math->matmul(args, execution)));
  }
}

// linear(input [..., K], weight [N, K], bias [N]?, *, out [..., N])
void linear_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("dense_linear.out", stack, 4);
  const TensorView x = a.tensor(0), weight = a.tensor(1), bias = a.optional_tensor(2);
  expect_contiguous(a, "input", x);
  expect(a, x.ndim >= 1, "expected input [..., K], got a scalar; fix the call");
  expect_ndim(a, "weight", weight, 2);
  expect_dtype(a, "weight", weight, x.dtype);
  if (a.error() != Error::Ok) return finish(context, a);
  const int64_t N = weight.sizes[0], K = weight.sizes[1];
  expect_same(a, "K of input and weight", x.sizes[x.ndim - 1], K);
  if (bias.present()) {
    expect_dtype(a, "bias", bias, x.dtype);
    expect_ndim(a, "bias", bias, 1);
    expect(a, bias.ndim != 1 || bias.sizes[0] == N || bias.sizes[0] == 1,
           "expected bias [%lld], got %s; fix the call", static_cast<long long>(N),
           ShapeText(bias).text);
  }
  const TensorView y = a.out(3, x, N);
  expect_dtype(a, "out", y, x.dtype);
  expect_contiguous(a, "out", y);
  if (a.error() != Error::Ok) return finish(context, a);

  MatmulArgs args = {};
  args.a = x.data;
  args.b = weight.data;
  args.y = y.data;
  args.dtype = x.dtype;
  args.batch = args.M = 1;
  for (int d = 0; d + 1 < x.ndim; ++d) args.M *= x.sizes[d];
  args.N = N;
  args.K = K;
  args.a_m = K;
  args.a_k = 1;
  args.b_n = weight.strides[0];
  args.b_k = weight.strides[1];
  args.alpha = args.beta = 1;
  if (bias.present()) {
    args.c = bias.data;
    args.c_n = bias.sizes[0] == 1 ? 0 : bias.strides[0];
  }
  run_matmul(context, a, args);
  finish(context, a);
}

/// left [batch?, M, K] @ right [batch?, K, N] into `out`, both of ndim dimensions; all of args but
/// the addend.
MatmulArgs matrices(OpArguments& a, const TensorView& left, const TensorView& right, int ndim,
                    size_t out) {
  MatmulArgs args = {};
  expect_ndim(a, "self", left, ndim);
  expect_ndim(a, "mat2", right, ndim);
  expect_dtype(a, "mat2", right, left.dtype);
  if (a.error() != Error::Ok) return args;
  const int m = ndim - 2, n = ndim - 1;
  expect_same(a, "the inner sizes", left.sizes[n], right.sizes[m]);
  if (ndim == 3) expect_same(a, "the batch sizes", left.sizes[0], right.sizes[0]);
  int64_t sizes[kMaxDims] = {left.sizes[0], left.sizes[m], 0};
  sizes[n] = right.sizes[n];
  const TensorView y = a.out(out, sizes, ndim);
  expect_dtype(a, "out", y, left.dtype);
  expect_contiguous(a, "out", y);
  args.a = left.data;
  args.b = right.data;
  args.y = y.data;
  args.dtype = left.dtype;
  args.batch = ndim == 3 ? left.sizes[0] : 1;
  args.M = left.sizes[m];
  args.K = left.sizes[n];
  args.N = right.sizes[n];
  args.a_batch = ndim == 3 ? left.strides[0] : 0;
  args.a_m = left.strides[m];
  args.a_k = left.strides[n];
  args.b_batch = ndim == 3 ? right.strides[0] : 0;
  args.b_k = right.strides[m];
  args.b_n = right.strides[n];
  args.alpha = args.beta = 1;
  return args;
}

// mm(self [M, K], mat2 [K, N], *, out)
void mm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("mm.out", stack, 3);
  const TensorView left = a.tensor(0), right = a.tensor(1);
  run_matmul(context, a, matrices(a, left, right, 2, 2));
  finish(context, a);
}

// bmm(self [batch, M, K], mat2 [batch, K, N], *, out)
void bmm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("bmm.out", stack, 3);
  const TensorView left = a.tensor(0), right = a.tensor(1);
  run_matmul(context, a, matrices(a, left, right, 3, 2));
  finish(context, a);
}

// addmm(self (broadcast to [M, N]), mat1 [M, K], mat2 [K, N], *, beta, alpha, out)
void addmm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("addmm.out", stack, 6);
  const TensorView addend = a.tensor(0), left = a.tensor(1), right = a.tensor(2);
  const double beta = a.number(3), alpha = a.number(4);
  MatmulArgs args = matrices(a, left, right, 2, 5);
  expect_dtype(a, "self", addend, left.dtype);
  const int64_t sizes[] = {args.M, args.N};
  int64_t strides[] = {0, 0};
  expect(a, addend.ndim <= 2, "expected self to broadcast to [M, N], got %s; fix the call",
         ShapeText(addend).text);
  for (int d = 0; a.error() == Error::Ok && d < addend.ndim; ++d) {
    const int to = 2 - addend.ndim + d;
    expect(a, addend.sizes[d] == 1 || addend.sizes[d] == sizes[to],
           "expected self to broadcast to [%lld, %lld], got %s; fix the call",
           static_cast<long long>(args.M), static_cast<long long>(args.N), ShapeText(addend).text);
    if (addend.sizes[d] != 1) strides[to] = addend.strides[d];
  }
  args.alpha = alpha;
  args.beta = beta;
  if (beta != 0) args.c = addend.data;  // times 0 it is not looked at, not even for a NaN
  args.c_m = strides[0];
  args.c_n = strides[1];
  run_matmul(context, a, args);
  finish(context, a);
}

constexpr CudaOp kOps[] = {
    {"aten::addmm.out", &addmm_out},
    {"aten::bmm.out", &bmm_out},
    {"aten::linear.out", &linear_out},
    {"aten::mm.out", &mm_out},
};

}  // namespace

CudaOps cuda_matmul_ops() { return {kOps, std::size(kOps)}; }

}  // namespace cuda_int4
