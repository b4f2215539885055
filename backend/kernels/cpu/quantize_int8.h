// The w4a8 rounding of x: per 32 consecutive k, s_x = max|x| / 127 and a = x / s_x, ties to even.
#pragma once

#include "cpu_kernels.h"
#include "linear_parts.h"

namespace cuda_int4 {
namespace cpu {

struct Int8Group {
  int8_t a[32];  // -127..127
  int32_t sum;   // of a
  float s_x;     // NaN where an x is not finite: it makes y NaN
};

template <class S>
static Int8Group quantize_int8(const LinearJob& job, int64_t m, int64_t k) {
  using F = typename S::F;
  constexpr int kVectors = 32 / S::kLanes;
  alignas(64) float x[32];
  alignas(64) int32_t a[32];
  load_x<S>(job, m, k, k + 32, x);
  F largest = S::zero(), not_finite = S::zero();
  for (int v = 0; v < kVectors; ++v) {
    const F value = S::load(x + v * S::kLanes);
    largest = S::max(largest, S::max(value, S::sub(S::zero(), value)));
    not_finite = S::add(not_finite, S::sub(value, value));  // 0, or NaN
  }
  Int8Group group;
  group.s_x = S::maximum(largest) / 127.f + S::sum(not_finite);
  const bool usable = group.s_x > 0.f;  // neither 0 nor NaN
  for (int v = 0; v < kVectors; ++v) {
    const F ratio = S::div(S::load(x + v * S::kLanes), S::set1(group.s_x));
    const F bounded = S::min(S::set1(127.f), S::max(S::set1(-127.f), ratio));
    S::store_i(a + v * S::kLanes, S::to_int(bounded));
  }
  group.sum = 0;
  for (int i = 0; i < 32; ++i) {
    group.a[i] = static_cast<int8_t>(usable ? a[i] : 0);
    group.sum += group.a[i];
  }
  return group;
}

}  // namespace cpu
}  // namespace cuda_int4
