#include "device.h"

#include <dlfcn.h>
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
      ET_LOG(Info, "cuda_int4: device auto: the CPU (this version runs .pte files nowhere else)");
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
    return fail(
        Error::NotSupported,
        "device \"cuda\": cuda_int4 %s runs .pte files on the CPU only; use device \"cpu\" or "
        "\"auto\"",
        CUDA_INT4_VERSION);
  return fail(Error::InvalidArgument,
              "device: expected \"auto\", \"cpu\" or \"cuda\", got \"%s\"; see the device option "
              "and the environment variable CUDA_INT4_DEVICE",
              name);
}

bool cuda_gpu_answers() {
  static const bool answers = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver == nullptr) return false;
    using Init = int (*)(unsigned flags);
    using GetCount = int (*)(int* count);
    const auto init = reinterpret_cast<Init>(dlsym(driver, "cuInit"));
    const auto get_count = reinterpret_cast<GetCount>(dlsym(driver, "cuDeviceGetCount"));
    int n = 0;
    // Never dlclosed: a driver that has been initialised stays.
    return init != nullptr && get_count != nullptr && init(0) == 0 && get_count(&n) == 0 && n > 0;
  }();
  return answers;
}

}  // namespace cuda_int4
