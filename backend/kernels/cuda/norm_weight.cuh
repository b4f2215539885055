// The weight of a norm, as the kernels that norm a row read it: a vector at a time, and ahead of what
// the kernel waits for.
#pragma once

#include "../tensor_view.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

struct AnyFloat {};  // a weight whose dtype is looked at per element; one element at a time

// What a lane loads of a weight in one go, and the values of it.
template <typename W, int kVec>
struct NormWeight {
  Elems<W, kVec> loaded;
  __device__ __forceinline__ void load(const void* weight, DType, int64_t vector) {
    const Elems<W, kVec>* from = static_cast<const Elems<W, kVec>*>(weight) + vector;
    if constexpr (sizeof(loaded) % sizeof(uint4) == 0) {
      constexpr int kWords = sizeof(loaded) / sizeof(uint4);
      const uint4* words = reinterpret_cast<const uint4*>(from);
#pragma unroll
      for (int i = 0; i < kWords; ++i)  // stays above a griddepcontrol_wait behind it
        reinterpret_cast<uint4*>(&loaded)[i] = load_global_early_v4(words + i);
    } else {
      loaded = *from;
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return as_float(loaded.values[i]); }
};

template <>
struct NormWeight<AnyFloat, 1> {
  float loaded;
  __device__ __forceinline__ void load(const void* weight, DType dtype, int64_t d) {
    if (dtype == DType::kFloat32) {
      loaded = static_cast<const float*>(weight)[d];
    } else if (dtype == DType::kFloat16) {
      loaded = as_float(static_cast<const __half*>(weight)[d]);
    } else {
      loaded = as_float(static_cast<const __nv_bfloat16*>(weight)[d]);
    }
  }
  __device__ __forceinline__ float operator[](int) const { return loaded; }
};

}  // namespace cuda_int4
