// The table of math_kernels.h: tensor views to plain arguments, CUDA's errors to ours.
#include "launch_status.cuh"
#include "math_kernels.h"
#include "matmul_plain.cuh"
#include "rms_norm.cuh"
#include "silu.cuh"

namespace cuda_int4 {

namespace {

cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

int64_t numel_of(const TensorView& view) {
  return static_cast<int64_t>(view.nbytes) / dtype_bytes(view.dtype);
}

Status run_rms_norm(const RmsNormArgs& args, const ExecutionContext& context) {
  RmsNormKernelArgs kernel_args = {};
  kernel_args.x = args.x.data;
  kernel_args.weight = args.weight.present() ? args.weight.data : nullptr;
  kernel_args.y = args.y.data;
  kernel_args.dtype = args.x.dtype;
  kernel_args.weight_dtype = args.weight.present() ? args.weight.dtype : args.x.dtype;
  kernel_args.D = args.x.sizes[args.x.ndim - 1];
  kernel_args.n_rows = numel_of(args.x) / kernel_args.D;
  kernel_args.eps = static_cast<float>(args.eps);
  return launch_status("cuda_int4::rms_norm", launch_rms_norm(kernel_args, stream_of(context)));
}

Status run_silu(const SiluArgs& args, const ExecutionContext& context) {
  const SiluKernelArgs kernel_args = {args.x.data, args.y.data, args.x.dtype, numel_of(args.x)};
  return launch_status("cuda_int4::silu", launch_silu(kernel_args, stream_of(context)));
}

uint64_t matmul_scratch_bytes(const MatmulArgs&) { return 0; }

Status run_matmul(const MatmulArgs& args, const ExecutionContext& context) {
  return launch_status("cuda_int4::matmul", launch_matmul_plain(args, stream_of(context)));
}

}  // namespace

const MathKernels kMathKernels = {
    run_rms_norm,
    run_silu,
    matmul_scratch_bytes,
    run_matmul,
};

}  // namespace cuda_int4
