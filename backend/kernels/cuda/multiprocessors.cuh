// Which GPU a launcher is on.
#pragma once

#include <cuda_runtime.h>

namespace cuda_int4 {

// Multiprocessors of the current device if it runs sm_90a code, else 0.
inline int hopper_multiprocessors() {
  int device = 0, major = 0, minor = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return major == 9 && minor == 0 ? count : 0;
}

}  // namespace cuda_int4
