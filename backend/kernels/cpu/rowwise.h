// rms_norm and silu for one instruction set S (simd_*.h).
//
//   rms_norm  y = x / sqrt(mean(x^2) + eps) * weight per row of D; fp32 sum in S::kLanes parts
//   silu      y = x / (1 + exp(-x)) per element
//
// Numerics: float32 throughout, one rounding at the store.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu_kernels.h"
#include "simd_math.h"

namespace cuda_int4 {
namespace cpu {

// Calls f with a null pointer of the C++ type that dtype stands for.
template <class Function>
static inline void with_type(DType dtype, Function f) {
  if (dtype == DType::kFloat16) {
    f(static_cast<Half*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class S, class T, class W>
static void rms_norm_rows(const RmsNormJob& job, int64_t row_begin, int64_t row_end) {
  using F = typename S::F;
  const int64_t D = job.D;
  const W* weight = static_cast<const W*>(job.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * D;
    T* y = static_cast<T*>(job.y) + row * D;
    F squares[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    int part = 0;
    for (int64_t d = 0; d < D; d += S::kLanes, part = (part + 1) % 4) {
      const F value = load_partial<S>(x + d, D - d);
      squares[part] = S::fma(value, value, squares[part]);
    }
    const float square_sum =
        S::sum(S::add(S::add(squares[0], squares[1]), S::add(squares[2], squares[3])));
    const F factor = S::set1(1.f / std::sqrt(square_sum / static_cast<float>(D) + job.eps));
    for (int64_t d = 0; d < D; d += S::kLanes) {
      F value = S::mul(load_partial<S>(x + d, D - d), factor);
      if (weight != nullptr) value = S::mul(value, load_partial<S>(weight + d, D - d));
      store_partial<S>(y + d, value, D - d);
    }
  }
}

template <class S>
static void rms_norm(const RmsNormJob& job, int64_t row_begin, int64_t row_end) {
  with_type(job.dtype, [&](auto* x) {
    with_type(job.weight_dtype, [&](auto* weight) {
      using T = std::remove_pointer_t<decltype(x)>;
      using W = std::remove_pointer_t<decltype(weight)>;
      rms_norm_rows<S, T, W>(job, row_begin, row_end);
    });
  });
}

template <class S>
static void silu(const SiluJob& job, int64_t begin, int64_t end) {
  using F = typename S::F;
  with_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(job.x);
    T* y = static_cast<T*>(job.y);
    for (int64_t i = begin; i < end; i += S::kLanes) {
      const F value = load_partial<S>(x + i, end - i);
      const F denominator = S::add(S::set1(1.f), exp<S>(S::sub(S::zero(), value)));
      store_partial<S>(y + i, S::div(value, denominator), end - i);
    }
  });
}

}  // namespace cpu
}  // namespace cuda_int4
