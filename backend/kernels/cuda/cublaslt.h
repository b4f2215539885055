// The part of cuBLASLt that matmul_cublaslt.cu uses, found at run time: nothing links against it.
//
// Declared after NVIDIA's public header, whose numbers and structs are fixed across versions 12 and
// 13. Handles, descriptors and layouts are opaque pointers here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_int4 {
namespace cublaslt {

using Status = int;  // 0: success
using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;

enum ComputeType : int { kCompute32F = 68 };
enum DataType : int { kR32F = 0, kR16F = 2, kR16BF = 14 };
enum Operation : int { kNormal = 0, kTransposed = 1 };
enum MatmulDescAttribute : int {
  kDescTransA = 3,
  kDescTransB = 4,
  kDescEpilogue = 7,
  kDescBias = 8
};
enum Epilogue : int { kEpilogueBias = 4 };  // one value a row of the column-major result
enum LayoutAttribute : int { kLayoutBatchCount = 5, kLayoutBatchStride = 6 };
enum PreferenceAttribute : int {
  kPreferenceMaxWorkspaceBytes = 1,
  kPreferenceReductionSchemes = 3,
  kPreferenceMinAlignmentA = 5,  // of B, C and D: the three that follow
};
// Split sums are added in float32, in an order that does not vary.
enum ReductionScheme : uint32_t { kReduceInComputeType = 2 };

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Status (*create)(Handle* handle);
  Status (*desc_create)(MatmulDesc* desc, ComputeType compute, DataType scale);
  Status (*desc_set)(MatmulDesc desc, int attribute, const void* value, size_t nbytes);
  Status (*desc_destroy)(MatmulDesc desc);
  Status (*layout_create)(MatrixLayout* layout, DataType type, uint64_t rows, uint64_t columns,
                          int64_t column_stride);
  Status (*layout_set)(MatrixLayout layout, int attribute, const void* value, size_t nbytes);
  Status (*layout_destroy)(MatrixLayout layout);
  Status (*preference_create)(Preference* preference);
  Status (*preference_set)(Preference preference, int attribute, const void* value, size_t nbytes);
  Status (*preference_destroy)(Preference preference);
  Status (*get_heuristic)(Handle handle, MatmulDesc desc, MatrixLayout a, MatrixLayout b,
                          MatrixLayout c, MatrixLayout d, Preference preference, int n_wanted,
                          Heuristic* results, int* n_found);
  Status (*matmul)(Handle handle, MatmulDesc desc, const void* alpha, const void* a,
                   MatrixLayout a_layout, const void* b, MatrixLayout b_layout, const void* beta,
                   const void* c, MatrixLayout c_layout, void* d, MatrixLayout d_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                   void* stream);
};

// nullptr: not on this machine, or switched off. Looked for once: CUDA_INT4_CUBLASLT (a path, or
// "off"), a copy that the process has loaded, the loader's own search, and the packages beside ours.
const Library* library();

}  // namespace cublaslt
}  // namespace cuda_int4
