// CUDA's errors to ours.
#pragma once

#include <cuda_runtime.h>

#include "../checks.h"

namespace cuda_int4 {

inline Status launch_status(const char* who, cudaError_t code) {
  if (code == cudaSuccess) return {};
  return error(
      StatusCode::kDeviceError,
      "%s: expected the CUDA launch to succeed, got %s (%s); check that the tensors are on "
      "the current device and that its driver is up to date",
      who, cudaGetErrorName(code), cudaGetErrorString(code));
}

}  // namespace cuda_int4
