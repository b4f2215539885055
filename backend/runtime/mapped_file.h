// A file, mapped read-only. Constants stay in it: nothing is copied, and two models of one file share
// the pages.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <string>

namespace cuda_int4 {

class MappedFile {
 public:
  MappedFile() = default;
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  /// @retval AccessFailed no such file, no permission, or not a regular file with bytes in it.
  executorch::runtime::Error open(const char* path);

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace cuda_int4
