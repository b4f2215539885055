// cuda_int4::linear, activation "none", more than 16 rows of x: which tensor-core kernel.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "launch_status.cuh"
#include "matmul_w4a16.cuh"

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

uint64_t matmul_w4a16_scratch_bytes(const LinearArgs&) { return 0; }

Status matmul_w4a16(const LinearArgs& args, const ExecutionContext& context) {
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  return launch_status(weight_name(args), launch_matmul_w4a16_mma(kernel_args(args), stream));
}

}  // namespace cuda_int4
