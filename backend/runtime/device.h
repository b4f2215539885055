// Device -- where a delegate's tensors live and its kernels run. The one seam between CPU and CUDA:
// everything above it (delegate.cpp, constants.cpp) moves bytes and finds kernels through here.
//
// Addresses from allocate() are the device's own; only upload, download, copy, zero and kernels may
// follow them. Work is queued on stream() in order; download waits for it.
#pragma once

#include <executorch/runtime/core/error.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <cstddef>
#include <memory>
#include <string_view>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

constexpr size_t kDeviceAlignment = 64;  // of every allocation, in bytes

class Device {
 public:
  virtual ~Device() = default;

  virtual const char* name() const = 0;
  virtual DeviceKind kind() const = 0;

  /// nullptr where there is no such memory. Not zeroed.
  virtual void* allocate(size_t nbytes) = 0;
  virtual void free(void* pointer) = 0;

  virtual executorch::runtime::Error upload(void* to, const void* host, size_t nbytes) = 0;
  virtual executorch::runtime::Error download(void* host, const void* from, size_t nbytes) = 0;
  virtual executorch::runtime::Error copy(void* to, const void* from, size_t nbytes) = 0;
  virtual executorch::runtime::Error zero(void* to, size_t nbytes) = 0;

  /// Whether kernels read host memory in place: then constants are borrowed from the mapped file.
  virtual bool reads_host_memory() const = 0;
  /// cudaStream_t; nullptr on the CPU.
  virtual void* stream() const = 0;
  /// The kernel of an op by its name in the nested program; nullptr where there is none.
  virtual executorch::runtime::OpFunction find_kernel(std::string_view op) const = 0;
};

std::unique_ptr<Device> make_cpu_device();

/// Whether a CUDA driver is installed here and has a GPU. Asks the driver itself, at run time: the
/// library is linked against none.
bool cuda_gpu_answers();

/// requested: "auto" | "cpu" | "cuda"; nullptr or "" is "auto". The environment variable
/// CUDA_INT4_DEVICE takes the place of "auto".
/// @retval NotSupported a device that this build or this machine does not have.
/// @retval InvalidArgument no such name.
executorch::runtime::Error make_device(const char* requested, std::unique_ptr<Device>* out);

}  // namespace cuda_int4
