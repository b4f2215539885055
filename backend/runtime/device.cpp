#include "device.h"

#include <executorch/runtime/platform/log.h>

#include <cstdlib>
#include <cstring>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

Error make_device(const char* requested, std::unique_ptr<Device>* out) {
  const char* name = requested;
  if (name == nullptr || name[0] == 0 || std::strcmp(name, "auto") == 0) {
    name = std::getenv("CUDA_INT4_DEVICE");
    if (name == nullptr || name[0] == 0) name = "auto";
  }
  if (std::strcmp(name, "auto") == 0) {
    static const bool logged = [] {
      ET_LOG(Info, "cuda_int4: device auto: the CPU (this version has no CUDA kernels)");
      return true;
    }();
    (void)logged;
    name = "cpu";
  }
  if (std::strcmp(name, "cpu") == 0) {
    *out = make_cpu_device();
    return Error::Ok;
  }
  if (std::strcmp(name, "cuda") == 0)
    return fail(Error::NotSupported,
                "device \"cuda\": expected a build with CUDA kernels, this cuda_int4 %s has none; "
                "use device \"cpu\" or \"auto\"",
                CUDA_INT4_VERSION);
  return fail(Error::InvalidArgument,
              "device: expected \"auto\", \"cpu\" or \"cuda\", got \"%s\"; see the device option "
              "and the environment variable CUDA_INT4_DEVICE",
              name);
}

}  // namespace cuda_int4
