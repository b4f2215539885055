// DeviceUse -- what a model or one of its delegates has done on its device so far.
#pragma once

#include <cstdint>
#include <string>

namespace cuda_int4 {

struct DeviceUse {
  std::string device;  // "cpu", "cuda:0"; "" where nothing was delegated. The rest is 0 on the CPU
  uint64_t device_bytes = 0;       // of device memory, allocated now
  uint64_t peak_device_bytes = 0;  // the most it ever was
  uint64_t uploaded_bytes = 0;     // of constants
  double upload_s = 0;
  uint64_t eager_runs = 0;  // calls whose kernels were launched one by one
  uint64_t captures = 0;    // graphs made
  uint64_t replays = 0;     // calls that were a graph's launch
};

}  // namespace cuda_int4
