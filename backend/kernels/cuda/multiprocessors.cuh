// Which GPU a launcher is on.
#pragma once

#include <cuda_runtime.h>

namespace cuda_int4 {

// Multiprocessors of the current device if it runs sm_90a code, else 0. Built with CUDA_INT4_COMPUTE_SANITIZER,
// 16 of them: with all 132 blocks of 220 KB of shared memory racecheck ends in an error of its own.
inline int hopper_multiprocessors() {
  int device = 0, major = 0, minor = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#ifdef CUDA_INT4_COMPUTE_SANITIZER
  count = 16;
#endif
  return major == 9 && minor == 0 ? count : 0;
}

}  // namespace cuda_int4
