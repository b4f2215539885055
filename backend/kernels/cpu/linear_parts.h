// What every linear kernel of coalesced.v1 shares: group parameters as float32, the store of y.
#pragma once

#include "cpu_kernels.h"
#include "rowwise.h"
#include "simd_math.h"

namespace cuda_int4 {
namespace cpu {

// to[i] = float(from[first + i]) for i < count; the rest of the last vector and one more are 0, so
// that reading a full vector anywhere in the count is defined and finite.
template <class S>
static inline void load_groups(const void* from, DType dtype, int64_t first, int64_t count,
                               float* to) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* values = static_cast<const T*>(from) + first;
    int64_t i = 0;
    for (; i < count; i += S::kLanes) S::store(to + i, load_partial<S>(values + i, count - i));
    S::store(to + i, S::zero());
  });
}

// log2 of a count that is a power of two, or, for one group per row, a shift that always gives 0.
static inline int group_shift(int64_t count, bool one_group) {
  int shift = 0;
  while ((int64_t{1} << shift) < count) ++shift;
  return one_group ? 62 : shift;
}

static inline void store_y(const LinearJob& job, int64_t m, int64_t n, float value) {
  with_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (job.bias != nullptr) value += to_float(static_cast<const T*>(job.bias)[n]);
    from_float(value, static_cast<T*>(job.y) + m * job.y_stride + n);
  });
}

// y[m, n .. n + count) from float32 sums; count <= S::kLanes.
template <class S>
static inline void store_y_vector(const LinearJob& job, int64_t m, int64_t n, int64_t count,
                                  typename S::F value) {
  with_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (job.bias != nullptr) {
      value = S::add(value, load_partial<S>(static_cast<const T*>(job.bias) + n, count));
    }
    store_partial<S>(static_cast<T*>(job.y) + m * job.y_stride + n, value, count);
  });
}

// Row m of x as float32, element k at to[k], for k in [k_begin, k_end).
template <class S>
static inline void load_x(const LinearJob& job, int64_t m, int64_t k_begin, int64_t k_end,
                          float* to) {
  with_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(job.x) + m * job.K;
    for (int64_t k = k_begin; k < k_end; k += S::kLanes) {
      S::store(to + (k - k_begin), load_partial<S>(x + k, k_end - k));
    }
  });
}

}  // namespace cpu
}  // namespace cuda_int4
