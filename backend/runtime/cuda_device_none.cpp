// Stands in for cuda_device.cu in a build without nvcc.
#include "device.h"
#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

Error make_cuda_device(int, const DeviceRequest&, std::unique_ptr<Device>*) {
  return fail(Error::NotSupported,
              "device \"cuda\": expected a library with CUDA kernels, this one was built without "
              "nvcc; use device \"cpu\" or \"auto\", or build again with nvcc on the PATH");
}

}  // namespace cuda_int4
