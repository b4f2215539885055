// The w4a8 entries of the table of CUDA kernels (cuda_kernels.h).
#pragma once

#include "../ops.h"

namespace cuda_int4 {

Status quantize_int8(const TensorView& x, void* to, const ExecutionContext& context);
Status linear_coalesced_w4a8(const LinearArgs& args, const ExecutionContext& context);

// The same by the baseline mat-vec, which the table does not have: what the checks run beside it.
Status linear_coalesced_w4a8_baseline(const LinearArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
