// The CPU as a Device: host memory, kernels of op_table.h, no stream.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "device.h"
#include "op_table.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::OpFunction;

namespace {

class CpuDevice final : public Device {
 public:
  const char* name() const override { return "cpu"; }
  DeviceKind kind() const override { return DeviceKind::kCpu; }

  void* allocate(size_t nbytes) override {
    if (nbytes > SIZE_MAX - kDeviceAlignment) return nullptr;
    const size_t rounded = (nbytes + kDeviceAlignment) / kDeviceAlignment * kDeviceAlignment;
    return std::aligned_alloc(kDeviceAlignment, rounded);
  }
  void free(void* pointer) override { std::free(pointer); }
  /// All of the machine's: what a sound file may ask for. A forged one of more would be given it page
  /// by page, until the system has none left.
  uint64_t free_bytes() const override {
    const long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && page_bytes > 0 ? uint64_t(pages) * uint64_t(page_bytes) : UINT64_MAX;
  }
  void* allocate_host(size_t nbytes) override { return allocate(nbytes); }
  void free_host(void* pointer) override { free(pointer); }

  Error upload(void* to, const void* host, size_t nbytes) override {
    return copy(to, host, nbytes);
  }
  Error download(void* host, const void* from, size_t nbytes) override {
    return copy(host, from, nbytes);
  }
  Error copy(void* to, const void* from, size_t nbytes) override {
    if (nbytes > 0) std::memmove(to, from, nbytes);  // an output may be a view of an input
    return Error::Ok;
  }
  Error zero(void* to, size_t nbytes) override {
    if (nbytes > 0) std::memset(to, 0, nbytes);
    return Error::Ok;
  }

  void mark(size_t i) override {
    if (marks_.size() <= i) marks_.resize(i + 1);
    marks_[i] = std::chrono::steady_clock::now();
  }
  double microseconds_between(size_t from, size_t to) override {
    if (std::max(from, to) >= marks_.size()) return -1;
    return std::chrono::duration<double, std::micro>(marks_[to] - marks_[from]).count();
  }

  bool reads_host_memory() const override { return true; }
  void* stream() const override { return nullptr; }
  OpFunction find_kernel(std::string_view op) const override { return find_cpu_kernel(op); }

 private:
  std::vector<std::chrono::steady_clock::time_point> marks_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace cuda_int4
