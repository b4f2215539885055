// Mat-vecs on marlin24.v1: from arguments to a launcher, and which kernel runs.
#include "../layouts.h"
#include "../marlin.h"
#include "launch_status.cuh"
#include "matvec_marlin24.cuh"

namespace cuda_int4 {

namespace {

constexpr int64_t kMaxRows = 16;  // of x, in one launch of the mma kernel

cudaError_t launch(const MatvecMarlin24Args& args, cudaStream_t stream) {
  if (args.dtype == DType::kFloat32) return launch_matvec_marlin24_plain(args, stream);
  const int64_t y_row_bytes = 2 * args.N, x_row_bytes = 2 * args.K;
  for (int64_t m = 0; m < args.M; m += kMaxRows) {
    MatvecMarlin24Args part = args;
    part.M = args.M - m < kMaxRows ? args.M - m : kMaxRows;
    if (args.x == nullptr) {
      part.a += m * args.K;
      part.parameter += m;
    } else {
      part.x = static_cast<const uint8_t*>(args.x) + m * x_row_bytes;
    }
    part.y = static_cast<uint8_t*>(args.y) + m * y_row_bytes;
    bool launched = false;
    cudaError_t code = launch_matvec_marlin24_mma(part, stream, &launched);
    if (code == cudaSuccess && !launched) code = launch_matvec_marlin24_plain(part, stream);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

}  // namespace

Status matvec_marlin24(const LinearArgs& args, const ExecutionContext& context) {
  MatvecMarlin24Args p = {};
  p.M = linear_M(args);
  p.N = linear_N(args);
  p.K = linear_K(args);
  p.padded_N = marlin_padded_N(args);
  p.group_size = args.group_size;
  if (args.activation[0] == 'i') {
    p.n_tokens = quantized_tokens(p.M);
    p.a = static_cast<const int8_t*>(context.quantized_x);
    p.parameter = reinterpret_cast<const QuantizedParameter*>(
        p.a + quantized_parameter_offset_bytes(p.M, p.K));
  } else {
    p.x = args.x.data;
  }
  p.qdata = static_cast<const uint8_t*>(args.qdata.data);
  p.meta = static_cast<const uint8_t*>(args.meta.data);
  p.scale = args.scale.data;
  p.bias = args.bias.present() ? args.bias.data : nullptr;
  p.y = args.y.data;
  p.dtype = args.x.dtype;
  p.scale_dtype = args.scale.dtype;
  p.constant_weights = context.constant_weights;
  return launch_status(weight_name(args), launch(p, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
