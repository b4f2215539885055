// Words of marlin.v1 and marlin24.v1 (kernels/marlin.h) to the weights-as-A operand of tensor cores.
//
// A lane's 16 bytes of a tile of 64 rows and 16 codes along K are four words, and word j is its share
// of one instruction of 16 rows: mma.m16n8k16, a warp's quarter of wgmma.m64k16, or, with the places of
// marlin24.v1, mma.sp.m16n8k32 and wgmma.sp.m64k32. Nibbles 0, 4 | 1, 5 are the two k of registers 0
// and 2, for the instruction's row g = lane / 4; 2, 6 | 3, 7 those of registers 1 and 3, for row g + 8.
#pragma once

#include "w4a16_fragments.cuh"

namespace cuda_int4 {

// Row g (half 0) or g + 8 (half 1) of the instruction that word `word` feeds is this row of the tile.
template <bool kSparse>
__device__ __forceinline__ int marlin_row(int word, int g, int half) {
  return kSparse ? 8 * g + 4 * half + word : 16 * word + 8 * half + g;
}

// Where that row's scale is among the 64 of the tile. is_one_group: a row of the weight is one group.
template <bool kSparse>
__device__ __forceinline__ int marlin_scale_index(int word, int g, int half, bool is_one_group) {
  if (!is_one_group) return 8 * g + 2 * word + half;
  if (kSparse) return marlin_row<true>(word, g, half);
  return 32 * (word / 2) + 8 * (g / 2) + 4 * (word % 2) + 2 * half + g % 2;
}

// The registers of one instruction; both groups are split (group_scale, symmetric_scale).
template <typename T, template <typename> class Group>
__device__ __forceinline__ void fragment_of_marlin_word(uint32_t word, const Group<T>& lower,
                                                        const Group<T>& upper, uint32_t (&a)[4]) {
  uint32_t codes[4];
  magic_of_word(word, codes, T());
  a[0] = scaled_pair<T>(codes[0], lower.minus_low, lower);
  a[2] = scaled_pair<T>(codes[1], lower.minus_high, lower);
  a[1] = scaled_pair<T>(codes[2], upper.minus_low, upper);
  a[3] = scaled_pair<T>(codes[3], upper.minus_high, upper);
}

}  // namespace cuda_int4
