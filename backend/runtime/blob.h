// The delegate blob: what preprocess wrote (backend/blob.py), read back with every bound checked.
//
//   offset  type  field
//        0  8 B   magic "CUDAINT4"
//        8  u32   format_version (1)
//       12  u32   checksum of the bytes [16, blob_nbytes)
//       16  u64   blob_nbytes
//       24  u64   program_offset, a multiple of 16
//       32  u64   program_nbytes: the nested program, to the end of the blob
//       40  u32   n_constants, n_linears, n_ops, 0
//       56        constants, then linears, then ops; zeros up to program_offset
//
//   string    u32 nbytes, utf-8 bytes
//   constant  string name, key, u32 dtype, ndim, u64 sizes[ndim], nbytes, u32 alignment, checksum
//   linear    string name, layout_tag, activation, u64 N, K, group_size,
//             i32 qdata, scale, zero_point, meta, bias (an index of a constant; -1: none)
//   op        string name, as in the nested program's operator table
//
// Knows nothing of ExecuTorch but its Error; reads one buffer, once, front to back.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

constexpr uint32_t kBlobFormatVersion = 1;

struct ConstantRecord {
  std::string name;  // "layers.0.wq.weight.qdata"
  std::string key;   // in the named data store
  DType dtype;
  std::vector<int32_t> sizes;  // contiguous; their product times the element is nbytes (checked)
  uint64_t nbytes;
  uint32_t alignment;  // a power of two
  uint32_t checksum;
};

struct LinearRecord {
  std::string name;
  std::string layout_tag;
  std::string activation;
  int64_t N, K, group_size;                      // each in 1..2^31-1
  int32_t qdata, scale, zero_point, meta, bias;  // -1: none; else an index of a constant
};

struct Blob {
  std::vector<ConstantRecord> constants;
  std::vector<LinearRecord> linears;
  std::vector<std::string> ops;
  const void* program;  // points into the buffer that was read
  uint64_t program_nbytes;
};

/// @retval InvalidProgram the bytes are not a blob, or are damaged.
/// @retval DelegateInvalidCompatibility a blob of another format version.
executorch::runtime::Error read_blob(const void* data, uint64_t nbytes, Blob* out);

}  // namespace cuda_int4
