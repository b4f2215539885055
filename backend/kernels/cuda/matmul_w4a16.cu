// cuda_int4::linear, activation "none", more than 16 rows of x: which tensor-core kernel.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "launch_status.cuh"
#include "matmul_w4a16.cuh"
#include "multiprocessors.cuh"

namespace cuda_int4 {

namespace {

MatmulW4A16Args kernel_args(const LinearArgs& args) {
  MatmulW4A16Args p = {};
  p.x = args.x.data;
  p.qdata = args.qdata.data;
  p.scale = args.scale.data;
  p.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  p.bias = args.bias.present() ? args.bias.data : nullptr;
  p.y = args.y.data;
  p.dtype = args.x.dtype;
  p.scale_dtype = args.scale.dtype;
  p.zero_point_dtype = args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  p.M = linear_M(args);
  p.N = linear_N(args);
  p.K = linear_K(args);
  p.group_size = args.group_size;
  return p;
}

}  // namespace

uint64_t matmul_w4a16_scratch_bytes(const LinearArgs& args) {
  const MatmulW4A16Args p = kernel_args(args);
  const int n_multiprocessors = hopper_multiprocessors();
  if (n_multiprocessors == 0 || !can_matmul_w4a16_wgmma(p)) return 0;
  return matmul_w4a16_wgmma_scratch_bytes(p, n_multiprocessors);
}

Status matmul_w4a16(const LinearArgs& args, const ExecutionContext& context) {
  MatmulW4A16Args p = kernel_args(args);
  p.constant_weights = context.constant_weights;
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  const int n_multiprocessors = hopper_multiprocessors();
  const cudaError_t error =
      n_multiprocessors > 0 && can_matmul_w4a16_wgmma(p)
          ? launch_matmul_w4a16_wgmma(p, context.scratch, n_multiprocessors, stream)
          : launch_matmul_w4a16_mma(p, stream);
  return launch_status(weight_name(args), error);
}

}  // namespace cuda_int4
