// coalesced.v1 -- int4 codes row-major, scales and zero points row-major beside them.
//
//   part        dtype                     shape          order in memory                      align
//   qdata       u8                        [N, K/2]       row-major; even k in the low nibble  16 B
//   scale       f16 | bf16 | f32          [N, n_groups]  row-major                            dtype
//   zero_point  dtype of scale | f32      [N, n_groups]  row-major; absent means 8.0          dtype
//   bias        f16 | bf16 | f32          [N]            contiguous; absent means 0           dtype
//
//   bit offset of code (n, k) = 4 * (n * K + k);  w = (q - zero_point) * scale
//
// Requires K % 32 == 0, group_size in {32, 64, 128, 256} or K, K % group_size == 0; any N.
#pragma once

#include "linear_sizes.h"

namespace cuda_int4 {

Status validate_coalesced_weight(const LinearArgs& args);
int64_t coalesced_K(const LinearArgs& args);

// Kernels of the layout table, one pair per device; arguments have passed validate_linear.
uint64_t cpu_linear_coalesced_scratch_bytes(const LinearArgs& args);
Status cpu_linear_coalesced(const LinearArgs& args, const ExecutionContext& context);
uint64_t cuda_linear_coalesced_scratch_bytes(const LinearArgs& args);
Status cuda_linear_coalesced(const LinearArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
