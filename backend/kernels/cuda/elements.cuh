// Elements of any dtype to and from the type that a kernel computes with, chosen at run time: all
// threads of a launch take the same branch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tensor_kernels.h"

namespace cuda_int4 {

// The bytes of kWidth elements side by side, in registers: loads of several operands can be under
// way before the first is converted.
template <int kWidth>
struct RawElems {
  // 8 elements of at most 2 bytes, or 4, 2 or 1 of at most 8.
  static constexpr int kWords = kWidth == 8 ? 4 : 2 * kWidth;
  uint32_t words[kWords];

  __device__ __forceinline__ void set(uint32_t word) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word;
  }

  // The address is a multiple of n_bytes (up to 16); n_bytes is 1, 2, 4, 8, 16 or 32.
  __device__ __forceinline__ void load(const char* from, int n_bytes) {
    switch (n_bytes) {
      case 1:
        words[0] = *reinterpret_cast<const uint8_t*>(from);
        break;
      case 2:
        words[0] = *reinterpret_cast<const uint16_t*>(from);
        break;
      case 4:
        words[0] = *reinterpret_cast<const uint32_t*>(from);
        break;
      case 8: {
        const uint2 value = *reinterpret_cast<const uint2*>(from);
        words[0] = value.x, words[1] = value.y;
        break;
      }
      default:
        if constexpr (kWords >= 4)
#pragma unroll
          for (int i = 0; i < kWords; i += 4)
            if (4 * i < n_bytes) {
              const uint4 value = *reinterpret_cast<const uint4*>(from + 4 * i);
              words[i] = value.x, words[i + 1] = value.y;
              words[i + 2] = value.z, words[i + 3] = value.w;
            }
    }
  }

  __device__ __forceinline__ void store(char* to, int n_bytes) const {
    switch (n_bytes) {
      case 1:
        *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(words[0]);
        break;
      case 2:
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
        break;
      case 4:
        *reinterpret_cast<uint32_t*>(to) = words[0];
        break;
      case 8:
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        break;
      default:
        if constexpr (kWords >= 4)
#pragma unroll
          for (int i = 0; i < kWords; i += 4)
            if (4 * i < n_bytes)
              *reinterpret_cast<uint4*>(to + 4 * i) =
                  make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }

  // Element i of elements of kBytes; those that do not fit in are never asked for.
  template <int kBytes>
  __device__ __forceinline__ uint64_t get(int i) const {
    constexpr int kPerWord = kBytes < 4 ? 4 / kBytes : 1;
    if constexpr (kBytes == 8) {
      return 2 * i + 1 < kWords
                 ? words[(2 * i) % kWords] | uint64_t{words[(2 * i + 1) % kWords]} << 32
                 : 0;
    } else if constexpr (kBytes == 4) {
      return i < kWords ? words[i % kWords] : 0;
    } else {
      return words[(i / kPerWord) % kWords] >> (8 * kBytes * (i % kPerWord)) &
             ((uint32_t{1} << (8 * kBytes)) - 1);
    }
  }

  // Into words that began as 0.
  template <int kBytes>
  __device__ __forceinline__ void put(int i, uint64_t bits) {
    constexpr int kPerWord = kBytes < 4 ? 4 / kBytes : 1;
    if constexpr (kBytes == 8) {
      if (2 * i + 1 < kWords) {
        words[(2 * i) % kWords] = static_cast<uint32_t>(bits);
        words[(2 * i + 1) % kWords] = static_cast<uint32_t>(bits >> 32);
      }
    } else if constexpr (kBytes == 4) {
      if (i < kWords) words[i % kWords] = static_cast<uint32_t>(bits);
    } else {
      const uint32_t mask = (uint32_t{1} << (8 * kBytes)) - 1;
      words[(i / kPerWord) % kWords] |= (static_cast<uint32_t>(bits) & mask)
                                        << (8 * kBytes * (i % kPerWord));
    }
  }
};

namespace elements {

template <int kBytes, typename C, int kWidth, int kVectors, typename Decode>
__device__ __forceinline__ void read(const RawElems<kWidth> (&raw)[kVectors],
                                     C (&values)[kWidth * kVectors], Decode decode) {
#pragma unroll
  for (int i = 0; i < kWidth * kVectors; ++i)
    values[i] = static_cast<C>(decode(raw[i / kWidth].template get<kBytes>(i % kWidth)));
}

template <int kBytes, typename C, int kWidth, int kVectors, typename Encode>
__device__ __forceinline__ void write(const C (&values)[kWidth * kVectors],
                                      RawElems<kWidth> (&raw)[kVectors], Encode encode) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < RawElems<kWidth>::kWords; ++i) raw[v].words[i] = 0;
#pragma unroll
  for (int i = 0; i < kWidth * kVectors; ++i)
    raw[i / kWidth].template put<kBytes>(i % kWidth, encode(values[i]));
}

}  // namespace elements

// values[i] = C(element i).
template <typename C, int kWidth, int kVectors>
__device__ __forceinline__ void from_raw(const RawElems<kWidth> (&raw)[kVectors], DType dtype,
                                         C (&values)[kWidth * kVectors]) {
  using elements::read;
  switch (dtype) {
    case DType::kFloat16:
      return read<2>(raw, values, [](uint64_t bits) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
      });
    case DType::kBFloat16:
      return read<2>(raw, values, [](uint64_t bits) {
        return __uint_as_float(static_cast<uint32_t>(bits) << 16);
      });
    case DType::kFloat32:
      return read<4>(raw, values,
                     [](uint64_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); });
    case DType::kFloat64:
      return read<8>(raw, values, [](uint64_t bits) {
        return __longlong_as_double(static_cast<long long>(bits));
      });
    case DType::kInt64:
      return read<8>(raw, values, [](uint64_t bits) { return static_cast<int64_t>(bits); });
    case DType::kInt32:
      return read<4>(raw, values, [](uint64_t bits) { return static_cast<int32_t>(bits); });
    case DType::kInt16:
      return read<2>(raw, values, [](uint64_t bits) { return static_cast<int16_t>(bits); });
    case DType::kInt8:
      return read<1>(raw, values, [](uint64_t bits) { return static_cast<int8_t>(bits); });
    case DType::kUInt8:
      return read<1>(raw, values, [](uint64_t bits) { return static_cast<uint8_t>(bits); });
    case DType::kBool:
      return read<1>(raw, values, [](uint64_t bits) { return bits != 0 ? 1 : 0; });
  }
}

// Element i becomes values[i]: floats rounded to nearest even, integers cut to their low bits, a
// float made an integer cut to its low bits too, so that -1.f is 255 in uint8 as it is on CPUs.
template <typename C, int kWidth, int kVectors>
__device__ __forceinline__ void to_raw(const C (&values)[kWidth * kVectors], DType dtype,
                                       RawElems<kWidth> (&raw)[kVectors]) {
  using elements::write;
  const auto low_bits = [](C value) { return static_cast<uint64_t>(static_cast<int64_t>(value)); };
  switch (dtype) {
    case DType::kFloat16:
      return write<2>(values, raw, [](C value) {
        return __half_as_ushort(__float2half_rn(static_cast<float>(value)));
      });
    case DType::kBFloat16:
      return write<2>(values, raw, [](C value) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)));
      });
    case DType::kFloat32:
      return write<4>(values, raw,
                      [](C value) { return __float_as_uint(static_cast<float>(value)); });
    case DType::kFloat64:
      return write<8>(values, raw, [](C value) {
        return static_cast<uint64_t>(__double_as_longlong(static_cast<double>(value)));
      });
    case DType::kInt64:
      return write<8>(values, raw, low_bits);
    case DType::kInt32:
      return write<4>(values, raw, low_bits);
    case DType::kInt16:
      return write<2>(values, raw, low_bits);
    case DType::kInt8:
    case DType::kUInt8:
      return write<1>(values, raw, low_bits);
    case DType::kBool:
      return write<1>(values, raw, [](C value) { return value != static_cast<C>(0) ? 1 : 0; });
  }
}

// On the host: a number as an element of `dtype`, in the low bytes.
inline uint64_t bits_of(const Number& number, DType dtype) {
  uint64_t bits = 0;
  const auto keep = [&bits](const auto& value) { memcpy(&bits, &value, sizeof(value)); };
  switch (dtype) {
    case DType::kFloat16:
      keep(__float2half_rn(static_cast<float>(number.as_double)));
      break;
    case DType::kBFloat16:
      keep(__float2bfloat16_rn(static_cast<float>(number.as_double)));
      break;
    case DType::kFloat32:
      keep(static_cast<float>(number.as_double));
      break;
    case DType::kFloat64:
      keep(number.as_double);
      break;
    case DType::kBool:
      bits = number.as_double != 0 ? 1 : 0;
      break;
    default:
      keep(number.as_int);  // the low bytes of two's complement
  }
  return bits;
}

// One element, by its own load and store.
template <typename C>
__device__ __forceinline__ C load_element(const char* from, DType dtype, int n_bytes) {
  RawElems<1> raw[1];
  raw[0].load(from, n_bytes);
  C value[1];
  from_raw(raw, dtype, value);
  return value[0];
}

template <typename C>
__device__ __forceinline__ void store_element(char* to, DType dtype, int n_bytes, C value) {
  const C values[1] = {value};
  RawElems<1> raw[1];
  to_raw(values, dtype, raw);
  raw[0].store(to, n_bytes);
}

}  // namespace cuda_int4
