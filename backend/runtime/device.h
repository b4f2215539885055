// Device -- where a delegate's tensors live and its kernels run. The one seam between CPU and CUDA:
// everything above it (delegate.cpp, constants.cpp) moves bytes and finds kernels through here.
//
// Addresses from allocate() are the device's own; only upload, download, copy, zero and kernels may
// follow them. Work is queued on stream() in order; what says "async" does not wait for it.
#pragma once

#include <executorch/runtime/core/error.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

constexpr size_t kDeviceAlignment = 64;  // of every allocation, in bytes

// Bytes of the host that go to the device.
struct Upload {
  void* to;
  const void* from;
  uint64_t nbytes;
  uint32_t checksum;  // checksum.h, of all of them
};

// Recorded work that is launched as one: a CUDA graph.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const char* name() const = 0;
  virtual DeviceKind kind() const = 0;

  /// nullptr where there is no such memory. Not zeroed.
  virtual void* allocate(size_t nbytes) = 0;
  virtual void free(void* pointer) = 0;
  /// Bytes that allocate() could give now; UINT64_MAX where nobody can tell.
  virtual uint64_t free_bytes() const { return UINT64_MAX; }

  /// Host memory that async transfers read and write without a copy between.
  virtual void* allocate_host(size_t nbytes) = 0;
  virtual void free_host(void* pointer) = 0;
  /// Makes host memory of anybody's as if it came from allocate_host, until undo_page_lock. False
  /// where it cannot, or need not.
  virtual bool page_lock(void*, size_t) { return false; }
  virtual void undo_page_lock(void*) {}
  /// Whether transfers can read and write it without a copy between, whoever allocated it.
  virtual bool is_page_locked(const void*, size_t) const { return true; }

  virtual executorch::runtime::Error upload(void* to, const void* host, size_t nbytes) = 0;
  virtual executorch::runtime::Error download(void* host, const void* from, size_t nbytes) = 0;
  virtual executorch::runtime::Error copy(void* to, const void* from, size_t nbytes) = 0;
  virtual executorch::runtime::Error zero(void* to, size_t nbytes) = 0;
  /// `host` is from allocate_host and stays as it is until synchronize().
  virtual executorch::runtime::Error upload_async(void* to, const void* host, size_t nbytes) {
    return upload(to, host, nbytes);
  }
  virtual executorch::runtime::Error download_async(void* host, const void* from, size_t nbytes) {
    return download(host, from, nbytes);
  }
  /// All of them, as fast as the bus goes; `verify` compares checksums on the way. Destinations
  /// ascend within one allocation, and what is between them may be written, too. *damaged: the first
  /// of another checksum, n where there is none.
  virtual executorch::runtime::Error upload_all(const Upload* uploads, size_t n, bool verify,
                                                size_t* damaged);
  /// Waits for everything queued; an error of any of it comes out here at the latest.
  virtual executorch::runtime::Error synchronize() { return executorch::runtime::Error::Ok; }
  /// Whether everything queued is done, without waiting; an error of any of it.
  virtual executorch::runtime::Error query(bool* idle) {
    *idle = true;
    return executorch::runtime::Error::Ok;
  }

  /// Whether kernels read host memory in place: then constants are borrowed from the mapped file,
  /// and inputs and outputs are the caller's own memory.
  virtual bool reads_host_memory() const = 0;
  /// cudaStream_t, while capturing the one that is captured; nullptr on the CPU.
  virtual void* stream() const = 0;

  /// From here to end_capture(), work of the calling thread is recorded and does not run; allocate()
  /// gives nothing. False where that cannot be.
  virtual bool begin_capture() { return false; }
  /// nullptr if something in between could not be recorded.
  virtual std::unique_ptr<DeviceGraph> end_capture() { return nullptr; }
  /// While capturing: what follows is left out of the record, or is part of it again.
  virtual void leave_out(bool) {}
  virtual executorch::runtime::Error launch(DeviceGraph&) {
    return executorch::runtime::Error::NotSupported;
  }

  /// Notes the time at which the work queued so far is done, under number `i`; recorded like other
  /// work while capturing.
  virtual void mark(size_t i) = 0;
  /// Between two of them, once they are past; negative where that cannot be told.
  virtual double microseconds_between(size_t from, size_t to) = 0;
  /// A named range in the timeline of a profiler that watches.
  virtual void push_range(const char*) {}
  virtual void pop_range() {}

  /// What allocate() has given and free() not taken back, and the most that ever was; bytes.
  uint64_t allocated_bytes() const { return allocated_bytes_; }
  uint64_t peak_allocated_bytes() const { return peak_allocated_bytes_; }

  /// The kernel of an op by its name in the nested program; nullptr where there is none.
  virtual executorch::runtime::OpFunction find_kernel(std::string_view op) const = 0;

 protected:
  uint64_t allocated_bytes_ = 0, peak_allocated_bytes_ = 0;

 private:
  friend class DeviceScope;
  /// Makes this device the calling thread's current one; what was current before comes back.
  virtual int make_current() const { return -1; }
  virtual void restore_current(int) const {}
};

/// The calling thread works on `device` while this lives; then on the one it worked on before.
class DeviceScope {
 public:
  explicit DeviceScope(const Device& device) : device_(device), before_(device.make_current()) {}
  ~DeviceScope() { device_.restore_current(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  const Device& device_;
  int before_;
};

std::unique_ptr<Device> make_cpu_device();

/// Whether a CUDA driver is installed here and has a GPU. Asks the driver itself, at run time: the
/// library is linked against none.
bool cuda_gpu_answers();

/// A capture that ends with this at the latest, also where an exception passes.
class Capture {
 public:
  explicit Capture(Device& device) : device_(device), going_(device.begin_capture()) {}
  ~Capture() {
    if (going_) device_.end_capture();
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  bool going() const { return going_; }
  std::unique_ptr<DeviceGraph> end() {
    going_ = false;
    return device_.end_capture();
  }

 private:
  Device& device_;
  bool going_;
};

struct DeviceRequest {
  /// "auto" | "cpu" | "cuda" | "cuda:<index>"; nullptr or "" is "auto", whose place the environment
  /// variable CUDA_INT4_DEVICE takes.
  const char* name = nullptr;
  /// Names in the nested program: "auto" is CUDA only if that has all of them.
  const std::vector<std::string>* ops = nullptr;
  /// On CUDA: the caller's cudaStream_t to queue all work on. Else a stream of the device's own.
  bool on_callers_stream = false;
  void* stream = nullptr;
};

/// @retval NotSupported a device that this build or this machine does not have.
/// @retval InvalidArgument no such name.
executorch::runtime::Error make_device(const DeviceRequest& request, std::unique_ptr<Device>* out);

/// GPU number `index` of the driver. NotSupported, with the reason, where there is none that the
/// library's kernels run on.
executorch::runtime::Error make_cuda_device(int index, const DeviceRequest& request,
                                            std::unique_ptr<Device>* out);

}  // namespace cuda_int4
