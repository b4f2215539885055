// wgmma (sm_90a) of float16 and bfloat16 with b, or both operands, in shared memory in tiles.
//
// Matrix operands lie in shared memory in tiles of 64 columns (128 bytes) with the 128-byte swizzle:
// piece c, of 16 bytes, of row r is at piece c ^ (r % 8). A tile starts at a multiple of 1024 bytes.
#pragma once

#include "ptx.cuh"

namespace cuda_int4 {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A matrix of 16-bit elements at `shared`. Where columns are summed over, tile_bytes does not matter
// and k advances by 32 bytes; where rows are, columns from 64 on are tile_bytes further, in the next
// tile, and k advances by 16 rows, 2048 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared, uint32_t tile_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupBytes = 1024;
  return kSwizzle128 | (kGroupBytes >> 4) << 32 | uint64_t{tile_bytes >> 4} << 16 |
         ((shared & 0x3ffff) >> 4);
}

// Keeps the compiler from moving uses of registers that wgmma reads or writes across this point.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}

#define CUDA_INT4_FRAG(f) "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])

// wgmma_ss: d = a @ b.T (+ d if `adds`), m64 k16; both in shared memory, columns summed over.
// wgmma_rs: d += a @ b; a in registers as for mma.m16n8k16, b in shared memory, rows summed over.
// d[j] is the fragment of columns 8j.., as for mma.m16n8k16.

#define CUDA_INT4_WGMMA_N64(T, TYPE)                                                              \
  __device__ __forceinline__ void wgmma_ss(float (&d)[8][4], uint64_t a, uint64_t b, bool adds,   \
                                           T) {                                                   \
    asm volatile(                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %34, 0; "                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                               \
        " {%0, %1, %2, %3, "                                                                      \
        "%4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "         \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds, 1, 1, "          \
        "0, 0; }"                                                                                 \
        : CUDA_INT4_FRAG(d[0]), CUDA_INT4_FRAG(d[1]), CUDA_INT4_FRAG(d[2]), CUDA_INT4_FRAG(d[3]), \
          CUDA_INT4_FRAG(d[4]), CUDA_INT4_FRAG(d[5]), CUDA_INT4_FRAG(d[6]), CUDA_INT4_FRAG(d[7])  \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                           \
  }                                                                                               \
  __device__ __forceinline__ void wgmma_rs(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,  \
                                           T) {                                                   \
    asm volatile(                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %37, 0; "                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                               \
        " {%0, %1, %2, %3, "                                                                      \
        "%4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "         \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, "          \
        "%36, adds, 1, 1, 1; }"                                                                   \
        : CUDA_INT4_FRAG(d[0]), CUDA_INT4_FRAG(d[1]), CUDA_INT4_FRAG(d[2]), CUDA_INT4_FRAG(d[3]), \
          CUDA_INT4_FRAG(d[4]), CUDA_INT4_FRAG(d[5]), CUDA_INT4_FRAG(d[6]), CUDA_INT4_FRAG(d[7])  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                            \
  }

CUDA_INT4_WGMMA_N64(__half, "f16")
CUDA_INT4_WGMMA_N64(__nv_bfloat16, "bf16")

#define CUDA_INT4_WGMMA_N128(T, TYPE)                                                             \
  __device__ __forceinline__ void wgmma_ss(float (&d)[16][4], uint64_t a, uint64_t b, bool adds,  \
                                           T) {                                                   \
    asm volatile(                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %66, 0; "                                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                              \
        " {%0, %1, %2, %3, "                                                                      \
        "%4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "         \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "             \
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "             \
        "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, "            \
        "adds, 1, 1, 0, 0; }"                                                                     \
        : CUDA_INT4_FRAG(d[0]), CUDA_INT4_FRAG(d[1]), CUDA_INT4_FRAG(d[2]), CUDA_INT4_FRAG(d[3]), \
          CUDA_INT4_FRAG(d[4]), CUDA_INT4_FRAG(d[5]), CUDA_INT4_FRAG(d[6]), CUDA_INT4_FRAG(d[7]), \
          CUDA_INT4_FRAG(d[8]), CUDA_INT4_FRAG(d[9]), CUDA_INT4_FRAG(d[10]),                      \
          CUDA_INT4_FRAG(d[11]), CUDA_INT4_FRAG(d[12]), CUDA_INT4_FRAG(d[13]),                    \
          CUDA_INT4_FRAG(d[14]), CUDA_INT4_FRAG(d[15])                                            \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                           \
  }                                                                                               \
  __device__ __forceinline__ void wgmma_rs(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, \
                                           T) {                                                   \
    asm volatile(                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %69, 0; "                                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                              \
        " {%0, %1, %2, %3, "                                                                      \
        "%4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "         \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "             \
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "             \
        "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, "           \
        "%66, %67}, %68, adds, 1, 1, 1; }"                                                        \
        : CUDA_INT4_FRAG(d[0]), CUDA_INT4_FRAG(d[1]), CUDA_INT4_FRAG(d[2]), CUDA_INT4_FRAG(d[3]), \
          CUDA_INT4_FRAG(d[4]), CUDA_INT4_FRAG(d[5]), CUDA_INT4_FRAG(d[6]), CUDA_INT4_FRAG(d[7]), \
          CUDA_INT4_FRAG(d[8]), CUDA_INT4_FRAG(d[9]), CUDA_INT4_FRAG(d[10]),                      \
          CUDA_INT4_FRAG(d[11]), CUDA_INT4_FRAG(d[12]), CUDA_INT4_FRAG(d[13]),                    \
          CUDA_INT4_FRAG(d[14]), CUDA_INT4_FRAG(d[15])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                            \
  }

CUDA_INT4_WGMMA_N128(__half, "f16")
CUDA_INT4_WGMMA_N128(__nv_bfloat16, "bf16")

#undef CUDA_INT4_WGMMA_N64
#undef CUDA_INT4_WGMMA_N128
#undef CUDA_INT4_FRAG

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace cuda_int4
