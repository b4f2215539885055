// One PTX instruction is one function; sorted by topic. The names are PTX's, shortened.
#pragma once

#include <cstdint>

namespace cuda_int4 {

// ---- integer dots ----

// c + the dot of 4 unsigned bytes of a with 4 signed bytes of b.
__device__ __forceinline__ int32_t dp4a_u8_s8(uint32_t a, uint32_t b, int32_t c) {
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace cuda_int4
