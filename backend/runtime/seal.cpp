#include "seal.h"

#include <cinttypes>
#include <cstring>

#include "checksum.h"
#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

constexpr uint64_t kSealBytes = 32;
constexpr uint64_t kMinFileBytes = 64;  // ExecuTorch's own headers read this much
constexpr char kMagic[] = "CI4SEAL1";
constexpr char kMagicReversed[] = "1LAES4IC";

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

/// Where each kind keeps its identifier and the sizes that give its end (schema/extended_header.cpp
/// and extension/flat_tensor of ExecuTorch).
struct Format {
  const char* name;
  char identifier[5];     // of the flatbuffer, at byte 4
  char magic[5];          // of the header, at byte 8
  uint32_t header_bytes;  // at least, for all the fields below
  int flatbuffer_end;     // offset of the u64; for a .ptd its start precedes it, and is added
  int segment_base;       // offset of the u64
  int segment_nbytes;     // offset of the u64
  Error error;
};

constexpr Format kFormats[] = {
    {".pte", "ET12", "eh00", 32, 16, 24, 32, Error::InvalidProgram},
    {".ptd", "FT01", "FH01", 40, 24, 32, 40, Error::InvalidExternalData},
};

/// The end that the file's own header gives; 0 where it has no such header.
uint64_t end_by_header(const MappedFile& file, const Format& format) {
  const uint8_t* p = file.data();
  if (std::memcmp(p + 8, format.magic, 4) != 0) return 0;
  if (load<uint32_t>(p + 12) < format.header_bytes) return 0;
  uint64_t flatbuffer_end = load<uint64_t>(p + format.flatbuffer_end);
  const uint64_t base = load<uint64_t>(p + format.segment_base);
  const uint64_t nbytes = load<uint64_t>(p + format.segment_nbytes);
  if (format.error == Error::InvalidExternalData &&
      __builtin_add_overflow(flatbuffer_end, load<uint64_t>(p + 16), &flatbuffer_end))
    return UINT64_MAX;
  uint64_t end = flatbuffer_end;
  if (base != 0 && __builtin_add_overflow(base, nbytes, &end)) return UINT64_MAX;
  return end;
}

}  // namespace

Error check_file(const MappedFile& file, FileKind kind, bool verify, FileBody* out) {
  const Format& format = kFormats[int(kind)];
  const char* path = file.path().c_str();
  const uint64_t size = file.size();
  if (size < kMinFileBytes)
    return fail(format.error,
                "%s: expected a %s of at least %" PRIu64 " bytes, got %" PRIu64
                "; it is truncated, export it again",
                path, format.name, kMinFileBytes, size);
  const uint8_t* seal = file.data() + size - kSealBytes;
  const bool begins = std::memcmp(seal, kMagic, 8) == 0;
  const bool ends = std::memcmp(seal + 24, kMagicReversed, 8) == 0;
  FileBody body;
  body.nbytes = begins || ends ? size - kSealBytes : size;
  if (begins || ends) {
    if (!begins || !ends || load<uint32_t>(seal + 20) != 0 ||
        load<uint64_t>(seal + 8) != body.nbytes)
      return fail(
          format.error,
          "%s: expected a seal over %" PRIu64
          " bytes, found one that is damaged; the %s is truncated or damaged, export it again",
          path, body.nbytes, format.name);
    if (verify) {
      const uint32_t expected = load<uint32_t>(seal + 16);
      const uint32_t found = checksum(file.data(), body.nbytes);
      if (found != expected)
        return fail(format.error,
                    "%s: expected checksum %08" PRIx32 ", found %08" PRIx32
                    "; the %s is damaged, export it again",
                    path, expected, found, format.name);
      body.verified = true;
    }
  }
  if (std::memcmp(file.data() + 4, format.identifier, 4) != 0)
    return fail(
        format.error,
        "%s: expected an ExecuTorch %s (identifier %s), found another kind of file; give one "
        "that cuda_int4.export wrote",
        path, format.name, format.identifier);
  const uint64_t end = end_by_header(file, format);
  if (end > body.nbytes)
    return fail(format.error,
                "%s: expected %" PRIu64 " bytes by its header, got %" PRIu64
                "; the %s is truncated or damaged, export it again",
                path, end, body.nbytes, format.name);
  if (end != 0 && end < body.nbytes)
    return fail(format.error,
                "%s: expected its end (or a seal) at byte %" PRIu64 ", found %" PRIu64
                " more bytes; the %s is truncated or damaged, export it again",
                path, end, body.nbytes - end, format.name);
  *out = body;
  return Error::Ok;
}

}  // namespace cuda_int4
