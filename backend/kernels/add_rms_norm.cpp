// cuda_int4::add_rms_norm: validation, and the kernel of the device.
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/numeric.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"
#include "parallel_ranges.h"
#include "quantized_activation.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::add_rms_norm";

}  // namespace

Status validate_add_rms_norm(const AddRmsNormArgs& args) {
  const TensorCheck x{kOp, "x", "pass x.contiguous() of shape [..., D]"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(x, args.x, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(x, args.x));
  if (args.x.ndim < 1 || args.x.sizes[args.x.ndim - 1] < 1) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected x [..., D] with D of at least 1, got %s; %s", kOp,
                 ShapeText(args.x).text, x.cure);
  }
  const TensorCheck like_x[] = {
      {kOp, "residual", "pass a contiguous residual like x"},
      {kOp, "sum", "allocate a contiguous sum like x"},
      {kOp, "y", "allocate a contiguous y like x"},
  };
  const TensorView* const views[] = {&args.residual, &args.sum, &args.y};
  for (int i = 0; i < 3; ++i) {
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(like_x[i], *views[i], &numel));
    CUDA_INT4_RETURN_IF_ERROR(check_same_shape(like_x[i], *views[i], args.x));
    if (views[i]->dtype != args.x.dtype) {
      return error(StatusCode::kInvalidArgument, "%s: expected %s of dtype %s (x's), got %s; %s",
                   kOp, like_x[i].part, dtype_name(args.x.dtype), dtype_name(views[i]->dtype),
                   like_x[i].cure);
    }
    CUDA_INT4_RETURN_IF_ERROR(check_data(like_x[i], *views[i]));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(like_x[i], *views[i], dtype_bytes(views[i]->dtype)));
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(x, args.x));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(x, args.x, dtype_bytes(args.x.dtype)));
  const TensorCheck weights[] = {{kOp, "weight", "pass a contiguous weight of shape [D]"},
                                 {kOp, "x_norm", "pass a contiguous weight of shape [D]"}};
  const TensorView* const weight_views[] = {&args.weight, &args.x_norm};
  for (int i = 0; i < 2; ++i) {
    const TensorView& view = *weight_views[i];
    if (!view.present()) continue;
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(weights[i], view, &numel));
    CUDA_INT4_RETURN_IF_ERROR(check_float_kind(weights[i], view));
    CUDA_INT4_RETURN_IF_ERROR(check_shape(weights[i], view, 1, &args.x.sizes[args.x.ndim - 1]));
    CUDA_INT4_RETURN_IF_ERROR(check_data(weights[i], view));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(weights[i], view, dtype_bytes(view.dtype)));
  }
  if (!(args.eps >= 0)) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected eps of at least 0, got %f; fix the call", kOp, args.eps);
  }
  return {};
}

namespace cpu {

namespace {

// Of x or, where it is normed, of what y then holds.
template <class T>
void add(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x_norm.present() ? args.y.data : args.x.data);
  const T* residual = static_cast<const T*>(args.residual.data);
  T* sum = static_cast<T*>(args.sum.data);
  for (int64_t i = begin; i < end; ++i) from_float(to_float(x[i]) + to_float(residual[i]), &sum[i]);
}

}  // namespace

Status add_rms_norm_on(const CpuKernels& kernels, const AddRmsNormArgs& args,
                       const ExecutionContext& context) {
  RmsNormJob job = {};
  job.x = args.sum.data;
  job.weight = args.weight.present() ? args.weight.data : nullptr;
  job.y = args.y.data;
  job.dtype = args.x.dtype;
  job.weight_dtype = args.weight.present() ? args.weight.dtype : args.x.dtype;
  job.D = args.x.sizes[args.x.ndim - 1];
  job.eps = static_cast<float>(args.eps);
  RmsNormJob x_job = job;
  x_job.x = args.x.data;
  x_job.weight = args.x_norm.data;
  x_job.weight_dtype = args.x_norm.dtype;
  const int64_t rows = static_cast<int64_t>(args.x.nbytes) / dtype_bytes(job.dtype) / job.D;
  parallel_ranges(context, rows, ceil_div(int64_t{1} << 16, job.D),
                  [&](int64_t begin, int64_t end) {
                    if (args.x_norm.present()) kernels.rms_norm(x_job, begin, end);
                    if (job.dtype == DType::kFloat16) {
                      add<Half>(args, begin * job.D, end * job.D);
                    } else if (job.dtype == DType::kBFloat16) {
                      add<BFloat>(args, begin * job.D, end * job.D);
                    } else {
                      add<float>(args, begin * job.D, end * job.D);
                    }
                    kernels.rms_norm(job, begin, end);
                  });
  return {};
}

}  // namespace cpu

Status add_rms_norm(const AddRmsNormArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_add_rms_norm(args));
  CUDA_INT4_RETURN_IF_ERROR(check_quantized_y(kOp, args.y, context));
  if (context.device == DeviceKind::kCuda) {
    const CudaKernels* kernels = cuda_kernels();
    return kernels == nullptr ? built_without_cuda(kOp)
                              : kernels->math->add_rms_norm(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::add_rms_norm_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
