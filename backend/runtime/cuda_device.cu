// A GPU as a Device: device memory, pinned host memory, one stream.
//
// The device is made current for each call and the one before is restored, so that neither the
// caller's current device nor another method's matters. No state outside of the object.
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>

#include "checksum.h"
#include "device.h"
#include "errors.h"
#include "op_table.h"
#include "parallel.h"

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

// ---- upload of constants ----
//
// Lanes on the thread pool take pieces of 4 MiB. A lane hashes a part of its piece, copies it (now in
// this core's cache) to one of two page-locked buffers and queues the transfer; meanwhile it fills
// the other. Page-locking costs 0.4 s/GB: buffers are as small as keeps the bus busy.
class Uploader {
 public:
  Uploader(const char* device, int index, cudaStream_t stream, const Upload* uploads, size_t n,
           bool verify)
      : device_(device), index_(index), stream_(stream), uploads_(uploads), verify_(verify) {
    for (size_t i = 0; i < n; ++i)
      for (uint64_t at = 0; at < uploads[i].nbytes; at += kChecksumPieceBytes)
        pieces_.push_back({i, at, std::min(kChecksumPieceBytes, uploads[i].nbytes - at), 0});
  }
  ~Uploader() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
    cudaFreeHost(buffers_);
    cudaGetLastError();
  }

  Error run() {
    n_lanes_ = std::min(kMaxLanes, pieces_.size());
    if (n_lanes_ == 0) return Error::Ok;
    note(cudaHostAlloc(&buffers_, n_lanes_ * 2 * kBufferBytes, cudaHostAllocDefault));
    for (size_t i = 0; i < 2 * n_lanes_ && !failed(); ++i) {
      events_.emplace_back();
      note(cudaEventCreateWithFlags(&events_.back(), cudaEventDisableTiming));
    }
    if (!failed())
      parallel_for(
          int64_t(n_lanes_), 1,
          [](void* self, int64_t begin, int64_t end) {
            for (int64_t lane = begin; lane < end; ++lane)
              static_cast<Uploader*>(self)->run_lane(size_t(lane));
          },
          this);
    note(cudaStreamSynchronize(stream_));  // the buffers go away
    return cuda_error(device_, "uploading constants", static_cast<cudaError_t>(error_.load()));
  }

  /// The first upload of another checksum; n where there is none.
  size_t first_damaged(size_t n) const {
    std::vector<uint32_t> crcs;
    for (size_t i = 0, piece = 0; verify_ && i < n; ++i) {
      crcs.clear();
      for (; piece < pieces_.size() && pieces_[piece].upload == i; ++piece)
        crcs.push_back(pieces_[piece].crc);
      if (checksum_of_pieces(crcs.data(), crcs.size()) != uploads_[i].checksum) return i;
    }
    return n;
  }

 private:
  static constexpr size_t kMaxLanes = 16;
  static constexpr uint64_t kBufferBytes = uint64_t(1) << 19;
  static constexpr uint64_t kStepBytes = uint64_t(1) << 18;  // stays in a core's cache

  struct Piece {
    size_t upload;
    uint64_t at, nbytes;
    uint32_t crc;
  };

  bool failed() const { return error_.load(std::memory_order_relaxed) != cudaSuccess; }
  void note(cudaError_t code) {
    int expected = cudaSuccess;
    if (code != cudaSuccess) error_.compare_exchange_strong(expected, code);
  }

  /// A mapped file's pages, in one call and not in one fault each. Only a matter of speed.
  static void map_pages(const uint8_t* from, uint64_t nbytes) {
#if defined(MADV_POPULATE_READ)
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from) / page * page;
    madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(from) + nbytes - begin,
            MADV_POPULATE_READ);
#else
    (void)from;
    (void)nbytes;
#endif
  }

  void run_lane(size_t lane) {
    int before = -1;
    cudaGetDevice(&before);  // this thread is the pool's
    note(cudaSetDevice(index_));
    bool in_use[2] = {false, false};
    for (int turn = 0; !failed();) {
      const size_t i = next_.fetch_add(1);
      if (i >= pieces_.size()) break;
      Piece& piece = pieces_[i];
      const auto* from = static_cast<const uint8_t*>(uploads_[piece.upload].from) + piece.at;
      auto* to = static_cast<uint8_t*>(uploads_[piece.upload].to) + piece.at;
      map_pages(from, piece.nbytes);
      for (uint64_t at = 0; at < piece.nbytes && !failed(); at += kBufferBytes, turn ^= 1) {
        const size_t slot = 2 * lane + size_t(turn);
        if (in_use[turn]) note(cudaEventSynchronize(events_[slot]));
        auto* buffer = static_cast<uint8_t*>(buffers_) + slot * kBufferBytes;
        const uint64_t n = std::min(kBufferBytes, piece.nbytes - at);
        for (uint64_t step = 0; step < n; step += kStepBytes) {
          const uint64_t m = std::min(kStepBytes, n - step);
          if (verify_) piece.crc = crc32c(from + at + step, m, piece.crc);
          std::memcpy(buffer + step, from + at + step, m);
        }
        note(cudaMemcpyAsync(to + at, buffer, n, cudaMemcpyHostToDevice, stream_));
        note(cudaEventRecord(events_[slot], stream_));
        in_use[turn] = true;
      }
    }
    if (before >= 0) cudaSetDevice(before);
  }

  const char* device_;
  const int index_;
  const cudaStream_t stream_;
  const Upload* const uploads_;
  const bool verify_;
  std::vector<Piece> pieces_;
  size_t n_lanes_ = 0;
  void* buffers_ = nullptr;
  std::vector<cudaEvent_t> events_;  // two to a lane
  std::atomic<size_t> next_{0};
  std::atomic<int> error_{cudaSuccess};
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_("cuda:" + std::to_string(index)) {}
  ~CudaDevice() override {
    const DeviceScope scope(*this);
    if (owns_stream_) cudaStreamDestroy(stream_);
    if (capture_stream_ != nullptr) cudaStreamDestroy(capture_stream_);
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
    Uploader uploader(name(), index_, stream_, uploads, n, verify);
    const Error error = uploader.run();
    *damaged = error == Error::Ok ? uploader.first_damaged(n) : n;
    return error;
  }
  Error synchronize() override {
    const DeviceScope scope(*this);
    const Error error = check("the work queued on it", cudaStreamSynchronize(stream_));
    return error == Error::Ok ? check("the work queued on it", cudaGetLastError()) : error;
  }

  bool reads_host_memory() const override { return false; }
  void* stream() const override { return capturing_ ? capture_stream_ : stream_; }

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
    bool recorded = cudaStreamEndCapture(capture_stream_, &graph) == cudaSuccess;
    recorded = recorded && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    if (!recorded) return nullptr;
    return std::make_unique<CudaGraph>(exec);
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
  bool owns_stream_ = false;
  bool capturing_ = false;
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
