#include "blob.h"

#include <cinttypes>
#include <cstring>

#include "../kernels/checks.h"
#include "checksum.h"
#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

constexpr uint64_t kHeaderBytes = 56;
constexpr uint64_t kCheckedFrom = 16;
constexpr uint64_t kProgramAlignment = 16;
constexpr uint64_t kMaxAlignment = 4096;

/// Reads little-endian values front to back. After the first read past the end every read fails, so
/// a caller may read a whole record and ask ok() once.
class Reader {
 public:
  Reader(const uint8_t* data, uint64_t nbytes) : data_(data), left_(nbytes) {}

  bool ok() const { return ok_; }
  uint64_t left() const { return left_; }

  template <typename T>
  T number() {
    T value{};
    if (const uint8_t* p = take(sizeof(T))) std::memcpy(&value, p, sizeof(T));
    return value;
  }

  std::string string() {
    const uint64_t nbytes = number<uint32_t>();
    const uint8_t* p = take(nbytes);
    return p == nullptr ? std::string() : std::string(reinterpret_cast<const char*>(p), nbytes);
  }

 private:
  const uint8_t* take(uint64_t nbytes) {
    if (!ok_ || nbytes > left_) {
      ok_ = false;
      return nullptr;
    }
    const uint8_t* p = data_;
    data_ += nbytes;
    left_ -= nbytes;
    return p;
  }

  const uint8_t* data_;
  uint64_t left_;
  bool ok_ = true;
};

Error damaged(const char* what) {
  return fail(Error::InvalidProgram,
              "delegate blob: %s; the .pte is truncated or damaged, export it again", what);
}

// A NUL inside a name would end it early where C strings are compared.
bool is_plain(const std::string& text) { return text.find('\0') == std::string::npos; }

Error read_constant(Reader& reader, ConstantRecord* c) {
  c->name = reader.string();
  c->key = reader.string();
  c->dtype = static_cast<DType>(reader.number<uint32_t>());
  const uint32_t ndim = reader.number<uint32_t>();
  if (!reader.ok() || !is_plain(c->name) || !is_plain(c->key))
    return damaged("a constant's record is cut off");
  if (ndim > uint32_t(kMaxDims))
    return fail(Error::InvalidProgram,
                "constant %s: expected at most %d dimensions, got %" PRIu32
                "; the .pte is damaged, export it again",
                c->name.c_str(), kMaxDims, ndim);
  const auto element = uint64_t(dtype_bytes(c->dtype));
  if (element == 0)
    return fail(Error::InvalidProgram,
                "constant %s: expected a known dtype, got number %d; the .pte is damaged, export "
                "it again",
                c->name.c_str(), int(c->dtype));
  uint64_t nbytes = element;
  for (uint32_t i = 0; i < ndim; ++i) {
    const uint64_t size = reader.number<uint64_t>();
    if (size > uint64_t(INT32_MAX) || __builtin_mul_overflow(nbytes, size, &nbytes))
      return fail(Error::InvalidProgram,
                  "constant %s: expected sizes below 2^31, got %" PRIu64 " at dimension %" PRIu32
                  "; the .pte is damaged, export it again",
                  c->name.c_str(), size, i);
    c->sizes.push_back(int32_t(size));
  }
  c->nbytes = reader.number<uint64_t>();
  c->alignment = reader.number<uint32_t>();
  c->checksum = reader.number<uint32_t>();
  if (!reader.ok()) return damaged("a constant's record is cut off");
  if (c->nbytes != nbytes)
    return fail(Error::InvalidProgram,
                "constant %s: expected %" PRIu64 " bytes for its sizes, got %" PRIu64
                "; the .pte is damaged, export it again",
                c->name.c_str(), nbytes, c->nbytes);
  const uint64_t a = c->alignment;
  if (a == 0 || a > kMaxAlignment || (a & (a - 1)) != 0)
    return fail(Error::InvalidProgram,
                "constant %s: expected an alignment of 1, 2, 4 .. %" PRIu64 ", got %" PRIu64
                "; the .pte is damaged, export it again",
                c->name.c_str(), kMaxAlignment, a);
  return Error::Ok;
}

Error read_linear(Reader& reader, size_t n_constants, LinearRecord* l) {
  l->name = reader.string();
  l->layout_tag = reader.string();
  l->activation = reader.string();
  const uint64_t N = reader.number<uint64_t>();
  const uint64_t K = reader.number<uint64_t>();
  const uint64_t group_size = reader.number<uint64_t>();
  int32_t* const parts[] = {&l->qdata, &l->scale, &l->zero_point, &l->meta, &l->bias};
  for (int32_t* part : parts) *part = reader.number<int32_t>();
  if (!reader.ok() || !is_plain(l->name) || !is_plain(l->layout_tag) || !is_plain(l->activation))
    return damaged("a linear's record is cut off");
  constexpr uint64_t kMaxDim = INT32_MAX;  // keeps N * K inside int64
  for (uint64_t dim : {N, K, group_size})
    if (dim < 1 || dim > kMaxDim)
      return fail(Error::InvalidProgram,
                  "%s: expected N, K and group_size in 1..%" PRIu64 ", got N=%" PRIu64 " K=%" PRIu64
                  " group_size=%" PRIu64 "; the .pte is damaged, export it again",
                  l->name.c_str(), kMaxDim, N, K, group_size);
  l->N = int64_t(N);
  l->K = int64_t(K);
  l->group_size = int64_t(group_size);
  for (const int32_t* part : parts)
    if (*part < -1 || *part >= int64_t(n_constants))
      return fail(Error::InvalidProgram,
                  "%s: expected its parts among the %zu constants, got number %" PRId32
                  "; the .pte is damaged, export it again",
                  l->name.c_str(), n_constants, *part);
  if (l->qdata < 0 || l->scale < 0)
    return fail(Error::InvalidProgram,
                "%s: expected qdata and scale, got none; the .pte is damaged, export it again",
                l->name.c_str());
  return Error::Ok;
}

}  // namespace

Error read_blob(const void* data, uint64_t nbytes, Blob* out) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (nbytes < kHeaderBytes) return damaged("it is shorter than its header");
  if (std::memcmp(bytes, "CUDAINT4", 8) != 0)
    return damaged("expected the magic CUDAINT4 at its start, found other bytes");
  Reader header(bytes + 8, kHeaderBytes - 8);
  const auto version = header.number<uint32_t>();
  const auto expected_checksum = header.number<uint32_t>();
  const auto blob_nbytes = header.number<uint64_t>();
  const auto program_offset = header.number<uint64_t>();
  const auto program_nbytes = header.number<uint64_t>();
  const auto n_constants = header.number<uint32_t>();
  const auto n_linears = header.number<uint32_t>();
  const auto n_ops = header.number<uint32_t>();
  if (version != kBlobFormatVersion)
    return fail(Error::DelegateInvalidCompatibility,
                "delegate blob: expected format version %" PRIu32 ", got %" PRIu32
                "; export the model again with cuda_int4 %s, or run it with the cuda_int4 that "
                "exported it",
                kBlobFormatVersion, version, CUDA_INT4_VERSION);
  if (blob_nbytes < kHeaderBytes || blob_nbytes > nbytes)
    return fail(Error::InvalidProgram,
                "delegate blob: expected %" PRIu64 " bytes, got %" PRIu64
                "; the .pte is truncated or damaged, export it again",
                blob_nbytes, nbytes);
  const uint32_t found_checksum = checksum(bytes + kCheckedFrom, blob_nbytes - kCheckedFrom);
  if (found_checksum != expected_checksum)
    return fail(Error::InvalidProgram,
                "delegate blob: expected checksum %08" PRIx32 ", got %08" PRIx32
                "; the .pte is damaged, export it again",
                expected_checksum, found_checksum);
  if (program_offset % kProgramAlignment != 0 || program_offset < kHeaderBytes ||
      program_offset > blob_nbytes || program_nbytes != blob_nbytes - program_offset)
    return damaged("the nested program does not fill its end");
  if (reinterpret_cast<uintptr_t>(bytes) % kProgramAlignment != 0)
    return fail(Error::InvalidProgram,
                "delegate blob: expected an address that is a multiple of %" PRIu64
                "; load the .pte from a file, or from memory aligned to %" PRIu64 " bytes",
                kProgramAlignment, kProgramAlignment);
  Reader records(bytes + kHeaderBytes, program_offset - kHeaderBytes);
  // Each record takes at least 4 bytes: a forged count cannot reserve more than the blob's size.
  const uint64_t most = records.left() / 4;
  if (n_constants > most || n_linears > most || n_ops > most)
    return damaged("it counts more records than it has bytes for");
  Blob blob;
  blob.constants.resize(n_constants);
  for (ConstantRecord& constant : blob.constants) {
    const Error error = read_constant(records, &constant);
    if (error != Error::Ok) return error;
  }
  blob.linears.resize(n_linears);
  for (LinearRecord& linear : blob.linears) {
    const Error error = read_linear(records, n_constants, &linear);
    if (error != Error::Ok) return error;
  }
  blob.ops.resize(n_ops);
  for (std::string& op : blob.ops) {
    op = records.string();
    if (!records.ok() || !is_plain(op)) return damaged("an op's name is cut off");
  }
  blob.program = bytes + program_offset;
  blob.program_nbytes = program_nbytes;
  *out = std::move(blob);
  return Error::Ok;
}

}  // namespace cuda_int4
