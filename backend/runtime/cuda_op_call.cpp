#include "cuda_op_call.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "../kernels/checks.h"
#include "../kernels/cuda/cuda_kernels.h"
#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

void expect(OpArguments& a, bool right, const char* reason, ...) {
  if (right || a.error() != Error::Ok) return;
  char text[512];
  va_list values;
  va_start(values, reason);
  std::vsnprintf(text, sizeof(text), reason, values);
  va_end(values);
  a.set_error(fail(Error::InvalidArgument, "cuda_int4::%s: %s", a.op(), text));
}

void expect_contiguous(OpArguments& a, const char* part, const TensorView& view) {
  if (a.error() != Error::Ok) return;
  char who[96];
  std::snprintf(who, sizeof(who), "cuda_int4::%s", a.op());
  const TensorCheck check{who, part, "export the model with contiguous tensors"};
  int64_t numel = 0;
  a.set_error(fail(check_contiguous(check, view, &numel)));
  if (a.error() == Error::Ok) a.set_error(fail(check_data(check, view)));
}

const MathKernels* math_kernels(OpArguments& a) {
  if (a.error() != Error::Ok) return nullptr;
  if (const CudaKernels* kernels = cuda_kernels()) return kernels->math;
  a.set_error(fail(built_without_cuda(a.op())));
  return nullptr;
}

void finish(KernelRuntimeContext& context, const OpArguments& a) {
  if (a.error() != Error::Ok) context.fail(a.error());
}

int dimension(OpArguments& a, int64_t dim, int ndim) {
  const int64_t n = std::max(ndim, 1);
  expect(a, dim >= -n && dim < n,
         "expected dim in %lld..%lld for a tensor of %d dimensions, got %lld; fix the call",
         static_cast<long long>(-n), static_cast<long long>(n - 1), ndim,
         static_cast<long long>(dim));
  if (a.error() != Error::Ok) return 0;
  return static_cast<int>(dim < 0 ? dim + n : dim);
}

}  // namespace cuda_int4
