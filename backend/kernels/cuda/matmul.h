// A product of unquantised matrices: the arguments that every kernel of it shares.
#pragma once

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

// y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, k, n] + beta * c[i?, m, n]
//
// Element (i, m, k) of a lies at a[i * a_batch + m * a_m + k * a_k], and likewise for b and c; a
// stride of 0 repeats. y is row-major: [batch, M, N]. c may be y when their strides agree.
struct MatmulArgs {  // device pointers; sizes and strides in elements
  const void* a;
  const void* b;
  const void* c;  // nullptr: no addend
  void* y;
  DType dtype;  // of all four
  int64_t batch, M, N, K;
  int64_t a_batch, a_m, a_k;
  int64_t b_batch, b_k, b_n;
  int64_t c_batch, c_m, c_n;
  double alpha, beta;
};

}  // namespace cuda_int4
