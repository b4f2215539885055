// What every attention kernel takes, on either device, out of AttentionArgs.
#pragma once

#include "ops.h"

namespace cuda_int4 {

// `Kernel` is cpu::AttentionJob or AttentionKernelArgs of cuda/attention.cuh: fields of one name mean
// one thing in both. What only one of them has stays zero.
template <typename Kernel>
Kernel attention_kernel_arguments(const AttentionArgs& args) {
  Kernel p = {};
  p.q = args.q.data;
  p.k = args.k.data;
  p.v = args.v.data;
  p.y = args.y.data;
  p.dtype = args.q.dtype;
  p.is_causal = args.is_causal;
  p.B = args.q.sizes[0];
  p.Hq = args.q.sizes[1];
  p.S = args.q.sizes[2];
  p.D = args.q.sizes[3];
  p.Hkv = args.k.sizes[1];
  p.T = args.k.sizes[2];
  p.scale = static_cast<float>(args.scale);
  p.softcap = static_cast<float>(args.softcap);
  for (int d = 0; d < 3; ++d) {
    p.q_strides[d] = args.q.strides[d];
    p.k_strides[d] = args.k.strides[d];
    p.v_strides[d] = args.v.strides[d];
  }
  p.y_strides[0] = p.Hq * p.S * p.D;
  p.y_strides[1] = args.merge_heads ? p.D : p.S * p.D;
  p.y_strides[2] = args.merge_heads ? p.Hq * p.D : p.D;
  if (args.input_pos.present()) {
    p.input_pos = args.input_pos.data;
    p.pos_is_int64 = args.input_pos.dtype == DType::kInt64;
    p.pos_stride = args.input_pos.ndim == 2 ? p.S : 0;
    p.window = args.window;
  }
  p.k_scale = static_cast<const float*>(args.k_scale.data);
  p.v_scale = static_cast<const float*>(args.v_scale.data);
  if (args.mask.present()) {
    p.mask = args.mask.data;
    p.mask_is_bool = args.mask.dtype == DType::kBool;
    for (int d = 0; d < args.mask.ndim; ++d) {
      p.mask_strides[4 - args.mask.ndim + d] = args.mask.sizes[d] == 1 ? 0 : args.mask.strides[d];
    }
  }
  return p;
}

}  // namespace cuda_int4
