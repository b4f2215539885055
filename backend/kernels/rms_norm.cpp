// cuda_int4::rms_norm: validation, and the kernel of the device.
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/numeric.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"
#include "parallel_ranges.h"
#include "quantized_activation.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::rms_norm";

}  // namespace

Status validate_rms_norm(const RmsNormArgs& args) {
  const TensorCheck x{kOp, "x", "pass x.contiguous() of shape [..., D]"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(x, args.x, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(x, args.x));
  if (args.x.ndim < 1 || args.x.sizes[args.x.ndim - 1] < 1) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected x [..., D] with D of at least 1, got %s; %s", kOp,
                 ShapeText(args.x).text, x.cure);
  }
  const TensorCheck y{kOp, "y", "allocate a contiguous y like x"};
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(y, args.y, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_same_shape(y, args.y, args.x));
  if (args.y.dtype != args.x.dtype) {
    return error(StatusCode::kInvalidArgument, "%s: expected y of dtype %s (x's), got %s; %s", kOp,
                 dtype_name(args.x.dtype), dtype_name(args.y.dtype), y.cure);
  }
  const TensorView* const views[] = {&args.x, &args.y, &args.weight};
  const TensorCheck weight{kOp, "weight", "pass a contiguous weight of shape [D]"};
  const TensorCheck checks[] = {x, y, weight};
  if (args.weight.present()) {
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(weight, args.weight, &numel));
    CUDA_INT4_RETURN_IF_ERROR(check_float_kind(weight, args.weight));
    CUDA_INT4_RETURN_IF_ERROR(check_shape(weight, args.weight, 1, &args.x.sizes[args.x.ndim - 1]));
  }
  for (int i = 0; i < 3; ++i) {
    if (!views[i]->present()) continue;
    CUDA_INT4_RETURN_IF_ERROR(check_data(checks[i], *views[i]));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(checks[i], *views[i], dtype_bytes(views[i]->dtype)));
  }
  if (!(args.eps >= 0)) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected eps of at least 0, got %f; fix the call", kOp, args.eps);
  }
  return {};
}

namespace cpu {

Status rms_norm_on(const CpuKernels& kernels, const RmsNormArgs& args,
                   const ExecutionContext& context) {
  RmsNormJob job = {};
  job.x = args.x.data;
  job.weight = args.weight.present() ? args.weight.data : nullptr;
  job.y = args.y.data;
  job.dtype = args.x.dtype;
  job.weight_dtype = args.weight.present() ? args.weight.dtype : args.x.dtype;
  job.D = args.x.sizes[args.x.ndim - 1];
  job.eps = static_cast<float>(args.eps);
  const int64_t elem_bytes = dtype_bytes(job.dtype);
  const int64_t rows = static_cast<int64_t>(args.x.nbytes) / elem_bytes / job.D;
  parallel_ranges(context, rows, ceil_div(int64_t{1} << 16, job.D),
                  [&](int64_t begin, int64_t end) { kernels.rms_norm(job, begin, end); });
  return {};
}

}  // namespace cpu

Status rms_norm(const RmsNormArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_rms_norm(args));
  CUDA_INT4_RETURN_IF_ERROR(check_quantized_y(kOp, args.y, context));
  if (context.device == DeviceKind::kCuda) {
    const CudaKernels* kernels = cuda_kernels();
    return kernels == nullptr ? built_without_cuda(kOp) : kernels->math->rms_norm(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::rms_norm_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
