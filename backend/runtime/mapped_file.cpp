#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

Error MappedFile::open(const char* path) {
  path_ = path;
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return fail(Error::AccessFailed, "%s: expected a file to read, got: %s", path,
                std::strerror(errno));
  struct stat info{};
  void* mapped = MAP_FAILED;
  const char* problem = nullptr;
  if (fstat(fd, &info) != 0) {
    problem = std::strerror(errno);
  } else if (!S_ISREG(info.st_mode)) {
    problem = "not a regular file";
  } else if (info.st_size == 0) {
    problem = "an empty file";
  } else {
    mapped = mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapped == MAP_FAILED) problem = std::strerror(errno);
  }
  close(fd);
  if (problem != nullptr)
    return fail(Error::AccessFailed, "%s: expected a file to read, got: %s", path, problem);
  data_ = static_cast<const uint8_t*>(mapped);
  size_ = uint64_t(info.st_size);
  return Error::Ok;
}

}  // namespace cuda_int4
