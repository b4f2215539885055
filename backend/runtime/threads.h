// How many threads ExecuTorch's thread pool has.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>

namespace cuda_int4 {

/// 1 to 1024, the calling thread among them. For the whole process; nothing may be running.
executorch::runtime::Error set_num_threads(uint32_t n_threads);

}  // namespace cuda_int4
