#include "errors.h"

#include <executorch/runtime/platform/log.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "utf8.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

thread_local char reason[2048] = {0};

/// Names in a message may come from a damaged file. What is not UTF-8, and what would break a line,
/// becomes '?'.
void clean(char* text) {
  for (std::string_view rest(text); !rest.empty();) {
    const size_t length = utf8_length(rest);
    const auto byte = static_cast<unsigned char>(*text);
    if (length == 0 || byte < 0x20 || byte == 0x7f) *text = '?';
    text += length > 1 ? length : 1;
    rest = std::string_view(text, rest.size() - (length > 1 ? length : 1));
  }
}

/// ExecuTorch cuts a line of the log at 255 bytes, and its Python binding aborts on one that is not
/// UTF-8, such as one cut inside a character: short lines, ASCII only.
void log_reason() {
  constexpr size_t kLineBytes = 200;
  char line[kLineBytes + 1];
  const char* rest = reason;
  const char* prefix = "cuda_int4: ";
  while (*rest != 0) {
    size_t n = strnlen(rest, kLineBytes);
    if (rest[n] != 0)  // break at the last space, if there is one
      for (size_t i = n; i > kLineBytes / 2; --i)
        if (rest[i] == ' ') {
          n = i;
          break;
        }
    for (size_t i = 0; i < n; ++i) line[i] = (rest[i] & 0x80) ? '?' : rest[i];
    line[n] = 0;
    ET_LOG(Error, "%s%s", prefix, line);
    rest += n + (rest[n] == ' ' ? 1 : 0);
    prefix = "    ";
  }
}

void set_reason(const char* format, va_list args) {
  std::vsnprintf(reason, sizeof(reason), format, args);
  clean(reason);
  log_reason();
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
