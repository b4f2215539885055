#include "ptd_check.h"

#include <cstring>
#include <initializer_list>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

// extension/flat_tensor/serialize/flat_tensor.fbs of ExecuTorch, which only ever appends.
enum FlatTensorField { kSegments = 1, kNamedData = 2 };
enum NamedDataField { kKey = 0, kSegmentIndex = 1, kTensorLayout = 2 };
enum LayoutField { kScalarType = 0, kSizes = 1, kDimOrder = 2 };

/// A flatbuffer whose every offset is looked at before it is followed. Positions are from its start;
/// the first step out of it makes ok() false, and everything after that reads as absent.
class Bounded {
 public:
  struct Table {
    uint64_t at = 0, vtable = 0;
    uint32_t vtable_nbytes = 0, nbytes = 0;
  };
  struct Vector {
    uint64_t at = 0;
    uint32_t size = 0;
    bool present = false;
  };

  Bounded(const uint8_t* data, uint64_t nbytes) : data_(data), nbytes_(nbytes) {}

  bool ok() const { return ok_; }

  Table table(uint64_t at) {
    Table t;
    if (!holds(at, 4)) return t;
    const int64_t vtable = int64_t(at) - load<int32_t>(at);
    if (vtable < 0 || !holds(uint64_t(vtable), 4)) return broken(), t;
    t.at = at;
    t.vtable = uint64_t(vtable);
    t.vtable_nbytes = load<uint16_t>(t.vtable);
    t.nbytes = load<uint16_t>(t.vtable + 2);
    if (t.vtable_nbytes < 4 || !holds(t.vtable, t.vtable_nbytes) || !holds(at, t.nbytes)) broken();
    return t;
  }

  /// Position of a field of `nbytes`; 0 where it is absent.
  uint64_t field(const Table& t, int slot, uint32_t nbytes) {
    const uint32_t entry = 4 + 2 * uint32_t(slot);
    if (!ok_ || entry + 2 > t.vtable_nbytes) return 0;
    const uint32_t offset = load<uint16_t>(t.vtable + entry);
    if (offset == 0) return 0;
    if (offset < 4 || offset + nbytes > t.nbytes) return broken(), 0;
    return t.at + offset;
  }

  uint64_t follow(uint64_t at) { return holds(at, 4) ? at + load<uint32_t>(at) : 0; }

  /// A vector of elements of `element` bytes, with `tail` bytes behind them (a string's NUL).
  Vector vector(const Table& t, int slot, uint32_t element, uint32_t tail = 0) {
    Vector v;
    const uint64_t at = field(t, slot, 4);
    if (at == 0) return v;
    const uint64_t begin = follow(at);
    if (!ok_ || !holds(begin, 4)) return v;
    v.size = load<uint32_t>(begin);
    v.at = begin + 4;
    v.present = holds(v.at, uint64_t(v.size) * element + tail);
    return v;
  }

 private:
  bool holds(uint64_t at, uint64_t n) {
    if (!ok_ || at > nbytes_ || n > nbytes_ - at) ok_ = false;
    return ok_;
  }
  void broken() { ok_ = false; }
  template <typename T>
  T load(uint64_t at) const {
    T value;
    std::memcpy(&value, data_ + at, sizeof(T));
    return value;
  }

  const uint8_t* data_;
  uint64_t nbytes_;
  bool ok_ = true;
};

bool check_tables(Bounded& buffer) {
  const Bounded::Table root = buffer.table(buffer.follow(0));
  const Bounded::Vector segments = buffer.vector(root, kSegments, 4);
  for (uint32_t i = 0; buffer.ok() && i < segments.size; ++i) {
    const Bounded::Table segment = buffer.table(buffer.follow(segments.at + 4 * uint64_t(i)));
    for (int slot : {0, 1}) buffer.field(segment, slot, 8);
  }
  const Bounded::Vector named = buffer.vector(root, kNamedData, 4);
  for (uint32_t i = 0; buffer.ok() && i < named.size; ++i) {
    const Bounded::Table entry = buffer.table(buffer.follow(named.at + 4 * uint64_t(i)));
    if (!buffer.vector(entry, kKey, 1, 1).present) return false;
    buffer.field(entry, kSegmentIndex, 4);
    if (const uint64_t at = buffer.field(entry, kTensorLayout, 4)) {
      const Bounded::Table layout = buffer.table(buffer.follow(at));
      buffer.field(layout, kScalarType, 1);
      const Bounded::Vector sizes = buffer.vector(layout, kSizes, 4);
      const Bounded::Vector dim_order = buffer.vector(layout, kDimOrder, 1);
      // The map reads as many dimensions as there are sizes.
      if (!sizes.present || !dim_order.present || sizes.size != dim_order.size) return false;
    }
  }
  return buffer.ok();
}

}  // namespace

Error check_ptd(const uint8_t* data, uint64_t nbytes, const char* path) {
  uint64_t offset, flatbuffer_nbytes, end;
  std::memcpy(&offset, data + 16, 8);
  std::memcpy(&flatbuffer_nbytes, data + 24, 8);
  Bounded buffer(data, __builtin_add_overflow(offset, flatbuffer_nbytes, &end) ? 0 : end);
  if (end > nbytes || !check_tables(buffer))
    return fail(
        Error::InvalidExternalData,
        "%s: expected a .ptd whose tables lie inside it, got one that points outside; it is "
        "damaged, export it again",
        path);
  return Error::Ok;
}

}  // namespace cuda_int4
