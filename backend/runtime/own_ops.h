// The ops with kernels of our own (kernels/ops.h), as ExecuTorch calls them: EValues in, out resized,
// the kernel's own validation run, its Status passed on.
#pragma once

#include <executorch/runtime/core/span.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

struct OwnOp {
  const char* name;                        // without the namespace: "linear.out"
  executorch::runtime::OpFunction kernel;  // on CPU and CUDA: current_execution() says which
};

executorch::runtime::Span<const OwnOp> own_ops();

}  // namespace cuda_int4
