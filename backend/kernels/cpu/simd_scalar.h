// One lane in the terms of simd_avx2.h and simd_avx512.h: the definition of each operation.
#pragma once

#include <cmath>

#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

struct ScalarSimd {
  static constexpr int kLanes = 1;
  static constexpr bool kSpreadsBFloat = false;
  using F = float;

  static F zero() { return 0.f; }
  static F set1(float value) { return value; }
  template <class T>
  static F load(const T* from) {
    return to_float(*from);
  }
  template <class T>
  static void store(T* to, F value) {
    from_float(value, to);
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F min(F a, F b) { return a < b ? a : b; }  // b where either is NaN
  static F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
  static F round(F a) { return std::nearbyint(a); }
  static F pow2(F n) {  // n integral, -126..127; or NaN, and then anything
    return bits_float(static_cast<uint32_t>(static_cast<int32_t>(n == n ? n : 0.f) + 127) << 23);
  }
  static F select_less(F a, F b, F if_less, F if_not) { return a < b ? if_less : if_not; }
  static float sum(F a) { return a; }
};

}  // namespace cpu
}  // namespace cuda_int4
