#include "device.h"

#include <dlfcn.h>
#include <executorch/runtime/platform/log.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "../kernels/cuda/cuda_kernels.h"
#include "checksum.h"
#include "errors.h"
#include "op_table.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

constexpr char kNames[] = "expected \"auto\", \"cpu\", \"cuda\" or \"cuda:<index>\"";

/// "" where "auto" can be CUDA, else why it is the CPU.
std::string why_not_cuda(const std::vector<std::string>* ops) {
  if (cuda_kernels() == nullptr) return "this library was built without CUDA kernels";
  if (!cuda_gpu_answers()) return "no CUDA driver with a GPU answers";
  if (ops != nullptr)
    for (const std::string& op : *ops)
      if (find_cuda_kernel(op) == nullptr) return "there is no CUDA kernel of " + op;
  return "";
}

Error make_auto_device(const DeviceRequest& request, std::unique_ptr<Device>* out) {
  std::string reason = why_not_cuda(request.ops);
  if (reason.empty()) {
    // A GPU too old, or a broken driver: as good as none here, an error for who asks for "cuda".
    if (make_cuda_device(0, request, out) == Error::Ok) {
      static std::once_flag said;
      std::call_once(said, [out] { ET_LOG(Info, "cuda_int4: device auto: %s", (*out)->name()); });
      return Error::Ok;
    }
    reason = last_error();
    clear_last_error();
  }
  static std::once_flag said;
  std::call_once(said, [&reason] {
    ET_LOG(Info, "cuda_int4: device auto: the CPU, because %s", reason.c_str());
  });
  *out = make_cpu_device();
  return Error::Ok;
}

}  // namespace

Error Device::upload_all(const Upload* uploads, size_t n, bool verify, size_t* damaged) {
  *damaged = n;
  for (size_t i = 0; i < n; ++i) {
    const Upload& one = uploads[i];
    if (verify && checksum(one.from, one.nbytes) != one.checksum) {
      *damaged = i;
      return Error::Ok;
    }
    const Error error = upload(one.to, one.from, one.nbytes);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

Error make_device(const DeviceRequest& request, std::unique_ptr<Device>* out) {
  const char* name = request.name;
  if (name == nullptr || name[0] == 0 || std::strcmp(name, "auto") == 0) {
    name = std::getenv("CUDA_INT4_DEVICE");
    if (name == nullptr || name[0] == 0) name = "auto";
  }
  if (std::strcmp(name, "auto") == 0) return make_auto_device(request, out);
  if (std::strcmp(name, "cpu") == 0) {
    *out = make_cpu_device();
    return Error::Ok;
  }
  int index = 0;
  if (std::strncmp(name, "cuda", 4) == 0 && (name[4] == 0 || name[4] == ':')) {
    const char* end = name + std::strlen(name);
    const char* digits = name[4] == 0 ? end : name + 5;
    const auto parsed = std::from_chars(digits, end, index);
    if (digits == end ? name[4] == 0 : parsed.ec == std::errc() && parsed.ptr == end && index >= 0)
      return make_cuda_device(index, request, out);
  }
  return fail(Error::InvalidArgument,
              "device: %s, got \"%s\"; see the device option and the environment variable "
              "CUDA_INT4_DEVICE",
              kNames, name);
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
