// What is the same for every instruction set: partial loads and stores, exp.
#pragma once

#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

// The first `count` elements, the other lanes 0. count <= kLanes.
template <class S, class T>
static inline typename S::F load_partial(const T* from, int64_t count) {
  if (count >= S::kLanes) return S::load(from);
  T elems[S::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) elems[i] = from[i];
  return S::load(elems);
}

template <class S, class T>
static inline void store_partial(T* to, typename S::F value, int64_t count) {
  if (count >= S::kLanes) {
    S::store(to, value);
    return;
  }
  T elems[S::kLanes];
  S::store(elems, value);
  for (int64_t i = 0; i < count; ++i) to[i] = elems[i];
}

// e^x to about 1 ulp: x = n ln2 + r with |r| <= ln2 / 2, Taylor to r^7. Below -87.3 (where float32
// goes subnormal) 0, above 88.7 infinity, NaN stays NaN.
template <class S>
static inline typename S::F exp(typename S::F x) {
  using F = typename S::F;
  const F low = S::set1(-87.33654f), high = S::set1(88.72283f);
  const F bounded = S::max(low, S::min(high, x));
  // At most 127: 2^128 is no float, and x up to 88.72 leaves r at most 0.7 there.
  const F n = S::min(S::set1(127.f), S::round(S::mul(bounded, S::set1(1.44269504f))));
  const F r = S::fma(n, S::set1(2.12194440e-4f), S::fma(n, S::set1(-0.693359375f), bounded));
  F p = S::set1(1.f / 5040);
  p = S::fma(p, r, S::set1(1.f / 720));
  p = S::fma(p, r, S::set1(1.f / 120));
  p = S::fma(p, r, S::set1(1.f / 24));
  p = S::fma(p, r, S::set1(1.f / 6));
  p = S::fma(p, r, S::set1(0.5f));
  p = S::fma(p, r, S::set1(1.f));
  p = S::fma(p, r, S::set1(1.f));
  const F value = S::mul(p, S::pow2(n));
  const F not_small = S::select_less(x, low, S::zero(), value);
  return S::select_less(high, x, S::set1(bits_float(0x7f800000u)), not_small);
}

}  // namespace cpu
}  // namespace cuda_int4
