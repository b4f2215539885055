// Softmax, norms, running sums and top-k: the plain arguments of their kernels. Device pointers;
// sizes in elements; every tensor contiguous.
#pragma once

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

// y[o, j, i] = exp(x[o, j, i]) / sum over j' of exp(x[o, j', i]), or its logarithm
struct SoftmaxArgs {
  const void* x;           // [n_outer, n, n_inner]
  void* y;                 // likewise
  DType dtype, out_dtype;  // out_dtype: that of x, or float32 for float16 and bfloat16
  int64_t n_outer, n, n_inner;
  bool is_log;
};

// y[r, d] = (x[r, d] - mean_r) * rstd_r * weight[d] + bias[d], rstd = 1 / sqrt(variance + eps)
struct LayerNormArgs {
  const void* x;       // [n_rows, D]
  const void* weight;  // [D]; nullptr: 1
  const void* bias;    // [D]; nullptr: 0
  void* y;
  void* mean;  // [n_rows]
  void* rstd;  // [n_rows]
  DType dtype, weight_dtype, bias_dtype, moments_dtype;
  int64_t n_rows, D;
  double eps;
};

// The same over the channels of a group: row (n, g) is x[n, g * C/G .. (g + 1) * C/G, :], and weight
// and bias are one a channel.
struct GroupNormArgs {
  const void* x;       // [N, C, inner]
  const void* weight;  // [C]; nullptr: 1
  const void* bias;    // [C]; nullptr: 0
  void* y;
  void* mean;  // [N, n_groups]
  void* rstd;  // [N, n_groups]
  DType dtype, weight_dtype, bias_dtype, moments_dtype;
  int64_t N, C, inner, n_groups;
  double eps;
};

// y[n, c, i] = (x[n, c, i] - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c]
struct BatchNormArgs {
  const void* x;         // [N, C, inner]
  const void* weight;    // [C]; nullptr: 1
  const void* bias;      // [C]; nullptr: 0
  const void* mean;      // [C]
  const void* variance;  // [C]
  void* y;
  DType dtype, weight_dtype, bias_dtype, mean_dtype, variance_dtype;
  int64_t N, C, inner;
  double eps;
};

// y[o, j, i] = sum over j' <= j of x[o, j', i]
struct CumsumArgs {
  const void* x;  // [n_outer, n, n_inner]
  void* y;        // likewise
  DType dtype, out_dtype;
  int64_t n_outer, n, n_inner;
};

// The k largest (or smallest) along the middle dimension, in order; a NaN is above everything; of
// equal values the one with the lower index comes first.
struct TopkArgs {
  const void* x;     // [n_outer, n, n_inner]
  void* values;      // [n_outer, k, n_inner], dtype of x
  int64_t* indices;  // likewise
  DType dtype;
  int elem_bytes;  // of dtype
  int64_t n_outer, n, n_inner, k;
  bool is_largest;
};

// y[o, h, i] = x[o, h, i] * sigmoid(x[o, n / 2 + h, i])
struct GluArgs {
  const void* x;  // [n_outer, 2 * half, n_inner]
  void* y;        // [n_outer, half, n_inner]
  DType dtype;
  int64_t n_outer, half, n_inner;
};

}  // namespace cuda_int4
