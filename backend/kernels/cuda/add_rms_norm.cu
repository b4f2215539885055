// add_rms_norm -- sum[r, d] = norm(x)[r, d] + residual[r, d]
//                 y[r, d] = sum[r, d] / sqrt(mean(sum[r, :]^2) + eps) * weight[d]
//                 norm(x): rms_norm of x with weight x_norm and the same eps; without one, x
//
//   operand    dtype             shape        order in memory  align
//   x          f16 | bf16 | f32  [n_rows, D]  row-major        dtype (16 B, D in whole 16 B: fast)
//   residual   dtype of x        [n_rows, D]  row-major        as x
//   weight     f16 | bf16 | f32  [D]          contiguous       dtype (likewise); absent means 1
//   x_norm     f16 | bf16 | f32  [D]          contiguous       dtype (likewise); or absent
//   sum (out)  dtype of x        [n_rows, D]  row-major        as x; may be x or residual itself
//   y (out)    dtype of x        [n_rows, D]  row-major        as x; no other operand
//   a, parameter (out)  y as int8, where it is asked for: ../quantized_activation.h
//
// Requires  D >= 1   (checked by validate_add_rms_norm); D % 32 == 0 for the int8 form
// Grid      one group of threads per row: a warp (4 to a block) up to 2 vectors a lane, a block of
//           up to 512 threads above; rows beyond the grid's limit in strides
// Bytes     reads x, residual and the weights, writes sum and y; a single row is bound by latency:
//           weights no wider than x are asked for before the wait (constant_weights), x and residual
//           at once behind it, the first 2 vectors of a thread stay in registers; of longer rows a
//           thread reads back what it has written itself
// Numerics  norm(x) and the sum are rounded once each and go on as rounded; fp32 sums of squares in
//           the order of rms_norm.cu, 1 / sqrt correctly rounded, one rounding at the store: the bits
//           of that kernel, an addition and that kernel. The int8 form is that of the rounded y, to
//           the bit quantize_int8's
// Source    own; the kernel is in norm_rows.cuh
#include "add_rms_norm.cuh"
#include "norm_rows.cuh"

namespace cuda_int4 {

cudaError_t launch_add_rms_norm(const NormRowsArgs& args, cudaStream_t stream) {
  return args.x_norm == nullptr ? norm_rows::choose<true, false>(args, stream)
                                : norm_rows::choose<true, true>(args, stream);
}

}  // namespace cuda_int4
