// The ParallelFor of kernels/tensor_view.h on ExecuTorch's thread pool.
#pragma once

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

/// See ParallelFor. Runs on the calling thread where the pool refuses the range.
void parallel_for(int64_t n, int64_t grain, void (*fn)(void* context, int64_t begin, int64_t end),
                  void* context);

}  // namespace cuda_int4
