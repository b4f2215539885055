// M, N and K of a linear whose arguments have passed validate_linear, whatever its layout.
#pragma once

#include "ops.h"

namespace cuda_int4 {

// A layout that pads N insists on out_features, any other on its being right where it is stated.
inline int64_t linear_N(const LinearArgs& args) {
  return args.out_features > 0 ? args.out_features : args.qdata.sizes[0];
}
inline int64_t linear_K(const LinearArgs& args) { return args.x.sizes[args.x.ndim - 1]; }
inline int64_t linear_M(const LinearArgs& args) {
  int64_t M = 1;
  for (int d = 0; d + 1 < args.x.ndim; ++d) M *= args.x.sizes[d];
  return M;
}

}  // namespace cuda_int4
