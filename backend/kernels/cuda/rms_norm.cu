// rms_norm -- y[r, d] = x[r, d] / sqrt(mean(x[r, :]^2) + eps) * weight[d]
//
//   operand  dtype             shape        order in memory  align
//   x        f16 | bf16 | f32  [n_rows, D]  row-major        dtype (16 B and D in whole 16 B: fast)
//   weight   f16 | bf16 | f32  [D]          contiguous       dtype (likewise); absent means 1
//   y (out)  dtype of x        [n_rows, D]  row-major        as x; may be x itself
//   a, parameter (out)  y as int8, where it is asked for: ../quantized_activation.h
//
// Requires  D >= 1   (checked by validate_rms_norm); D % 32 == 0 for the int8 form
// Grid      one group of threads per row: a warp (4 to a block) up to 2 vectors a lane, a block of
//           up to 512 threads above; rows beyond the grid's limit in strides
// Bytes     reads x and weight, writes y; a single row is bound by latency: weight is asked for
//           before the wait (constant_weights), and the first 2 vectors of a thread stay in registers
// Numerics  fp32 sum in a fixed order (thread, warp, block), 1 / sqrt correctly rounded, one
//           rounding at the store; the int8 form is that of the rounded y, to the bit quantize_int8's
// Source    own; the kernel is in norm_rows.cuh
#include "norm_rows.cuh"
#include "rms_norm.cuh"

namespace cuda_int4 {

cudaError_t launch_rms_norm(const NormRowsArgs& args, cudaStream_t stream) {
  return norm_rows::choose<false, false>(args, stream);
}

}  // namespace cuda_int4
