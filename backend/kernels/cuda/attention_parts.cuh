// What the kernels of attention share on the device: masks as bits.
#pragma once

#include "attention.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

constexpr float kLog2E = 1.4426950408889634f;

// softcap * tanh(score / softcap), off by at most 2e-7 * softcap (the instruction for tanh: 5e-4).
__device__ __forceinline__ float soft_capped(float score, float softcap) {
  const float e2x = ex2_approx(score * (2.f * kLog2E / softcap));
  return softcap - __fdividef(2.f * softcap, 1.f + e2x);
}

// Key 0 of the mask of row (b, h, s); nullptr without a mask.
template <typename T>
__device__ __forceinline__ const void* find_mask_row(const AttentionKernelArgs& p, int64_t b,
                                                     int64_t h, int64_t s) {
  if (p.mask == nullptr) return nullptr;
  const int64_t at = b * p.mask_strides[0] + h * p.mask_strides[1] + s * p.mask_strides[2];
  if (p.mask_is_bool) return static_cast<const uint8_t*>(p.mask) + at;
  return static_cast<const T*>(p.mask) + at;
}

// 16 bytes of bool as 16 bits, the first lowest.
__device__ __forceinline__ uint32_t bits_of_bools(const uint4& bools) {
  const uint32_t words[4] = {bools.x, bools.y, bools.z, bools.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t ones = __vcmpne4(words[i], 0) & 0x01010101u;
    bits |= (ones * 0x10204080u >> 28) << (4 * i);  // byte j to bit 28 + j
  }
  return bits;
}

struct KeyRange {  // the keys begin .. end - 1
  int64_t begin, end;
};

// What query s of b sees as far as its position says.
__device__ __forceinline__ KeyRange key_range(const AttentionKernelArgs& p, int64_t b, int64_t s) {
  if (p.input_pos == nullptr) return {0, p.is_causal && s + 1 < p.T ? s + 1 : p.T};
  const int64_t at = b * p.pos_stride + s;
  const int64_t pos = p.pos_is_int64 ? static_cast<const int64_t*>(p.input_pos)[at]
                                     : static_cast<const int32_t*>(p.input_pos)[at];
  if (pos < 0) return {0, 0};
  const int64_t begin = p.window > 0 && pos >= p.window ? pos - p.window + 1 : 0;
  return {begin < p.T ? begin : p.T, pos < p.T ? pos + 1 : p.T};
}

// Row (b, h, s) of y by its number.
template <typename T>
__device__ __forceinline__ T* find_y_row(const AttentionKernelArgs& p, int64_t row) {
  const int64_t s = row % p.S, h = row / p.S % p.Hq, b = row / p.S / p.Hq;
  return static_cast<T*>(p.y) + b * p.y_strides[0] + h * p.y_strides[1] + s * p.y_strides[2];
}

// Those of `range` among the 32 keys from t0 on, a bit each.
__device__ __forceinline__ uint32_t bits_in_range(const KeyRange& range, int64_t t0) {
  const int64_t begin = range.begin - t0, end = range.end - t0;
  if (end <= 0 || begin >= 32) return 0;
  const uint32_t before_end = end >= 32 ? 0xffffffffu : (1u << end) - 1;
  return begin <= 0 ? before_end : before_end & ~((1u << begin) - 1);
}

// Which of the kKeys (16 or 32) keys from t0 on a row sees, as bits: those in its range, and not
// false or minus infinity in its mask. *adds gets those of them to whose score the mask adds
// something.
template <typename T, int kKeys>
__device__ __forceinline__ uint32_t seen_keys(const AttentionKernelArgs& p, const void* mask_row,
                                              const KeyRange& range, int64_t t0,
                                              uint32_t* adds = nullptr) {
  static_assert(kKeys == 16 || kKeys == 32, "bits of one word");
  const uint32_t all = 0xffffffffu >> (32 - kKeys);
  if (mask_row == nullptr) return bits_in_range(range, t0) & all;
  const int64_t end = range.end;  // with a mask they begin at 0
  if (t0 >= end) return 0;
  const int n_keys = end - t0 < kKeys ? static_cast<int>(end - t0) : kKeys;
  const int64_t stride = p.mask_strides[3];
  uint32_t bits = 0;
  if (p.mask_is_bool) {
    const uint8_t* mask = static_cast<const uint8_t*>(mask_row) + t0 * stride;
    if (stride == 1 && n_keys == kKeys && reinterpret_cast<uintptr_t>(mask) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        bits |= bits_of_bools(reinterpret_cast<const uint4*>(mask)[i]) << (16 * i);
      }
      return bits;
    }
    for (int i = 0; i < n_keys; ++i) bits |= static_cast<uint32_t>(mask[i * stride] != 0) << i;
    return bits;
  }
  constexpr int kVec = kElemsPer16Bytes<T>;
  using Vector = Elems<T, kVec>;
  const T* mask = static_cast<const T*>(mask_row) + t0 * stride;
  uint32_t nonzero = 0;
  const auto look_at = [&](T value, int i) {
    bits |= static_cast<uint32_t>(as_float(value) != -INFINITY) << i;
    nonzero |= static_cast<uint32_t>(as_float(value) != 0.f) << i;
  };
  if (stride == 1 && n_keys == kKeys && reinterpret_cast<uintptr_t>(mask) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kKeys / kVec; ++i) {
      const Vector vector = reinterpret_cast<const Vector*>(mask)[i];
#pragma unroll
      for (int j = 0; j < kVec; ++j) look_at(vector.values[j], i * kVec + j);
    }
  } else {
    for (int i = 0; i < n_keys; ++i) look_at(mask[i * stride], i);
  }
  if (adds != nullptr) *adds = nonzero & bits;
  return bits;
}

}  // namespace cuda_int4
