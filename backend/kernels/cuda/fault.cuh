// How a kernel notes a value that it could not use; tensor_view.h DeviceFault.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_view.h"

namespace cuda_int4 {

// What a kernel needs of the ExecutionContext for it.
struct FaultNote {
  DeviceFault* fault;  // nullptr: nobody asks
  uint32_t op_index;
};

inline FaultNote fault_note(const ExecutionContext& context) {
  return {context.fault, context.op_index};
}

constexpr int32_t kIndexOutOfRange = 1;
constexpr int32_t kDivisionByZero = 2;

// The first one of all kernels stays. The fault lies in host memory, where only the threads of the
// GPU are atomic among each other; the host looks when they are done.
__device__ __noinline__ inline void note_fault(const FaultNote& note, int32_t kind, int64_t value,
                                               int64_t limit) {
  if (note.fault == nullptr) return;
  if (atomicCAS(&note.fault->kind, 0, kind) != 0) return;
  note.fault->op_index = note.op_index;
  note.fault->value = value;
  note.fault->limit = limit;
  __threadfence_system();
}

}  // namespace cuda_int4
