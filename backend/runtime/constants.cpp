#include "constants.h"

#include <executorch/runtime/core/tensor_layout.h>

#include <chrono>
#include <cinttypes>

#include "checksum.h"
#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorLayout;

namespace {

constexpr uint64_t kConstantAlignment = 256;  // of each in device memory, in bytes

}  // namespace

Constants::Constants(const std::vector<ConstantRecord>& records, Device& device)
    : records_(records), device_(device) {
  for (size_t i = 0; i < records_.size(); ++i) by_key_.emplace(records_[i].key, i);
}

Constants::~Constants() { device_.free(block_); }

Error Constants::locate(const NamedDataMap* store) {
  for (const ConstantRecord& record : records_) {
    const ConstantRecord& first = records_[find(record.key)];
    if (record.nbytes != first.nbytes || record.checksum != first.checksum)
      return fail(
          Error::InvalidProgram,
          "constant %s: expected the size and checksum of %s, whose key it has, got others; "
          "the .pte is damaged, export it again",
          record.name.c_str(), first.name.c_str());
  }
  placed_.reserve(records_.size());  // a Placed cannot be moved by assignment
  for (size_t i = 0; i < records_.size(); ++i) {
    placed_.emplace_back();
    Placed& placed = placed_.back();
    placed.is_first = find(records_[i].key) == i;
    if (!placed.is_first) continue;  // two names of one constant, such as tied weights
    const Error error = locate_one(records_[i], store, &placed);
    if (error != Error::Ok) return error;
    if (device_.reads_host_memory()) continue;
    // Sizes are those of bytes that are there: their sum cannot overflow.
    placed.at = (device_bytes_ + kConstantAlignment - 1) / kConstantAlignment * kConstantAlignment;
    device_bytes_ = placed.at + records_[i].nbytes;
  }
  return Error::Ok;
}

Error Constants::locate_one(const ConstantRecord& record, const NamedDataMap* store,
                            Placed* out) const {
  const char* name = record.name.c_str();
  Result<FreeableBuffer> found =
      store == nullptr ? Result<FreeableBuffer>(Error::NotFound) : store->get_data(record.key);
  if (!found.ok())
    return fail(
        Error::InvalidExternalData,
        "constant %s: expected key %s in the .pte or its .ptd, found %s; give the .ptd that "
        "was written together with this .pte, or export both again",
        name, record.key.c_str(),
        found.error() == Error::NotFound ? "no such key"
                                         : executorch::runtime::to_string(found.error()));
  if (found->size() != record.nbytes)
    return fail(Error::InvalidExternalData,
                "constant %s: expected %" PRIu64
                " bytes, found %zu; the file is damaged or the .ptd is of another export, export "
                "it again",
                name, record.nbytes, found->size());
  const Result<const void*> bytes = found->data_safe();
  if (!bytes.ok() || (bytes.get() == nullptr && record.nbytes > 0))
    return fail(Error::InvalidExternalData, "constant %s: its data cannot be read", name);
  out->bytes = bytes.get();
  out->source.~FreeableBuffer();
  new (&out->source) FreeableBuffer(std::move(found.get()));
  return Error::Ok;
}

Error Constants::damaged(const ConstantRecord& record, const void* bytes) const {
  return fail(Error::InvalidExternalData,
              "constant %s: expected checksum %08" PRIx32 ", found %08" PRIx32
              "; the file is damaged, export it again",
              record.name.c_str(), record.checksum, checksum(bytes, record.nbytes));
}

Error Constants::place(bool verify_checksums) {
  if (!device_.reads_host_memory()) {
    const Error error = upload(verify_checksums);
    if (error != Error::Ok) return error;
  }
  for (size_t i = 0; i < records_.size(); ++i) {
    const ConstantRecord& record = records_[i];
    Placed& placed = placed_[i];
    if (!placed.is_first) {
      placed.data = placed_[find(record.key)].data;
      continue;
    }
    if (!device_.reads_host_memory()) {
      placed.data = static_cast<uint8_t*>(block_) + placed.at;
      placed.source.Free();
      continue;
    }
    if (verify_checksums && checksum(placed.bytes, record.nbytes) != record.checksum)
      return damaged(record, placed.bytes);
    if (reinterpret_cast<uintptr_t>(placed.bytes) % record.alignment != 0)
      return fail(Error::InvalidExternalData,
                  "constant %s: expected an address that is a multiple of %" PRIu32
                  ", found one that is not; load the .pte from a file, or from aligned memory",
                  record.name.c_str(), record.alignment);
    placed.data = const_cast<void*>(placed.bytes);
  }
  return Error::Ok;
}

Error Constants::upload(bool verify_checksums) {
  const auto start = std::chrono::steady_clock::now();
  block_ = device_.allocate(device_bytes_);
  if (block_ == nullptr)
    return fail(Error::MemoryAllocationFailed,
                "constants: device %s has no %" PRIu64
                " bytes left in one piece; use a smaller model",
                device_.name(), device_bytes_);
  std::vector<Upload> uploads;
  std::vector<size_t> indices;
  for (size_t i = 0; i < records_.size(); ++i) {
    if (!placed_[i].is_first) continue;
    uploads.push_back({static_cast<uint8_t*>(block_) + placed_[i].at, placed_[i].bytes,
                       records_[i].nbytes, records_[i].checksum});
    indices.push_back(i);
    uploaded_bytes_ += records_[i].nbytes;
  }
  size_t wrong = 0;
  const Error error = device_.upload_all(uploads.data(), uploads.size(), verify_checksums, &wrong);
  if (error != Error::Ok) return error;
  if (wrong < uploads.size()) return damaged(records_[indices[wrong]], uploads[wrong].from);
  upload_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return Error::Ok;
}

size_t Constants::find(std::string_view key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? records_.size() : found->second;
}

Result<const TensorLayout> Constants::get_tensor_layout(std::string_view key) const {
  static const uint8_t kContiguous[kMaxDims] = {0, 1, 2, 3, 4, 5, 6, 7};
  const size_t i = find(key);
  if (i == records_.size()) {
    fail(Error::NotFound,
         "nested program: expected every constant to be listed in the header, found none with key "
         "%.*s; the .pte is damaged, export it again",
         int(key.size()), key.data());
    return Error::NotFound;
  }
  const ConstantRecord& record = records_[i];
  return TensorLayout::create({record.sizes.data(), record.sizes.size()},
                              {kContiguous, record.sizes.size()},
                              static_cast<executorch::aten::ScalarType>(record.dtype));
}

Result<FreeableBuffer> Constants::get_data(std::string_view key) const {
  const size_t i = find(key);
  if (i == records_.size()) return Error::NotFound;
  return FreeableBuffer(placed_[i].data, records_[i].nbytes, /*free_fn=*/nullptr);
}

Error Constants::load_data_into(std::string_view key, void*, size_t) const {
  return fail(Error::InvalidProgram,
              "nested program: expected %.*s to be a constant, it is memory that the program "
              "writes; the .pte is damaged, export it again",
              int(key.size()), key.data());
}

Result<uint32_t> Constants::get_num_keys() const { return uint32_t(records_.size()); }

Result<const char*> Constants::get_key(uint32_t index) const {
  if (index >= records_.size()) return Error::InvalidArgument;
  return records_[index].key.c_str();
}

}  // namespace cuda_int4
