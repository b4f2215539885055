// Just enough flatbuffers to read tables, vectors and strings out of a buffer that has been verified
// (https://flatbuffers.dev/internals). Nothing here checks bounds.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

namespace cuda_int4 {
namespace flatbuffer {

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

inline const uint8_t* follow(const uint8_t* p) { return p + load<uint32_t>(p); }

/// A vector of scalars, or of offsets (then items are read through Tables or strings).
class Vector {
 public:
  explicit Vector(const uint8_t* p = nullptr) : p_(p) {}
  bool present() const { return p_ != nullptr; }
  uint32_t size() const { return p_ == nullptr ? 0 : load<uint32_t>(p_); }
  template <typename T>
  T scalar(uint32_t i) const {
    return load<T>(p_ + 4 + uint64_t(i) * sizeof(T));
  }
  const uint8_t* offset(uint32_t i) const { return follow(p_ + 4 + uint64_t(i) * 4); }

 private:
  const uint8_t* p_;
};

class Table {
 public:
  explicit Table(const uint8_t* p = nullptr) : p_(p) {}
  bool present() const { return p_ != nullptr; }

  template <typename T>
  T scalar(int slot, T fallback) const {
    const uint8_t* p = field(slot);
    return p == nullptr ? fallback : load<T>(p);
  }
  Table table(int slot) const {
    const uint8_t* p = field(slot);
    return Table(p == nullptr ? nullptr : follow(p));
  }
  Vector vector(int slot) const {
    const uint8_t* p = field(slot);
    return Vector(p == nullptr ? nullptr : follow(p));
  }
  /// data() is nullptr where the field is absent.
  std::string_view string(int slot) const {
    const uint8_t* p = field(slot);
    if (p == nullptr) return {};
    p = follow(p);
    return {reinterpret_cast<const char*>(p + 4), load<uint32_t>(p)};
  }

 private:
  const uint8_t* field(int slot) const {
    if (p_ == nullptr) return nullptr;
    const uint8_t* vtable = p_ - load<int32_t>(p_);
    const uint16_t vtable_nbytes = load<uint16_t>(vtable);
    const int at = 4 + 2 * slot;
    if (at + 2 > vtable_nbytes) return nullptr;
    const uint16_t offset = load<uint16_t>(vtable + at);
    return offset == 0 ? nullptr : p_ + offset;
  }

  const uint8_t* p_;
};

inline Table root(const void* data) { return Table(follow(static_cast<const uint8_t*>(data))); }

}  // namespace flatbuffer
}  // namespace cuda_int4
