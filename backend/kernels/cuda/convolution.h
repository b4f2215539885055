// Convolutions and pooling over one or two dimensions: the plain arguments of their kernels.
// One dimension is two with a height of 1.
#pragma once

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

struct Window {  // [0]: along the height, [1]: along the width
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// y[n, o, h, w] = bias[o] + sum over c of o's group and (u, v) in the kernel of
//                 x[n, c, h * stride - padding + u * dilation, ...] * weight[o, c, u, v]
// Transposed: x[n, c, h, w] adds to y at h * stride - padding + u * dilation, weight is [C, o, u, v].
struct ConvolutionArgs {  // device pointers; strides in elements, of n, channel, height, width
  const void* x;
  const void*
      weight;        // [out channels, in channels / groups, kernel]; transposed: in and out change
  const void* bias;  // [out channels], any float dtype or that of x; nullptr: 0
  void* y;
  DType dtype, bias_dtype;
  int64_t N, in_channels, out_channels, groups;
  int64_t in_sizes[2], out_sizes[2];
  int64_t x_strides[4], y_strides[4], weight_strides[4];
  Window window;
  bool is_transposed;
};

enum class Pooling { kAverage, kAdaptiveAverage, kMaximum };

struct PoolArgs {  // device pointers; contiguous [n_planes, height, width]
  const void* x;
  void* y;
  int64_t* indices;  // maximum: h * width + w; else nullptr
  DType dtype;
  Pooling pooling;
  int64_t n_planes, in_sizes[2], out_sizes[2];
  Window window;        // not for the adaptive one
  bool counts_padding;  // average: padding counts in the divisor
  int64_t divisor;      // average: this instead of a count; 0: count
};

}  // namespace cuda_int4
