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

// Which of the kKeys (16 or 32) keys from t0 on the row with query position s sees, as bits: those
// in range, not after s if causal, and not false or minus infinity in the mask. *adds gets those of
// them to whose score the mask adds something.
template <typename T, int kKeys>
__device__ __forceinline__ uint32_t seen_keys(const AttentionKernelArgs& p, const void* mask_row,
                                              int64_t s, int64_t t0, uint32_t* adds = nullptr) {
  static_assert(kKeys == 16 || kKeys == 32, "bits of one word");
  const int64_t end = p.is_causal && s + 1 < p.T ? s + 1 : p.T;
  if (t0 >= end) return 0;
  const int n_keys = end - t0 < kKeys ? static_cast<int>(end - t0) : kKeys;
  const uint32_t in_range = 0xffffffffu >> (32 - n_keys);
  if (mask_row == nullptr) return in_range;
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
