// How the runtime reports a failure: a code for the caller, the reason for the human.
//
// ExecuTorch passes on only an Error number. The reason (who, what was expected, what came, what to
// do) is logged through ET_LOG and kept per thread, where cuda_int4_last_error() finds it.
#pragma once

#include <executorch/runtime/core/error.h>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

/// Log the reason, keep it for last_error(), and return `error`.
executorch::runtime::Error fail(executorch::runtime::Error error, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

/// The same for what a kernel entry point returned; Ok when `status` is.
executorch::runtime::Error fail(const Status& status);

/// Like fail, but keeps the reason that is already there when it was set since `clear_last_error`:
/// for a layer that sees only a code come back and may or may not be the first to explain it.
executorch::runtime::Error fail_unless_explained(executorch::runtime::Error error,
                                                 const char* format, ...)
    __attribute__((format(printf, 2, 3)));

/// The reason of the calling thread's latest failure; "" before the first.
const char* last_error();
void clear_last_error();

}  // namespace cuda_int4
