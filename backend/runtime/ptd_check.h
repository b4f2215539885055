// What ExecuTorch's FlatTensorDataMap trusts of a .ptd: all of it. check_ptd makes sure, before the
// map is made, that the pointers of its flatbuffer stay inside it.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>

namespace cuda_int4 {

/// `data` is a .ptd of `nbytes` bytes without its seal, past check_file; `path` is for messages.
executorch::runtime::Error check_ptd(const uint8_t* data, uint64_t nbytes, const char* path);

}  // namespace cuda_int4
