// w4a8 on CUDA: from arguments to a launcher, and which kernel runs.
#include "../coalesced.h"
#include "../layouts.h"
#include "launch_status.cuh"
#include "linear_w4a8.cuh"
#include "quantize_int8.cuh"
#include "w4a8.cuh"

namespace cuda_int4 {

namespace {

W4A8Args kernel_args(const LinearArgs& args, const ExecutionContext& context) {
  W4A8Args p = {};
  p.M = linear_M(args);
  p.N = linear_N(args);
  p.K = linear_K(args);
  p.group_size = args.group_size;
  p.n_groups = p.K / p.group_size;
  p.n_tokens = quantized_tokens(p.M);
  p.constant_weights = context.constant_weights;
  p.a = static_cast<const int8_t*>(context.quantized_x);
  p.parameter =
      reinterpret_cast<const QuantizedParameter*>(p.a + quantized_parameter_offset_bytes(p.M, p.K));
  p.qdata = static_cast<const uint8_t*>(args.qdata.data);
  p.scale = args.scale.data;
  p.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  p.bias = args.bias.present() ? args.bias.data : nullptr;
  p.y = args.y.data;
  p.dtype = args.y.dtype;
  p.scale_dtype = args.scale.dtype;
  p.zero_point_dtype = args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  return p;
}

cudaError_t launch(const W4A8Args& args, cudaStream_t stream) {
  if (args.M <= 2) return launch_matvec_w4a8_dp4a(args, stream);
  cudaError_t code = cudaSuccess;
  if (args.M <= 16) {
    bool is_done = false;
    code = launch_matvec_w4a8_slices(args, stream, &is_done);
    if (code != cudaSuccess || is_done) return code;
    return launch_matvec_w4a8_mma(args, stream);
  }
  int device = 0, major = 0;
  code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return code;
  return major == 9 ? launch_matmul_w4a8_wgmma(args, stream) : launch_matmul_w4a8_mma(args, stream);
}

}  // namespace

Status quantize_int8(const TensorView& x, void* to, const ExecutionContext& context) {
  QuantizeInt8Args args = {};
  args.x = x.data;
  args.dtype = x.dtype;
  args.K = x.sizes[x.ndim - 1];
  args.M = 1;
  for (int d = 0; d + 1 < x.ndim; ++d) args.M *= x.sizes[d];
  args.n_tokens = quantized_tokens(args.M);
  args.a = static_cast<int8_t*>(to);
  args.parameter = reinterpret_cast<QuantizedParameter*>(
      args.a + quantized_parameter_offset_bytes(args.M, args.K));
  return launch_status("cuda_int4::quantize_activation",
                       launch_quantize_int8(args, static_cast<cudaStream_t>(context.stream)));
}

Status linear_coalesced_w4a8(const LinearArgs& args, const ExecutionContext& context) {
  return launch_status(weight_name(args), launch(kernel_args(args, context),
                                                 static_cast<cudaStream_t>(context.stream)));
}

Status linear_coalesced_w4a8_baseline(const LinearArgs& args, const ExecutionContext& context) {
  return launch_status(weight_name(args),
                       launch_matvec_w4a8_coalesced(kernel_args(args, context),
                                                    static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
