// marlin.v1 with few rows of x in the table of CUDA kernels: from arguments to a launcher, and which
// kernel runs.
#include "../layouts.h"
#include "../marlin.h"
#include "launch_status.cuh"
#include "matvec_marlin.cuh"

namespace cuda_int4 {

namespace {

MatvecMarlinArgs kernel_args(const LinearArgs& args) {
  MatvecMarlinArgs p = {};
  p.M = linear_M(args);
  p.N = linear_N(args);
  p.K = linear_K(args);
  p.group_size = args.group_size;
  p.x = args.x.data;
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

bool is_int8(const LinearArgs& args) { return args.activation[0] == 'i'; }

bool is_mma(const LinearArgs& args) { return !is_int8(args) && args.x.dtype != DType::kFloat32; }

}  // namespace

uint64_t matvec_marlin_scratch_bytes(const LinearArgs& args) {
  return is_mma(args) ? matvec_marlin_mma_scratch_bytes(kernel_args(args)) : 0;
}

Status matvec_marlin(const LinearArgs& args, const ExecutionContext& context) {
  MatvecMarlinArgs p = kernel_args(args);
  p.scratch = context.scratch;
  p.constant_weights = context.constant_weights;
  if (is_int8(args)) {
    p.x = context.quantized_x;
    p.n_tokens = quantized_tokens(p.M);
    p.parameter = reinterpret_cast<const QuantizedParameter*>(
        static_cast<const char*>(p.x) + quantized_parameter_offset_bytes(p.M, p.K));
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  return launch_status(weight_name(args), is_mma(args) ? launch_matvec_marlin_mma(p, stream)
                                                       : launch_matvec_marlin_plain(p, stream));
}

}  // namespace cuda_int4
