// The execution that the calling thread is in: how a kernel, which ExecuTorch calls as a plain
// function, learns of the device and stream of the method it runs for.
//
// DelegateMethod::execute opens an ExecutionScope around the nested method. Nothing outlives it.
#pragma once

#include <executorch/runtime/core/error.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

class SharedActivation;

class ExecutionScope {
 public:
  /// `shared_activation`: of the method that runs, on CUDA.
  explicit ExecutionScope(const ExecutionContext& execution,
                          SharedActivation* shared_activation = nullptr);
  ~ExecutionScope();
  ExecutionScope(const ExecutionScope&) = delete;
  ExecutionScope& operator=(const ExecutionScope&) = delete;

 private:
  ExecutionContext outer_;
  SharedActivation* outer_shared_activation_;
};

/// The instruction of the nested method that runs from now on.
void set_current_instruction(uint32_t index);

/// The stream (cudaStream_t) that kernels queue on from now on.
void set_current_stream(void* stream);

/// Outside a scope: the CPU and its thread pool.
const ExecutionContext& current_execution();
/// nullptr where there is none.
SharedActivation* current_shared_activation();

/// `nbytes` of the method's temporary memory (device memory on CUDA) into execution->scratch; it is
/// the op's until it returns (on CUDA: until what it queued has run). 0 bytes: nothing.
executorch::runtime::Error give_scratch(executorch::runtime::KernelRuntimeContext& context,
                                        uint64_t nbytes, ExecutionContext* execution);

}  // namespace cuda_int4
