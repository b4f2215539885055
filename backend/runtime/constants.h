// Constants -- the constant tensors of one delegate: found in the named data store, checked against
// the blob's records, placed on the device, and handed to the nested Method by key.
#pragma once

#include <executorch/runtime/core/freeable_buffer.h>
#include <executorch/runtime/core/named_data_map.h>

#include <string_view>
#include <unordered_map>
#include <vector>

#include "blob.h"
#include "device.h"

namespace cuda_int4 {

/// The NamedDataMap that the nested program is loaded with. On a device that reads host memory the
/// bytes stay where the loader put them (a mapped file: no copy); else they are uploaded, into one
/// block of memory.
class Constants final : public executorch::runtime::NamedDataMap {
 public:
  /// `records` and `device` outlive this.
  Constants(const std::vector<ConstantRecord>& records, Device& device);
  ~Constants() override;

  /// Finds every constant and checks its size. `store` may be nullptr if there are no constants.
  /// @retval InvalidExternalData missing, of another size, or misaligned.
  executorch::runtime::Error locate(const executorch::runtime::NamedDataMap* store);
  /// The bytes of record `i` where the loader put them: host memory, from locate() to place(), at any
  /// address.
  const void* located(size_t i) const { return placed_[find(records_[i].key)].bytes; }
  /// What place() allocates on the device; after locate().
  uint64_t device_bytes() const { return device_bytes_; }
  /// Verifies their checksums, if asked to, and uploads them to a device that needs it.
  /// @retval InvalidExternalData damaged.
  executorch::runtime::Error place(bool verify_checksums);
  /// Whether `key` is one of them.
  bool has(std::string_view key) const { return by_key_.count(key) > 0; }

  /// What place() uploaded, and how long it took.
  uint64_t uploaded_bytes() const { return uploaded_bytes_; }
  double upload_seconds() const { return upload_seconds_; }

  // NamedDataMap
  executorch::runtime::Result<const executorch::runtime::TensorLayout> get_tensor_layout(
      std::string_view key) const override;
  executorch::runtime::Result<executorch::runtime::FreeableBuffer> get_data(
      std::string_view key) const override;
  executorch::runtime::Error load_data_into(std::string_view key, void* buffer,
                                            size_t size) const override;
  executorch::runtime::Result<uint32_t> get_num_keys() const override;
  executorch::runtime::Result<const char*> get_key(uint32_t index) const override;

 private:
  struct Placed {
    executorch::runtime::FreeableBuffer source;  // keeps borrowed bytes alive
    const void* bytes = nullptr;                 // of source
    void* data = nullptr;                        // on the device; after place()
    uint64_t at = 0;                             // byte of block_
    bool is_first = false;                       // of its key
  };
  /// The first record of that key; records_.size() where there is none.
  size_t find(std::string_view key) const;
  executorch::runtime::Error locate_one(const ConstantRecord& record,
                                        const executorch::runtime::NamedDataMap* store,
                                        Placed* out) const;
  executorch::runtime::Error damaged(const ConstantRecord& record, const void* bytes) const;
  executorch::runtime::Error upload(bool verify_checksums);

  const std::vector<ConstantRecord>& records_;
  Device& device_;
  std::unordered_map<std::string_view, size_t> by_key_;  // the first record of each key
  std::vector<Placed> placed_;
  void* block_ = nullptr;  // of device_: all of them in one
  uint64_t device_bytes_ = 0, uploaded_bytes_ = 0;
  double upload_seconds_ = 0;
};

}  // namespace cuda_int4
