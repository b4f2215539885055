#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace cuda_int4 {
namespace cpu {

namespace {

struct IsaRow {
  const CpuKernels* kernels;
  bool (*is_available)();
};

// Worst to best.
const IsaRow kIsas[] = {
    {&kScalarKernels, [] { return true; }},
#if defined(__x86_64__)
    {&kAvx2Kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {&kAvx512Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {&kAvx512Bf16Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
     }},
#endif
};

const CpuKernels& choose() {
  const char* wanted = getenv("CUDA_INT4_CPU_ISA");
  if (wanted != nullptr) {
    const CpuKernels* named = kernels_for_isa(wanted);
    if (named != nullptr) return *named;
  }
  const CpuKernels* best = &kScalarKernels;
  for (const IsaRow& row : kIsas) {
    if (row.is_available()) best = row.kernels;
  }
  return *best;
}

}  // namespace

const CpuKernels* kernels_for_isa(const char* isa) {
  for (const IsaRow& row : kIsas) {
    if (strcmp(row.kernels->isa, isa) == 0) return row.is_available() ? row.kernels : nullptr;
  }
  return nullptr;
}

const CpuKernels& best_kernels() {
  static const CpuKernels& best = choose();
  return best;
}

}  // namespace cpu
}  // namespace cuda_int4
