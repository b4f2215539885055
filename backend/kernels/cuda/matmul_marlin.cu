// cuda_int4::linear on marlin.v1 and marlin24.v1, activation "none", more than 16 rows of x: which
// tensor-core kernel.
#include "../layouts.h"
#include "../marlin.h"
#include "launch_status.cuh"
#include "matmul_marlin.cuh"
#include "multiprocessors.cuh"

namespace cuda_int4 {

namespace {

MatmulMarlinArgs kernel_args(const LinearArgs& args) {
  MatmulMarlinArgs p = {};
  p.x = args.x.data;
  p.qdata = args.qdata.data;
  p.meta = args.meta.present() ? args.meta.data : nullptr;
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

using ScratchBytes = uint64_t (*)(const MatmulMarlinArgs& args, int n_multiprocessors);
using Launch = cudaError_t (*)(const MatmulMarlinArgs& args, void* scratch, int n_multiprocessors,
                               cudaStream_t stream);

uint64_t scratch_bytes(const LinearArgs& args, ScratchBytes wgmma_scratch_bytes) {
  const MatmulMarlinArgs p = kernel_args(args);
  const int n_multiprocessors = hopper_multiprocessors();
  if (n_multiprocessors == 0 || !can_matmul_marlin_wgmma(p)) return 0;
  return wgmma_scratch_bytes(p, n_multiprocessors);
}

Status launch(const LinearArgs& args, const ExecutionContext& context, Launch launch_wgmma) {
  MatmulMarlinArgs p = kernel_args(args);
  p.constant_weights = context.constant_weights;
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  const int n_multiprocessors = hopper_multiprocessors();
  const cudaError_t error = n_multiprocessors > 0 && can_matmul_marlin_wgmma(p)
                                ? launch_wgmma(p, context.scratch, n_multiprocessors, stream)
                                : launch_matmul_marlin_mma(p, stream);
  return launch_status(weight_name(args), error);
}

}  // namespace

uint64_t matmul_marlin_scratch_bytes(const LinearArgs& args) {
  return scratch_bytes(args, matmul_marlin_wgmma_scratch_bytes);
}

Status matmul_marlin(const LinearArgs& args, const ExecutionContext& context) {
  return launch(args, context, launch_matmul_marlin_wgmma);
}

uint64_t matmul_marlin24_scratch_bytes(const LinearArgs& args) {
  return scratch_bytes(args, matmul_marlin24_wgmma_scratch_bytes);
}

Status matmul_marlin24(const LinearArgs& args, const ExecutionContext& context) {
  return launch(args, context, launch_matmul_marlin24_wgmma);
}

}  // namespace cuda_int4
