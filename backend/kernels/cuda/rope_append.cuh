// rope_append: arguments and launcher; the contract is in rope_append.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_view.h"
#include "fault.cuh"

namespace cuda_int4 {

struct RopeAppendKernelArgs {  // device pointers; sizes in elements
  void* k_cache;
  void* v_cache;
  const void* qkv;
  const void* cos;
  const void* sin;
  const void* input_pos;
  const void* q_norm;  // nullptr: none
  const void* k_norm;  // nullptr: none
  float* k_scale;      // nullptr: the caches are of dtype, else int8
  float* v_scale;
  void* q;
  DType dtype, table_dtype, q_norm_dtype, k_norm_dtype;
  bool pos_is_int64, interleaved;
  bool values_are_keys;   // qkv has no heads of values
  bool constant_weights;  // ExecutionContext
  int64_t B, S, n_heads, n_kv_heads, T, D;
  int64_t table_D;       // D or D / 2
  int64_t table_stride;  // in rows, of b: S, or 0 where all have one
  int64_t pos_stride;    // in positions, likewise
  float eps;
  FaultNote note;
};

cudaError_t launch_rope_append(const RopeAppendKernelArgs& args, cudaStream_t stream);

}  // namespace cuda_int4
