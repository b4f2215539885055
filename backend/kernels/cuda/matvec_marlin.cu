// marlin.v1 with few rows of x in the table of CUDA kernels: from arguments to a launcher, and which
// kernel runs.
#include "../layouts.h"
#include "../marlin.h"
#include "launch_status.cuh"
#include "matvec_marlin.cuh"

namespace cuda_int4 {

namespace {

cudaError_t launch(const MatvecMarlinArgs& args, cudaStream_t stream) {
  const bool is_w4a8 = args.parameter != nullptr;
  if (is_w4a8 || args.dtype == DType::kFloat32) return launch_matvec_marlin_plain(args, stream);
  return launch_matvec_marlin_mma(args, stream);
}

}  // namespace

Status matvec_marlin(const LinearArgs& args, const ExecutionContext& context) {
  MatvecMarlinArgs p = {};
  p.M = linear_M(args);
  p.N = linear_N(args);
  p.K = linear_K(args);
  p.group_size = args.group_size;
  p.x = args.x.data;
  if (args.activation[0] == 'i') {
    p.x = context.quantized_x;
    p.n_tokens = quantized_tokens(p.M);
    p.parameter = reinterpret_cast<const QuantizedParameter*>(
        static_cast<const char*>(p.x) + quantized_parameter_offset_bytes(p.M, p.K));
  }
  p.qdata = static_cast<const uint8_t*>(args.qdata.data);
  p.scale = args.scale.data;
  p.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  p.bias = args.bias.present() ? args.bias.data : nullptr;
  p.y = args.y.data;
  p.dtype = args.y.dtype;
  p.scale_dtype = args.scale.dtype;
  p.zero_point_dtype = args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  p.constant_weights = context.constant_weights;
  return launch_status(weight_name(args), launch(p, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
