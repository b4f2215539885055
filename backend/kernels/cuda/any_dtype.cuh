// Elements whose dtype is known at run time only: read as double or int64, written from them.
//
// The switch is the same for all threads. Where speed matters a kernel is compiled per dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {

__device__ __forceinline__ double load_double(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[i]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DType::kInt8:
      return static_cast<const int8_t*>(data)[i];
    case DType::kInt16:
      return static_cast<const int16_t*>(data)[i];
    case DType::kInt32:
      return static_cast<const int32_t*>(data)[i];
    case DType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    case DType::kUInt8:
    case DType::kBool:
      break;
  }
  return static_cast<const uint8_t*>(data)[i];
}

// Floats lose their fraction.
__device__ __forceinline__ int64_t load_int64(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kInt8:
      return static_cast<const int8_t*>(data)[i];
    case DType::kInt16:
      return static_cast<const int16_t*>(data)[i];
    case DType::kInt32:
      return static_cast<const int32_t*>(data)[i];
    case DType::kInt64:
      return static_cast<const int64_t*>(data)[i];
    case DType::kUInt8:
    case DType::kBool:
      return static_cast<const uint8_t*>(data)[i];
    default:
      return static_cast<int64_t>(load_double(data, dtype, i));
  }
}

// From float, double or int64: one rounding to a float dtype; int64 wraps; bool is "not zero".
template <typename V>
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t i, V value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(data)[i] = sizeof(V) == 8 ? __double2half(static_cast<double>(value))
                                                     : __float2half_rn(static_cast<float>(value));
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = sizeof(V) == 8
                                                 ? __double2bfloat16(static_cast<double>(value))
                                                 : __float2bfloat16_rn(static_cast<float>(value));
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      return;
    case DType::kFloat64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      return;
    case DType::kUInt8:
      static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(static_cast<int64_t>(value));
      return;
    case DType::kInt8:
      static_cast<int8_t*>(data)[i] = static_cast<int8_t>(static_cast<int64_t>(value));
      return;
    case DType::kInt16:
      static_cast<int16_t*>(data)[i] = static_cast<int16_t>(static_cast<int64_t>(value));
      return;
    case DType::kInt32:
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(static_cast<int64_t>(value));
      return;
    case DType::kInt64:
      static_cast<int64_t*>(data)[i] = static_cast<int64_t>(value);
      return;
    case DType::kBool:
      static_cast<uint8_t*>(data)[i] = value != V(0);
      return;
  }
}

// ---- how a kernel reads its input: V is what it computes in ----

template <typename T>
struct ReadFloat {  // float16, bfloat16, float32
  using V = float;
  __device__ __forceinline__ static float at(const void* data, DType, int64_t i) {
    return static_cast<float>(static_cast<const T*>(data)[i]);
  }
};

struct ReadDouble {
  using V = double;
  __device__ __forceinline__ static double at(const void* data, DType dtype, int64_t i) {
    return load_double(data, dtype, i);
  }
};

struct ReadInt64 {
  using V = int64_t;
  __device__ __forceinline__ static int64_t at(const void* data, DType dtype, int64_t i) {
    return load_int64(data, dtype, i);
  }
};

// The reader for values of dtype when what comes out is of out_dtype: f(reader).
template <typename F>
auto with_reader(DType dtype, DType out_dtype, F f) {
  const bool to_float =
      out_dtype == DType::kFloat16 || out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat32;
  if (to_float && dtype == DType::kFloat32) return f(ReadFloat<float>{});
  if (to_float && dtype == DType::kFloat16) return f(ReadFloat<__half>{});
  if (to_float && dtype == DType::kBFloat16) return f(ReadFloat<__nv_bfloat16>{});
  if (to_float || out_dtype == DType::kFloat64) return f(ReadDouble{});
  return f(ReadInt64{});
}

}  // namespace cuda_int4
