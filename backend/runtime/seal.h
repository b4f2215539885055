// The seal: 32 bytes that save() and export() put behind a .pte or .ptd, over all of it.
//
//   offset from its start   type  field
//                       0   8 B   magic "CI4SEAL1"
//                       8   u64   sealed_nbytes: the file without the seal
//                      16   u32   checksum of those bytes
//                      20   u32   0
//                      24   8 B   "1LAES4IC"
//
// ExecuTorch reads no further than its own header says, so a sealed file is a plain file to it. A
// file that the plain ExecuTorch calls wrote has no seal and is accepted; but what stands behind the
// end that its header gives must be a seal or nothing.
#pragma once

#include <executorch/runtime/core/error.h>

#include "mapped_file.h"

namespace cuda_int4 {

enum class FileKind { kPte, kPtd };

struct FileBody {
  uint64_t nbytes = 0;    // the file without its seal
  bool verified = false;  // the seal's checksum was computed and agrees
};

/// Where the file ends, and (if `verify`) that its bytes are those that were sealed.
/// @retval InvalidProgram (.pte), InvalidExternalData (.ptd): truncated, damaged, or no such file.
executorch::runtime::Error check_file(const MappedFile& file, FileKind kind, bool verify,
                                      FileBody* out);

}  // namespace cuda_int4
