// Reductions over any dimensions of a tensor: the arguments that every one of them shares.
#pragma once

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

enum class Reduction {
  kSum,
  kMean,
  kProduct,
  kAny,       // not zero; NaN counts
  kMaximum,   // a NaN wins; of equals the first
  kMinimum,   // likewise
  kVariance,  // sum of squares about the mean / (n_reduced - correction); NaN where that is not > 0
};

// Dimensions of x that are walked together, the innermost last; those that can be merged are.
struct Walk {
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // of x, in elements
};

// out[o] = reduction over r of x[kept(o) + reduced(r)]
struct ReduceArgs {  // device pointers
  const void* x;
  void* out;    // contiguous [n_out]; nullptr: not wanted (extremes: only their index is)
  void* index;  // extremes: int64 [n_out], which r it was; nullptr: not wanted
  void* mean;   // variance: [n_out], dtype of out; nullptr: not wanted
  DType dtype, out_dtype;
  Reduction reduction;
  int64_t n_out, n_reduced;
  Walk kept, reduced;
  double correction;
};

}  // namespace cuda_int4
