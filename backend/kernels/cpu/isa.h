// Which instruction set the CPU kernels use: the best this machine has, found once.
#pragma once

#include "../ops.h"
#include "cpu_kernels.h"

namespace cuda_int4 {
namespace cpu {

// The best of this machine, or the one CUDA_INT4_CPU_ISA names (scalar | avx2 | avx512 |
// avx512bf16) where the machine has it. Read once per process.
const CpuKernels& best_kernels();

// By name; nullptr where this build or this machine does not have it.
const CpuKernels* kernels_for_isa(const char* isa);

// The ops on stated kernels. Arguments have passed the validators.
Status linear_coalesced_on(const CpuKernels& kernels, const LinearArgs& args,
                           const ExecutionContext& context);
// marlin.v1 and marlin24.v1.
Status linear_marlin_on(const CpuKernels& kernels, const LinearArgs& args,
                        const ExecutionContext& context);
Status attention_on(const CpuKernels& kernels, const AttentionArgs& args,
                    const ExecutionContext& context);
Status rms_norm_on(const CpuKernels& kernels, const RmsNormArgs& args,
                   const ExecutionContext& context);
Status silu_on(const CpuKernels& kernels, const SiluArgs& args, const ExecutionContext& context);
Status add_rms_norm_on(const CpuKernels& kernels, const AddRmsNormArgs& args,
                       const ExecutionContext& context);
Status gate_mul_on(const CpuKernels& kernels, const GateMulArgs& args,
                   const ExecutionContext& context);
Status rope_append_on(const CpuKernels& kernels, const RopeAppendArgs& args,
                      const ExecutionContext& context);
uint64_t linear_coalesced_scratch_bytes_on(const CpuKernels& kernels, const LinearArgs& args);
uint64_t linear_marlin_scratch_bytes_on(const CpuKernels& kernels, const LinearArgs& args);

}  // namespace cpu
}  // namespace cuda_int4
