// cuda_int4::silu: validation, and the kernel of the device.
#include "checks.h"
#include "cpu/isa.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"
#include "parallel_ranges.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::silu";

}  // namespace

Status validate_silu(const SiluArgs& args) {
  const TensorCheck x{kOp, "x", "pass x.contiguous()"};
  const TensorCheck y{kOp, "y", "allocate a contiguous y like x"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(x, args.x, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(x, args.x));
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(y, args.y, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_same_shape(y, args.y, args.x));
  if (args.y.dtype != args.x.dtype) {
    return error(StatusCode::kInvalidArgument, "%s: expected y of dtype %s (x's), got %s; %s", kOp,
                 dtype_name(args.x.dtype), dtype_name(args.y.dtype), y.cure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(x, args.x));
  CUDA_INT4_RETURN_IF_ERROR(check_data(y, args.y));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(x, args.x, dtype_bytes(args.x.dtype)));
  return check_alignment(y, args.y, dtype_bytes(args.y.dtype));
}

namespace cpu {

Status silu_on(const CpuKernels& kernels, const SiluArgs& args, const ExecutionContext& context) {
  const SiluJob job = {args.x.data, args.y.data, args.x.dtype};
  const int64_t numel = static_cast<int64_t>(args.x.nbytes) / dtype_bytes(args.x.dtype);
  parallel_ranges(context, numel, int64_t{1} << 15,
                  [&](int64_t begin, int64_t end) { kernels.silu(job, begin, end); });
  return {};
}

}  // namespace cpu

Status silu(const SiluArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_silu(args));
  if (context.device == DeviceKind::kCuda) {
    const CudaKernels* kernels = cuda_kernels();
    return kernels == nullptr ? built_without_cuda(kOp) : kernels->math->silu(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::silu_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
