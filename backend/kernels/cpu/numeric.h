// float16 and bfloat16 as bits, and their exact conversions in plain C++.
//
// Everything here has internal linkage: the files of each instruction set compile their own copy,
// so that the linker cannot hand AVX-512 code to a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_int4 {
namespace cpu {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat value) { return bits_float(uint32_t{value.bits} << 16); }

static inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));  // Inf, NaN
  // The float with the same exponent field is 2^-112 times the value; subnormals come out right too.
  const float unsigned_value = bits_float(magnitude << 13) * bits_float(0x77800000u);  // 2^112
  return bits_float(sign | float_bits(unsigned_value));
}

// Round to nearest, ties to even; NaN stays NaN.
static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, BFloat* out) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16);
}

static inline void from_float(float value, Half* out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias the exponent, round 13 bits away
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cpu
}  // namespace cuda_int4
