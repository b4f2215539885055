// wgmma (sm_90a) with a 2:4 sparse A operand: d += a @ b, a 64 x 32 of which half is kept, in registers,
// b 32 x n in shared memory by its descriptor; asynchronous.
//
// Registers of a are those of the dense m64 k16 instruction, over kept elements. `meta` has the places
// of the kept as for mma.sp.m16n8k32: lanes 2 * kSelector and 2 * kSelector + 1 of each four give those
// of rows g (low half) and g + 8, for the lower and the upper 16 of k.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cuda_int4 {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define CUDA_INT4_WGMMA_SPARSE(T, TYPE)                                                            \
  template <int kSelector>                                                                         \
  __device__ __forceinline__ void wgmma_sparse_m64n32k32(float (&d)[16], const uint32_t (&a)[4],   \
                                                         uint32_t meta, uint64_t b, T) {           \
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32k32.f32." TYPE "." TYPE                    \
                 " {"                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "         \
                 "{%16, %17, %18, %19}, %20, %21, %22, 1, 1, 1, 0;"                                \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),         \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),       \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "n"(kSelector)); \
  }
CUDA_INT4_WGMMA_SPARSE(__half, "f16")
CUDA_INT4_WGMMA_SPARSE(__nv_bfloat16, "bf16")
#undef CUDA_INT4_WGMMA_SPARSE

#define CUDA_INT4_WGMMA_SPARSE(T, TYPE)                                                           \
  template <int kSelector>                                                                        \
  __device__ __forceinline__ void wgmma_sparse_m64n64k32(float (&d)[32], const uint32_t (&a)[4],  \
                                                         uint32_t meta, uint64_t b, T) {          \
    asm volatile(                                                                                 \
        "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32." TYPE "." TYPE                            \
        " {"                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "       \
        "{%32, %33, %34, %35}, %36, %37, %38, 1, 1, 1, 0;"                                        \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "n"(kSelector));         \
  }
CUDA_INT4_WGMMA_SPARSE(__half, "f16")
CUDA_INT4_WGMMA_SPARSE(__nv_bfloat16, "bf16")
#undef CUDA_INT4_WGMMA_SPARSE

#define CUDA_INT4_WGMMA_SPARSE(T, TYPE)                                                           \
  template <int kSelector>                                                                        \
  __device__ __forceinline__ void wgmma_sparse_m64n128k32(float (&d)[64], const uint32_t (&a)[4], \
                                                          uint32_t meta, uint64_t b, T) {         \
    asm volatile(                                                                                 \
        "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." TYPE "." TYPE                           \
        " {"                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
        "{%64, %65, %66, %67}, %68, %69, %70, 1, 1, 1, 0;"                                        \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),           \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),           \
          "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),           \
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),           \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),           \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),           \
          "+f"(d[62]), "+f"(d[63])                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "n"(kSelector));         \
  }
CUDA_INT4_WGMMA_SPARSE(__half, "f16")
CUDA_INT4_WGMMA_SPARSE(__nv_bfloat16, "bf16")
#undef CUDA_INT4_WGMMA_SPARSE

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace cuda_int4
