// Tests of the runtime's inner parts, each on its own.
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/checks.h"
#include "kernels/ops.h"
#include "runtime/blob.h"
#include "runtime/checksum.h"
#include "runtime/device.h"
#include "runtime/errors.h"
#include "runtime/op_table.h"
#include "runtime/parallel.h"
#include "runtime/seal.h"
#include "runtime/settled_shapes.h"
#include "runtime/shared_activation.h"
#include "runtime/temp_arena.h"
#include "runtime/tensor_bridge.h"
#include "runtime/upload_ring.h"
#include "unit_cuda_ops.h"

using namespace cuda_int4;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;

// own_ops.cpp calls the kernels; no test here gets that far.
namespace cuda_int4 {
Status validate_linear(const LinearArgs&) { return {}; }
uint64_t linear_scratch_bytes(const LinearArgs&, DeviceKind) { return 0; }
Status linear(const LinearArgs&, const ExecutionContext&) { return {}; }
Status validate_attention(const AttentionArgs&) { return {}; }
uint64_t attention_scratch_bytes(const AttentionArgs&, DeviceKind) { return 0; }
Status attention(const AttentionArgs&, const ExecutionContext&) { return {}; }
Status validate_rms_norm(const RmsNormArgs&) { return {}; }
Status rms_norm(const RmsNormArgs&, const ExecutionContext&) { return {}; }
Status validate_silu(const SiluArgs&) { return {}; }
Status silu(const SiluArgs&, const ExecutionContext&) { return {}; }
Status validate_add_rms_norm(const AddRmsNormArgs&) { return {}; }
Status add_rms_norm(const AddRmsNormArgs&, const ExecutionContext&) { return {}; }
Status validate_gate_mul(const GateMulArgs&) { return {}; }
Status gate_mul(const GateMulArgs&, const ExecutionContext&) { return {}; }
Status validate_rope_append(const RopeAppendArgs&) { return {}; }
Status rope_append(const RopeAppendArgs&, const ExecutionContext&) { return {}; }
int quantized = 0;  // calls of quantize_activation
uint64_t quantized_activation_bytes(int64_t M, int64_t K) { return uint64_t(M * K); }
Status quantize_activation(const TensorView&, void*, const ExecutionContext&) {
  ++quantized;
  return {};
}
}  // namespace cuda_int4

namespace {

std::mt19937_64 random_bits(20);

std::vector<uint8_t> random_bytes(size_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& byte : bytes) byte = uint8_t(random_bits());
  return bytes;
}

void test_checksum() {
  CHECK(crc32c("123456789", 9) == 0xe3069283);
  CHECK(crc32c_portable("123456789", 9) == 0xe3069283);
  CHECK(checksum(nullptr, 0) == 0 && checksum_of_pieces(nullptr, 0) == 0);
  for (size_t n : {1, 7, 8, 100, 16383, 16384, 16385, 16391, 70001, 4194304}) {
    const std::vector<uint8_t> bytes = random_bytes(n + 8);
    for (size_t at = 0; at < 8; ++at)
      CHECK(crc32c(bytes.data() + at, n) == crc32c_portable(bytes.data() + at, n));
  }
}

void test_parallel_for_covers_the_range_once() {
  for (int64_t n : {0, 1, 5, 1000, 100000})
    for (int64_t grain : {0, 1, 7, 1000000}) {
      std::vector<uint8_t> seen(size_t(n), 0);
      parallel_for(
          n, grain,
          [](void* context, int64_t begin, int64_t end) {
            auto& s = *static_cast<std::vector<uint8_t>*>(context);
            for (int64_t i = begin; i < end; ++i) ++s[size_t(i)];
          },
          &seen);
      bool once = true;
      for (uint8_t count : seen) once = once && count == 1;
      CHECK(once);
    }
}

void test_reasons() {
  clear_last_error();
  CHECK(std::string(last_error()).empty());
  CHECK(fail_unless_explained(Error::Internal, "outer") == Error::Internal);
  CHECK(std::string(last_error()) == "outer");
  clear_last_error();
  CHECK(fail(Error::NotFound, "inner %d", 7) == Error::NotFound);
  fail_unless_explained(Error::NotFound, "outer");
  CHECK(std::string(last_error()) == "inner 7");
  fail(Error::NotFound, "%s", std::string(100000, 'x').c_str());  // cut off, not overrun
  CHECK(std::strlen(last_error()) < 3000);
  fail(Error::NotFound, "\xff\xc3\xa9 \n \xc3");  // names come out of damaged files
  CHECK(std::string(last_error()) == "?\xc3\xa9 ? ?");
  // Overlong, a surrogate, above U+10FFFF: Python takes none of them for UTF-8.
  fail(Error::NotFound, "\xe0\x80\x80 \xed\xa0\x80 \xf5\x80\x80\x80 \xf0\x9f\x99\x82");
  CHECK(std::string(last_error()) == "??? ??? ???? \xf0\x9f\x99\x82");
}

// ---- blobs ----

template <typename T>
void put(std::vector<uint8_t>* to, T value) {
  const auto* p = reinterpret_cast<const uint8_t*>(&value);
  to->insert(to->end(), p, p + sizeof(T));
}
void put(std::vector<uint8_t>* to, const std::string& text) {
  put(to, uint32_t(text.size()));
  to->insert(to->end(), text.begin(), text.end());
}

/// A blob of one constant, one linear and one op, as backend/blob.py writes it.
std::vector<uint8_t> make_blob() {
  std::vector<uint8_t> records;
  put(&records, std::string("w.qdata"));
  put(&records, std::string("cuda_int4/coalesced.v1/qdata/00"));
  put(&records, uint32_t(0));
  put(&records, uint32_t(2));
  put(&records, uint64_t(4));
  put(&records, uint64_t(16));
  put(&records, uint64_t(64));
  put(&records, uint32_t(16));
  put(&records, uint32_t(0x1234));
  put(&records, std::string("w"));
  put(&records, std::string("coalesced.v1"));
  put(&records, std::string("none"));
  for (uint64_t v : {4, 32, 32}) put(&records, v);
  for (int32_t v : {0, 0, -1, -1, -1}) put(&records, v);
  put(&records, std::string("cuda_int4::linear.out"));
  const uint64_t program_offset = (56 + records.size() + 15) / 16 * 16;
  std::vector<uint8_t> blob;
  for (char c : std::string("CUDAINT4")) blob.push_back(uint8_t(c));
  put(&blob, uint32_t(1));
  put(&blob, uint32_t(0));
  put(&blob, program_offset + 32);
  put(&blob, program_offset);
  put(&blob, uint64_t(32));
  for (uint32_t v : {1, 1, 1, 0}) put(&blob, v);
  blob.insert(blob.end(), records.begin(), records.end());
  blob.resize(program_offset + 32);
  return blob;
}

void set_checksum(std::vector<uint8_t>* blob) {
  const uint32_t sum = checksum(blob->data() + 16, blob->size() - 16);
  std::memcpy(blob->data() + 12, &sum, 4);
}

/// The bytes at the end of an allocation of exactly their size: a sanitizer sees a read beyond.
Error read_copy(const uint8_t* bytes, size_t n, Blob* out) {
  std::unique_ptr<uint8_t[]> copy(new uint8_t[n]);
  if (n > 0) std::memcpy(copy.get(), bytes, n);
  return read_blob(copy.get(), n, out);
}

void test_blob_is_read_back() {
  std::vector<uint8_t> bytes = make_blob();
  set_checksum(&bytes);
  Blob blob;
  CHECK(read_blob(bytes.data(), bytes.size(), &blob) == Error::Ok);
  CHECK(blob.constants.size() == 1 && blob.constants[0].name == "w.qdata");
  CHECK(blob.constants[0].sizes == std::vector<int32_t>({4, 16}));
  CHECK(blob.constants[0].checksum == 0x1234 && blob.constants[0].alignment == 16);
  CHECK(blob.linears.size() == 1 && blob.linears[0].layout_tag == "coalesced.v1");
  CHECK(blob.linears[0].N == 4 && blob.linears[0].zero_point == -1);
  CHECK(blob.ops == std::vector<std::string>({"cuda_int4::linear.out"}));
  CHECK(blob.program == bytes.data() + bytes.size() - 32 && blob.program_nbytes == 32);
}

void test_every_truncated_blob_is_refused() {
  std::vector<uint8_t> bytes = make_blob();
  set_checksum(&bytes);
  Blob blob;
  for (size_t n = 0; n < bytes.size(); ++n) {
    CHECK(read_copy(bytes.data(), n, &blob) != Error::Ok);
    std::vector<uint8_t> shorter(bytes.begin(), bytes.begin() + std::ptrdiff_t(n));
    if (n >= 56) {  // and one whose header agrees with its end
      const uint64_t nbytes = n;
      std::memcpy(shorter.data() + 16, &nbytes, 8);
      set_checksum(&shorter);
      CHECK(read_copy(shorter.data(), n, &blob) != Error::Ok);
    }
  }
}

void test_damaged_blobs_with_a_right_checksum_stay_in_bounds() {
  const std::vector<uint8_t> good = make_blob();
  for (int round = 0; round < 20000; ++round) {
    std::vector<uint8_t> bytes = good;
    for (uint64_t n = 1 + random_bits() % 4; n > 0; --n) {
      const size_t at = random_bits() % bytes.size();
      bytes[at] = random_bits() % 3 ? uint8_t(random_bits()) : random_bits() % 2 ? 0xff : 0;
    }
    set_checksum(&bytes);
    Blob blob;
    if (read_copy(bytes.data(), bytes.size(), &blob) == Error::Ok) {
      CHECK(blob.program_nbytes <= bytes.size());
    }
  }
}

// ---- tensors without elements, whose strides would not fit ----

void test_an_empty_tensor_of_any_sizes() {
  TensorView view{};
  view.dtype = DType::kFloat32;
  view.ndim = 4;
  for (int d = 1; d < 4; ++d) view.sizes[d] = INT32_MAX;
  make_contiguous(&view);
  CHECK(view.nbytes == 0);
  int64_t numel = 1;
  CHECK(check_contiguous({"op", "x", "fix it"}, view, &numel).ok() && numel == 0);
}

// ---- seals ----

Error check_bytes(const std::vector<uint8_t>& bytes, bool verify, FileBody* body) {
  char path[] = "/tmp/cuda_int4_unit_XXXXXX";
  const int fd = mkstemp(path);
  CHECK(fd >= 0);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  MappedFile file;
  Error error = file.open(path);
  if (error == Error::Ok) error = check_file(file, FileKind::kPte, verify, body);
  std::remove(path);
  return error;
}

void test_seal() {
  std::vector<uint8_t> body = random_bytes(1000);
  const uint64_t header[] = {1000, 0, 0};  // program_nbytes, segment base, segment bytes
  std::memcpy(body.data() + 4, "ET12eh00", 8);
  const uint32_t header_bytes = 32;
  std::memcpy(body.data() + 12, &header_bytes, 4);
  std::memcpy(body.data() + 16, header, sizeof(header));
  FileBody found;
  CHECK(check_bytes(body, true, &found) == Error::Ok && !found.verified && found.nbytes == 1000);
  std::vector<uint8_t> sealed = body;
  const auto append = [&](const char* text) {
    sealed.insert(sealed.end(), text, text + std::strlen(text));
  };
  append("CI4SEAL1");
  put(&sealed, uint64_t(1000));
  put(&sealed, checksum(body.data(), body.size()));
  put(&sealed, uint32_t(0));
  append("1LAES4IC");
  CHECK(check_bytes(sealed, true, &found) == Error::Ok && found.verified && found.nbytes == 1000);
  CHECK(check_bytes(sealed, false, &found) == Error::Ok && !found.verified);
  for (size_t at = 0; at < sealed.size(); ++at) {
    std::vector<uint8_t> flipped = sealed;
    flipped[at] ^= uint8_t(1 << (at % 8));
    CHECK(check_bytes(flipped, true, &found) != Error::Ok);
    std::vector<uint8_t> shorter(sealed.begin(), sealed.begin() + std::ptrdiff_t(at));
    if (at != 1000) CHECK(check_bytes(shorter, true, &found) != Error::Ok);
  }
}

// ---- temporary memory ----

struct Counting final : Device {
  int allocations = 0;
  bool full = false;
  std::unique_ptr<Device> cpu = make_cpu_device();
  const char* name() const override { return "counting"; }
  DeviceKind kind() const override { return DeviceKind::kCpu; }
  void* allocate(size_t n) override { return full ? nullptr : (++allocations, cpu->allocate(n)); }
  void free(void* p) override { cpu->free(p); }
  void* allocate_host(size_t n) override { return cpu->allocate_host(n); }
  void free_host(void* p) override { cpu->free_host(p); }
  Error upload(void* to, const void* from, size_t n) override { return cpu->copy(to, from, n); }
  Error download(void* to, const void* from, size_t n) override { return cpu->copy(to, from, n); }
  Error copy(void* to, const void* from, size_t n) override { return cpu->copy(to, from, n); }
  Error zero(void* to, size_t n) override { return cpu->zero(to, n); }
  void mark(size_t) override {}
  double microseconds_between(size_t, size_t) override { return -1; }
  bool reads_host_memory() const override { return true; }
  void* stream() const override { return nullptr; }
  executorch::runtime::OpFunction find_kernel(std::string_view) const override { return nullptr; }
};

void test_temp_arena_settles() {
  Counting device;
  TempArena arena(device);
  int settled = 0;
  for (int round = 0; round < 10; ++round) {
    for (size_t n : {1000, 3, 70000}) {
      auto* p = static_cast<uint8_t*>(arena.allocate(n, 64));
      CHECK(p != nullptr && reinterpret_cast<uintptr_t>(p) % 64 == 0);
      std::memset(p, round, n);
    }
    arena.reset();
    if (round == 1) settled = device.allocations;
  }
  CHECK(device.allocations == settled);
  const size_t generation = arena.generation();
  CHECK(generation > 0 && arena.allocate(100000, 64) != nullptr);
  CHECK(arena.generation() == generation);  // nothing has moved yet
  int resets = 0;
  arena.set_on_reset([&] { ++resets; });
  arena.reset();
  CHECK(arena.generation() == generation + 1 && resets == 1);
  CHECK(arena.allocate(SIZE_MAX, 16) == nullptr);
  CHECK(arena.allocate(8, 3) == nullptr);
}

// ---- upload ----

void test_checksums_join() {
  std::vector<uint8_t> bytes(kChecksumPieceBytes + 100003);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t((i * 2654435761u) >> 13);
  std::vector<uint32_t> crcs;
  for (size_t at = 0; at < bytes.size(); at += kChecksumPieceBytes) {
    const size_t n = std::min<size_t>(kChecksumPieceBytes, bytes.size() - at);
    crcs.push_back(crc32c(bytes.data() + at, n));
    for (size_t first : {size_t(0), size_t(1), n / 3, n})
      CHECK(crc32c_join(crc32c(bytes.data() + at, first),
                        crc32c(bytes.data() + at + first, n - first), n - first) == crcs.back());
  }
  CHECK(checksum_of_pieces(crcs.data(), crcs.size()) == checksum(bytes.data(), bytes.size()));
}

/// Sends by copying late, as a bus would: a buffer filled again too early is noticed.
struct LateTransport final : UploadTransport {
  struct Pending {
    void* to = nullptr;
    const void* buffer;
    uint64_t nbytes;
  } pending[UploadRing::kSlots];
  std::atomic<int> n_sent{0};
  int fail_at = -1;
  bool enter_thread() override { return true; }
  void leave_thread() override {}
  void arrive(size_t slot) {
    Pending& one = pending[slot];
    if (one.to != nullptr) std::memcpy(one.to, one.buffer, one.nbytes);
    one.to = nullptr;
  }
  bool send(size_t slot, void* to, const void* buffer, uint64_t nbytes) override {
    pending[slot] = {to, buffer, nbytes};
    return n_sent++ != fail_at;
  }
  bool wait(size_t slot) override { return arrive(slot), true; }
};

void test_upload_ring() {
  // Sizes around the borders of units, chunks and pieces, with gaps between, more than the ring holds.
  std::vector<uint64_t> sizes = {1,
                                 256,
                                 0,
                                 UploadRing::kUnitBytes,
                                 UploadRing::kUnitBytes - 1,
                                 UploadRing::kChunkBytes + 1,
                                 77,
                                 kChecksumPieceBytes * 2,
                                 kChecksumPieceBytes * 9 + 12345,
                                 3};
  for (int i = 0; i < 300; ++i) sizes.push_back(uint64_t(i) * 997 % 50000);
  std::vector<std::vector<uint8_t>> sources;
  std::vector<Upload> uploads;
  uint64_t total = 0;
  for (uint64_t n : sizes) {
    sources.emplace_back(n);
    for (size_t i = 0; i < n; ++i) sources.back()[i] = uint8_t(((i + total) * 2654435761u) >> 11);
    total += (n + 255) / 256 * 256 + 256;
  }
  std::vector<uint8_t> to(total);
  uint64_t at = 0;
  for (const auto& source : sources) {
    uploads.push_back(
        {to.data() + at, source.data(), source.size(), checksum(source.data(), source.size())});
    at += (source.size() + 255) / 256 * 256 + 256;
  }
  for (size_t damaged : {uploads.size(), size_t(8), size_t(0), uploads.size() - 1}) {
    const bool is_sound = damaged == uploads.size();
    if (!is_sound) uploads[damaged].checksum ^= 1;
    std::fill(to.begin(), to.end(), uint8_t(0));
    UploadRing ring(uploads.data(), uploads.size(), true);
    CHECK(ring.buffer_bytes() == UploadRing::kSlots * UploadRing::kChunkBytes);
    std::vector<uint8_t> buffers(ring.buffer_bytes());
    LateTransport transport;
    CHECK(ring.run(buffers.data(), transport));
    for (size_t slot = 0; slot < UploadRing::kSlots; ++slot) transport.arrive(slot);
    CHECK(ring.first_damaged() == damaged);
    for (size_t i = 0; i < uploads.size(); ++i)
      CHECK(sizes[i] == 0 || std::memcmp(uploads[i].to, uploads[i].from, sizes[i]) == 0);
    if (!is_sound) uploads[damaged].checksum ^= 1;
  }
  for (int fail_at : {0, 3, 9}) {
    UploadRing ring(uploads.data(), uploads.size(), false);
    std::vector<uint8_t> buffers(ring.buffer_bytes());
    LateTransport transport;
    transport.fail_at = fail_at;
    CHECK(!ring.run(buffers.data(), transport));
  }
  LateTransport transport;
  UploadRing nothing(nullptr, 0, true);
  CHECK(nothing.buffer_bytes() == 0 && nothing.run(nullptr, transport));
  CHECK(nothing.first_damaged() == 0 && transport.n_sent == 0);
}

// ---- what a method remembers ----

void test_settled_shapes_drop_the_oldest() {
  SettledShapes shapes;
  const auto key = [](int64_t i) { return std::vector<int64_t>{1, i}; };
  const auto n = int64_t(SettledShapes::kMaxShapes);
  for (int64_t i = 0; i < n; ++i) shapes.add(key(i)).call.generation = size_t(i);
  CHECK(shapes.find(key(0)) != nullptr);  // used again: 1 is the oldest now
  CHECK(shapes.find({1}) == nullptr && shapes.find({1, 0, 0}) == nullptr);
  shapes.add(key(n));
  CHECK(shapes.find(key(1)) == nullptr);
  for (int64_t i = 2; i < n; ++i) CHECK(shapes.find(key(i))->call.generation == size_t(i));
  CHECK(shapes.find(key(0)) != nullptr && shapes.find(key(n)) != nullptr);
}

void test_shared_activation_is_made_once() {
  Counting device;
  SharedActivation shared(device);
  const EValue x, other;
  float memory[64];
  LinearArgs args{};
  args.x.data = memory;
  args.x.ndim = 2;
  args.x.sizes[0] = 2;
  args.x.sizes[1] = 32;
  args.x.nbytes = sizeof(memory);
  const auto give = [&](const EValue* value) {
    ExecutionContext execution{};
    CHECK(shared.give(value, args, &execution) == Error::Ok);
    return execution.quantized_x;
  };
  quantized = 0;
  const void* first = give(&x);
  CHECK(first != nullptr && give(&x) == first && quantized == 1);
  shared.forget();
  CHECK(give(&x) == first && quantized == 2);
  CHECK(give(&other) == first && quantized == 3 && give(&x) == first && quantized == 4);
  CHECK(shared.generation() == 1 && device.allocations == 1);
  args.x.sizes[0] = 1;
  args.x.nbytes /= 2;
  CHECK(give(&x) == first && quantized == 5);  // the same value, resized
  args.x.sizes[0] = 4;
  args.x.nbytes *= 4;
  device.full = true;  // as while a graph is captured
  ExecutionContext execution{};
  CHECK(shared.give(&x, args, &execution) == Error::MemoryAllocationFailed);
  CHECK(execution.quantized_x == nullptr && shared.generation() == 1);
  device.full = false;
  CHECK(give(&x) != nullptr && shared.generation() == 2);
}

void test_shared_activation_is_made_ahead() {
  Counting device;
  SharedActivation shared(device);
  const EValue x, other;
  float memory[64];
  LinearArgs args{};
  args.x.data = memory;
  args.x.ndim = 2;
  args.x.sizes[0] = 2;
  args.x.sizes[1] = 32;
  args.x.nbytes = sizeof(memory);
  const auto take = [&](const EValue* value) {
    ExecutionContext execution{};
    CHECK(shared.take(value, args.x, &execution) == Error::Ok);
    return static_cast<const void*>(execution.quantized_y);
  };
  const auto give = [&](const EValue* value) {
    ExecutionContext execution{};
    CHECK(shared.give(value, args, &execution) == Error::Ok);
    return execution.quantized_x;
  };
  quantized = 0;
  CHECK(take(&x) == nullptr && device.allocations == 0);  // no linear has asked for it
  const void* first = give(&x);
  CHECK(quantized == 1);
  shared.forget();  // the next run
  CHECK(take(&x) == first && give(&x) == first && quantized == 1);
  CHECK(take(&other) == nullptr && give(&x) == first && quantized == 1);
  CHECK(give(&other) == first && quantized == 2);
  CHECK(take(&x) == first && give(&other) == first && quantized == 3);  // it was x's in between
  CHECK(give(&x) == first && quantized == 4);
  args.x.nbytes = 0;
  CHECK(take(&x) == nullptr);
  args.x.nbytes = 2 * sizeof(memory);
  args.x.sizes[0] = 4;
  device.full = true;
  ExecutionContext execution{};
  CHECK(shared.take(&x, args.x, &execution) == Error::MemoryAllocationFailed);
  CHECK(execution.quantized_y == nullptr && shared.generation() == 1);
  device.full = false;
  CHECK(take(&x) != nullptr && shared.generation() == 2);
}

void test_devices() {
  std::unique_ptr<Device> device;
  for (const char* name : {"tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0x", "cuda0", "CPU", "cpu:0"})
    CHECK(make_device({name}, &device) == Error::InvalidArgument);
  CHECK(make_device({"cuda:1000000"}, &device) == Error::NotSupported);
  if (!cuda_gpu_answers()) CHECK(make_device({"cuda"}, &device) == Error::NotSupported);
  CHECK(make_device({"cpu"}, &device) == Error::Ok && device->kind() == DeviceKind::kCpu);
  CHECK(device->find_kernel("cuda_int4::mul.out") != nullptr);
  CHECK(device->find_kernel("cuda_int4::linear.out") != nullptr);
  CHECK(device->find_kernel("aten::sym_size.int") != nullptr);
  CHECK(device->find_kernel("aten::mul.out") == nullptr);  // not renamed: a foreign program
  CHECK(device->find_kernel("cuda_int4::nonzero.out") == nullptr);
  CHECK(device->allocate(SIZE_MAX) == nullptr);
}

// ---- own ops on arguments that no good file has ----

void test_own_ops_refuse_any_arguments() {
  for (const char* name :
       {"linear", "attention", "rms_norm", "silu", "add_rms_norm", "gate_mul", "rope_append"}) {
    const auto kernel = find_cpu_kernel("cuda_int4::" + std::string(name) + ".out");
    CHECK(kernel != nullptr);
    EValue none, integer(int64_t(7)), number(0.5), truth(true);
    EValue* const kinds[] = {&none, &integer, &number, &truth};
    for (size_t n = 0; n < 13; ++n)
      for (int round = 0; round < 20; ++round) {
        std::vector<EValue*> stack;
        for (size_t i = 0; i < n; ++i) stack.push_back(kinds[random_bits() % 4]);
        KernelRuntimeContext context;
        kernel(context, {stack.data(), stack.size()});
        CHECK(context.failure_state() == Error::InvalidProgram);
      }
  }
}

}  // namespace

int main() {
  test_checksum();
  test_parallel_for_covers_the_range_once();
  test_reasons();
  test_blob_is_read_back();
  test_every_truncated_blob_is_refused();
  test_damaged_blobs_with_a_right_checksum_stay_in_bounds();
  test_an_empty_tensor_of_any_sizes();
  test_seal();
  test_temp_arena_settles();
  test_checksums_join();
  test_upload_ring();
  test_settled_shapes_drop_the_oldest();
  test_shared_activation_is_made_once();
  test_shared_activation_is_made_ahead();
  test_devices();
  test_own_ops_refuse_any_arguments();
  test_cuda_ops();
  return failures() > 0;
}
