// A GPU as a Device: device memory, pinned host memory, one stream.
//
// The device is made current for each call and the one before is restored, so that neither the
// caller's current device nor another method's matters. No state outside of the object.
#include <cuda_runtime.h>

#include <cstring>

#include "device.h"
#include "errors.h"
#include "op_table.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::OpFunction;

namespace {

constexpr int kLeastComputeCapability = 80;  // what CMakeLists.txt compiles for, at the least

Error cuda_error(const char* device, const char* doing, cudaError_t code) {
  if (code == cudaSuccess) return Error::Ok;
  cudaGetLastError();  // or the next launch would report it again
  const bool lost = code == cudaErrorIllegalAddress || code == cudaErrorLaunchFailure ||
                    code == cudaErrorIllegalInstruction || code == cudaErrorMisalignedAddress ||
                    code == cudaErrorLaunchTimeout || code == cudaErrorHardwareStackError ||
                    code == cudaErrorInvalidPc || code == cudaErrorAssert;
  return fail(Error::Internal, "device %s: %s failed: %s (%s)%s", device, doing,
              cudaGetErrorName(code), cudaGetErrorString(code),
              lost ? "; the process can use this GPU no more, start it again" : "");
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_("cuda:" + std::to_string(index)) {}
  ~CudaDevice() override {
    const DeviceScope scope(*this);
    if (owns_stream_) cudaStreamDestroy(stream_);
    cudaGetLastError();
  }

  Error open(const DeviceRequest& request) {
    const DeviceScope scope(*this);
    if (request.on_callers_stream) {
      stream_ = static_cast<cudaStream_t>(request.stream);
      return Error::Ok;
    }
    const Error error =
        check("making a stream", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    owns_stream_ = error == Error::Ok;
    return error;
  }

  const char* name() const override { return name_.c_str(); }
  DeviceKind kind() const override { return DeviceKind::kCuda; }

  void* allocate(size_t nbytes) override {
    const DeviceScope scope(*this);
    void* pointer = nullptr;
    if (cudaMalloc(&pointer, nbytes == 0 ? 1 : nbytes) == cudaSuccess) return pointer;
    cudaGetLastError();
    return nullptr;
  }
  void free(void* pointer) override {
    if (pointer == nullptr) return;
    const DeviceScope scope(*this);
    cudaStreamSynchronize(stream_);  // what is queued may still use it
    cudaFree(pointer);
    cudaGetLastError();
  }
  uint64_t free_bytes() const override {
    const DeviceScope scope(*this);
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) return free;
    cudaGetLastError();
    return UINT64_MAX;
  }

  void* allocate_host(size_t nbytes) override {
    const DeviceScope scope(*this);
    void* pointer = nullptr;
    // Portable: a scope for another GPU may be open when it is read.
    if (cudaHostAlloc(&pointer, nbytes == 0 ? 1 : nbytes,
                      cudaHostAllocMapped | cudaHostAllocPortable) == cudaSuccess)
      return pointer;
    cudaGetLastError();
    return nullptr;
  }
  void free_host(void* pointer) override {
    if (pointer == nullptr) return;
    const DeviceScope scope(*this);
    cudaFreeHost(pointer);
    cudaGetLastError();
  }
  bool is_from_allocate_host(const void* pointer) const override {
    const DeviceScope scope(*this);
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, pointer) == cudaSuccess)
      return attributes.type == cudaMemoryTypeHost;
    cudaGetLastError();
    return false;
  }

  Error upload(void* to, const void* host, size_t nbytes) override {
    const Error error = transfer("an upload", to, host, nbytes, cudaMemcpyHostToDevice);
    return error == Error::Ok ? synchronize() : error;
  }
  Error download(void* host, const void* from, size_t nbytes) override {
    const Error error = transfer("a download", host, from, nbytes, cudaMemcpyDeviceToHost);
    return error == Error::Ok ? synchronize() : error;
  }
  Error copy(void* to, const void* from, size_t nbytes) override {
    return transfer("a copy", to, from, nbytes, cudaMemcpyDeviceToDevice);
  }
  Error zero(void* to, size_t nbytes) override {
    if (nbytes == 0) return Error::Ok;
    const DeviceScope scope(*this);
    return check("zeroing memory", cudaMemsetAsync(to, 0, nbytes, stream_));
  }
  Error upload_async(void* to, const void* host, size_t nbytes) override {
    return transfer("an upload", to, host, nbytes, cudaMemcpyHostToDevice);
  }
  Error download_async(void* host, const void* from, size_t nbytes) override {
    return transfer("a download", host, from, nbytes, cudaMemcpyDeviceToHost);
  }
  Error synchronize() override {
    const DeviceScope scope(*this);
    const Error error = check("the work queued on it", cudaStreamSynchronize(stream_));
    return error == Error::Ok ? check("the work queued on it", cudaGetLastError()) : error;
  }

  bool reads_host_memory() const override { return false; }
  void* stream() const override { return stream_; }
  OpFunction find_kernel(std::string_view op) const override { return find_cuda_kernel(op); }

 private:
  int make_current() const override {
    int before = -1;
    if (cudaGetDevice(&before) == cudaSuccess && before == index_) return -1;
    cudaSetDevice(index_);
    return before;
  }
  void restore_current(int before) const override {
    if (before >= 0) cudaSetDevice(before);
  }

  Error check(const char* doing, cudaError_t code) const { return cuda_error(name(), doing, code); }
  Error transfer(const char* doing, void* to, const void* from, size_t nbytes,
                 cudaMemcpyKind kind) const {
    if (nbytes == 0) return Error::Ok;
    const DeviceScope scope(*this);
    return check(doing, cudaMemcpyAsync(to, from, nbytes, kind, stream_));
  }

  int index_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
  bool owns_stream_ = false;
};

}  // namespace

Error make_cuda_device(int index, const DeviceRequest& request, std::unique_ptr<Device>* out) {
  constexpr char kCure[] = "use device \"cpu\" or \"auto\"";
  if (!cuda_gpu_answers())
    return fail(Error::NotSupported,
                "device \"cuda\": expected a CUDA driver with a GPU, none answers here; %s", kCure);
  int n = 0;
  const cudaError_t counted = cudaGetDeviceCount(&n);
  if (counted != cudaSuccess) {
    cudaGetLastError();
    return fail(Error::NotSupported,
                "device \"cuda\": expected a driver for CUDA %d.%d or later, got: %s; update the "
                "driver, or %s",
                CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, cudaGetErrorString(counted),
                kCure);
  }
  if (index >= n)
    return fail(Error::NotSupported,
                "device \"cuda:%d\": expected an index below %d, the GPUs here", index, n);
  cudaDeviceProp properties{};
  const std::string name = "cuda:" + std::to_string(index);
  const Error error = cuda_error(name.c_str(), "asking for its properties",
                                 cudaGetDeviceProperties(&properties, index));
  if (error != Error::Ok) return error;
  if (properties.major * 10 + properties.minor < kLeastComputeCapability)
    return fail(Error::NotSupported,
                "device \"%s\": expected compute capability 8.0 or later, %s has %d.%d; %s",
                name.c_str(), properties.name, properties.major, properties.minor, kCure);
  auto device = std::make_unique<CudaDevice>(index);
  const Error failed = device->open(request);
  if (failed != Error::Ok) return failed;
  *out = std::move(device);
  return Error::Ok;
}

}  // namespace cuda_int4
