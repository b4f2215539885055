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
/// bytes stay where the loader put them (a mapped file: no copy); else they are uploaded.
class Constants final : public executorch::runtime::NamedDataMap {
 public:
  /// `records` and `device` outlive this.
  Constants(const std::vector<ConstantRecord>& records, Device& device);
  ~Constants() override;

  /// Finds, checks and places every constant. `store` may be nullptr if there are no constants.
  /// @retval InvalidExternalData missing, of another size, damaged, or misaligned.
  executorch::runtime::Error place(const executorch::runtime::NamedDataMap* store,
                                   bool verify_checksums);

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
    void* data = nullptr;
    bool uploaded = false;  // data is the device's, to be freed there
  };
  /// The first record of that key; records_.size() where there is none.
  size_t find(std::string_view key) const;
  executorch::runtime::Error place_one(const ConstantRecord& record,
                                       const executorch::runtime::NamedDataMap* store,
                                       bool verify_checksum, Placed* out);

  const std::vector<ConstantRecord>& records_;
  Device& device_;
  std::unordered_map<std::string_view, size_t> by_key_;  // the first record of each key
  std::vector<Placed> placed_;
};

}  // namespace cuda_int4
