// What the files behind c_api.h share: the border between C++ that may throw and C, which never
// does, and the handle of a model.
#pragma once

#include <executorch/runtime/core/error.h>

#include <exception>
#include <memory>
#include <new>
#include <string>

#include "c_api.h"
#include "errors.h"
#include "model.h"

struct cuda_int4_model {
  std::unique_ptr<cuda_int4::Model> model;
  std::string methods;  // what cuda_int4_model_methods returns
  std::string profile;  // what cuda_int4_model_profile returned last
};

namespace cuda_int4 {

/// Runs `body() -> Error` with a fresh reason; turns exceptions of the standard library into codes.
template <typename Body>
int32_t guarded(Body body) noexcept {
  using executorch::runtime::Error;
  clear_last_error();
  try {
    const Error error = body();
    if (error != Error::Ok)
      fail_unless_explained(error, "failed with %s", executorch::runtime::to_string(error));
    return int32_t(error);
  } catch (const std::bad_alloc&) {
    return int32_t(fail(Error::MemoryAllocationFailed, "out of host memory"));
  } catch (const std::exception& e) {
    return int32_t(fail(Error::Internal, "%s", e.what()));
  } catch (...) {
    return int32_t(fail(Error::Internal, "unknown C++ exception"));
  }
}

}  // namespace cuda_int4
