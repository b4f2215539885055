// A GPU as a Device: device memory, pinned host memory, one stream.
//
// The device is made current for each call and the one before is restored, so that neither the
// caller's current device nor another method's matters. No state outside of the object.
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "device.h"
#include "errors.h"
#include "op_table.h"
#include "upload_ring.h"

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

class CudaGraph final : public DeviceGraph {
 public:
  explicit CudaGraph(cudaGraphExec_t exec) : exec(exec) {}
  ~CudaGraph() override { cudaGraphExecDestroy(exec); }
  const cudaGraphExec_t exec;
};

/// Page-locked memory for a moment: in huge pages, if the system has them, it is locked at once, in
/// small ones at 0.4 s/GB.
class LockedBuffers {
 public:
  explicit LockedBuffers(size_t nbytes) {
    constexpr size_t kHugePage = size_t(2) << 20;
    const size_t rounded = (nbytes + kHugePage - 1) / kHugePage * kHugePage;
    memory_ = std::aligned_alloc(kHugePage, rounded);
    if (memory_ == nullptr) return;
#if defined(MADV_HUGEPAGE)
    madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
    code_ = cudaHostRegister(memory_, rounded, cudaHostRegisterPortable);
  }
  ~LockedBuffers() {
    if (code_ == cudaSuccess) cudaHostUnregister(memory_);
    std::free(memory_);
  }
  LockedBuffers(const LockedBuffers&) = delete;
  LockedBuffers& operator=(const LockedBuffers&) = delete;

  cudaError_t code() const { return code_; }
  void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
  cudaError_t code_ = cudaErrorMemoryAllocation;
};

class CudaTransport final : public UploadTransport {
 public:
  CudaTransport(int index, cudaStream_t stream) : index_(index), stream_(stream) {
    for (cudaEvent_t& event : sent_) note(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~CudaTransport() override {
    for (cudaEvent_t event : sent_)
      if (event != nullptr) cudaEventDestroy(event);
  }
  cudaError_t error() const { return static_cast<cudaError_t>(error_.load()); }
  bool note(cudaError_t code) {
    int expected = cudaSuccess;
    if (code != cudaSuccess) error_.compare_exchange_strong(expected, code);
    return code == cudaSuccess;
  }

  // Threads of the pool, where another device may be current. They are given back as they were.
  bool enter_thread() override {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = -1;
    return note(cudaSetDevice(index_));
  }
  void leave_thread() override {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  bool send(size_t slot, void* to, const void* buffer, uint64_t nbytes) override {
    return note(cudaMemcpyAsync(to, buffer, nbytes, cudaMemcpyHostToDevice, stream_)) &&
           note(cudaEventRecord(sent_[slot], stream_));
  }
  bool wait(size_t slot) override { return note(cudaEventSynchronize(sent_[slot])); }

 private:
  const int index_;
  const cudaStream_t stream_;
  cudaEvent_t sent_[UploadRing::kSlots] = {};
  std::atomic<int> error_{cudaSuccess};
  static thread_local int before_;
};

thread_local int CudaTransport::before_ = -1;

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_("cuda:" + std::to_string(index)) {}
  ~CudaDevice() override {
    const DeviceScope scope(*this);
    if (owns_stream_) cudaStreamDestroy(stream_);
    if (capture_stream_ != nullptr) cudaStreamDestroy(capture_stream_);
    if (left_out_stream_ != nullptr) cudaStreamDestroy(left_out_stream_);
    for (cudaEvent_t mark : marks_)
      if (mark != nullptr) cudaEventDestroy(mark);
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
    if (capturing_) return nullptr;
    const DeviceScope scope(*this);
    void* pointer = nullptr;
    if (cudaMalloc(&pointer, std::max<size_t>(nbytes, 1)) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    sizes_.emplace(pointer, nbytes);
    allocated_bytes_ += nbytes;
    peak_allocated_bytes_ = std::max(peak_allocated_bytes_, allocated_bytes_);
    return pointer;
  }
  void free(void* pointer) override {
    if (pointer == nullptr) return;
    const DeviceScope scope(*this);
    cudaStreamSynchronize(stream_);  // what is queued may still use it
    cudaFree(pointer);
    cudaGetLastError();
    const auto size = sizes_.find(pointer);
    allocated_bytes_ -= size->second;
    sizes_.erase(size);
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
  bool page_lock(void* memory, size_t nbytes) override {
    const DeviceScope scope(*this);
    if (cudaHostRegister(memory, nbytes, cudaHostRegisterPortable) == cudaSuccess) return true;
    cudaGetLastError();
    return false;
  }
  void undo_page_lock(void* memory) override {
    const DeviceScope scope(*this);
    cudaHostUnregister(memory);
    cudaGetLastError();
  }
  bool is_page_locked(const void* pointer, size_t nbytes) const override {
    const DeviceScope scope(*this);
    const auto* bytes = static_cast<const uint8_t*>(pointer);
    for (const uint8_t* at : {bytes, bytes + (nbytes == 0 ? 0 : nbytes - 1)}) {
      cudaPointerAttributes attributes{};
      if (cudaPointerGetAttributes(&attributes, at) != cudaSuccess) cudaGetLastError();
      if (attributes.type != cudaMemoryTypeHost) return false;
    }
    return true;
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
    return check("zeroing memory",
                 cudaMemsetAsync(to, 0, nbytes, static_cast<cudaStream_t>(stream())));
  }
  Error upload_async(void* to, const void* host, size_t nbytes) override {
    return transfer("an upload", to, host, nbytes, cudaMemcpyHostToDevice);
  }
  Error download_async(void* host, const void* from, size_t nbytes) override {
    return transfer("a download", host, from, nbytes, cudaMemcpyDeviceToHost);
  }
  Error upload_all(const Upload* uploads, size_t n, bool verify, size_t* damaged) override {
    const DeviceScope scope(*this);
    UploadRing ring(uploads, n, verify);
    *damaged = n;
    if (ring.buffer_bytes() == 0) return Error::Ok;
    const LockedBuffers buffers(ring.buffer_bytes());
    CudaTransport transport(index_, stream_);
    if (transport.note(buffers.code()) && transport.error() == cudaSuccess)
      ring.run(buffers.data(), transport);
    transport.note(cudaStreamSynchronize(stream_));  // before the buffers go away
    const Error error = check("uploading constants", transport.error());
    if (error == Error::Ok && verify) *damaged = ring.first_damaged();
    return error;
  }
  Error synchronize() override {
    const DeviceScope scope(*this);
    const Error error = check("the work queued on it", cudaStreamSynchronize(stream_));
    return error == Error::Ok ? check("the work queued on it", cudaGetLastError()) : error;
  }

  Error query(bool* idle) override {
    const DeviceScope scope(*this);
    const cudaError_t code = cudaStreamQuery(stream_);
    *idle = code != cudaErrorNotReady;
    return *idle ? check("the work queued on it", code) : Error::Ok;
  }

  bool reads_host_memory() const override { return false; }
  void* stream() const override {
    if (leaving_out_) return left_out_stream_;
    return capturing_ ? capture_stream_ : stream_;
  }

  // Captured on a stream of its own: the caller's may be one that cannot be captured.
  bool begin_capture() override {
    const DeviceScope scope(*this);
    if (capture_stream_ == nullptr &&
        cudaStreamCreateWithFlags(&capture_stream_, cudaStreamNonBlocking) != cudaSuccess)
      capture_stream_ = nullptr;
    // Thread-local: other threads may allocate meanwhile.
    capturing_ =
        capture_stream_ != nullptr &&
        cudaStreamBeginCapture(capture_stream_, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (!capturing_) cudaGetLastError();
    return capturing_;
  }
  std::unique_ptr<DeviceGraph> end_capture() override {
    const DeviceScope scope(*this);
    capturing_ = false;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    if (has_left_out_) {
      cudaStreamEndCapture(left_out_stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      graph = nullptr;
    }
    leaving_out_ = has_left_out_ = false;
    bool recorded = cudaStreamEndCapture(capture_stream_, &graph) == cudaSuccess;
    recorded = recorded && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    if (!recorded) return nullptr;
    return std::make_unique<CudaGraph>(exec);
  }
  // Recorded on a stream of its own, in a graph that is thrown away: the ops run as always on the
  // host and none of them has to know.
  void leave_out(bool on) override {
    const DeviceScope scope(*this);
    if (on && capturing_ && !has_left_out_) {
      if (left_out_stream_ == nullptr &&
          cudaStreamCreateWithFlags(&left_out_stream_, cudaStreamNonBlocking) != cudaSuccess)
        left_out_stream_ = nullptr;
      has_left_out_ =
          left_out_stream_ != nullptr &&
          cudaStreamBeginCapture(left_out_stream_, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
      cudaGetLastError();
    }
    leaving_out_ = on && has_left_out_;
  }
  Error launch(DeviceGraph& graph) override {
    const DeviceScope scope(*this);
    return check("launching a graph",
                 cudaGraphLaunch(static_cast<CudaGraph&>(graph).exec, stream_));
  }

  void mark(size_t i) override {
    const DeviceScope scope(*this);
    while (marks_.size() <= i) {
      cudaEvent_t event = nullptr;
      if (cudaEventCreate(&event) != cudaSuccess) event = nullptr;
      marks_.push_back(event);
    }
    // External: while capturing it becomes a node of the graph, which sets the event at each launch.
    const unsigned flags = capturing_ ? cudaEventRecordExternal : cudaEventRecordDefault;
    if (marks_[i] == nullptr ||
        cudaEventRecordWithFlags(marks_[i], static_cast<cudaStream_t>(stream()), flags) !=
            cudaSuccess)
      cudaGetLastError();
  }
  double microseconds_between(size_t from, size_t to) override {
    const DeviceScope scope(*this);
    float milliseconds = 0;
    if (std::max(from, to) >= marks_.size() ||
        cudaEventElapsedTime(&milliseconds, marks_[from], marks_[to]) != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    return double(milliseconds) * 1000;
  }
  void push_range(const char* name) override { nvtxRangePushA(name); }
  void pop_range() override { nvtxRangePop(); }

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
    return check(doing,
                 cudaMemcpyAsync(to, from, nbytes, kind, static_cast<cudaStream_t>(stream())));
  }

  int index_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t capture_stream_ = nullptr;
  cudaStream_t left_out_stream_ = nullptr;  // captured for nothing
  bool owns_stream_ = false;
  bool capturing_ = false;
  bool has_left_out_ = false;  // left_out_stream_ is being captured
  bool leaving_out_ = false;
  std::vector<cudaEvent_t> marks_;
  std::unordered_map<void*, size_t> sizes_;  // of what is allocated
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
  const std::string name = "cuda:" + std::to_string(index);
  int major = 0, minor = 0;
  cudaError_t asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (asked == cudaSuccess)
    asked = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  const Error error = cuda_error(name.c_str(), "asking for its compute capability", asked);
  if (error != Error::Ok) return error;
  if (major * 10 + minor < kLeastComputeCapability)
    return fail(Error::NotSupported,
                "device \"%s\": expected compute capability 8.0 or later, it has %d.%d; %s",
                name.c_str(), major, minor, kCure);
  auto device = std::make_unique<CudaDevice>(index);
  const Error failed = device->open(request);
  if (failed != Error::Ok) return failed;
  *out = std::move(device);
  return Error::Ok;
}

}  // namespace cuda_int4
