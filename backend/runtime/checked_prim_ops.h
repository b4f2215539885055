// ExecuTorch's ops on shapes and numbers take what they get for granted: another type of value, a
// dimension that a tensor has not, a division by 0 end the process. These look first.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <string_view>

namespace cuda_int4 {

/// nullptr: an op that needs no look, or none of them.
executorch::runtime::OpFunction find_checked_prim_op(std::string_view name);

}  // namespace cuda_int4
