#include "errors.h"

#include <executorch/runtime/platform/log.h>

#include <cstdarg>
#include <cstdio>

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

thread_local char reason[2048] = {0};

void set_reason(const char* format, va_list args) {
  std::vsnprintf(reason, sizeof(reason), format, args);
  ET_LOG(Error, "cuda_int4: %s", reason);
}

Error error_of(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return Error::Ok;
    case StatusCode::kInvalidArgument:
      return Error::InvalidArgument;
    case StatusCode::kIncompatibleLayout:
      return Error::DelegateInvalidCompatibility;
    case StatusCode::kUnsupported:
      return Error::NotSupported;
    case StatusCode::kOutOfMemory:
      return Error::MemoryAllocationFailed;
    case StatusCode::kDeviceError:
      return Error::Internal;
  }
  return Error::Internal;
}

}  // namespace

Error fail(Error error, const char* format, ...) {
  va_list args;
  va_start(args, format);
  set_reason(format, args);
  va_end(args);
  return error;
}

Error fail(const Status& status) {
  return status.ok() ? Error::Ok : fail(error_of(status.code), "%s", status.message);
}

Error fail_unless_explained(Error error, const char* format, ...) {
  if (reason[0] != 0) return error;
  va_list args;
  va_start(args, format);
  set_reason(format, args);
  va_end(args);
  return error;
}

const char* last_error() { return reason; }

void clear_last_error() { reason[0] = 0; }

}  // namespace cuda_int4
