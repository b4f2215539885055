#include "execution.h"

#include "device.h"
#include "errors.h"
#include "parallel.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

namespace {

ExecutionContext on_the_cpu() {
  ExecutionContext execution{};
  execution.device = DeviceKind::kCpu;
  execution.parallel_for = &parallel_for;
  return execution;
}

thread_local ExecutionContext current = on_the_cpu();
thread_local SharedActivation* shared_activation = nullptr;

}  // namespace

ExecutionScope::ExecutionScope(const ExecutionContext& execution, SharedActivation* shared)
    : outer_(current), outer_shared_activation_(shared_activation) {
  current = execution;
  shared_activation = shared;
}

ExecutionScope::~ExecutionScope() {
  current = outer_;
  shared_activation = outer_shared_activation_;
}

SharedActivation* current_shared_activation() { return shared_activation; }

void set_current_instruction(uint32_t index) { current.op_index = index; }

void set_current_stream(void* stream) { current.stream = stream; }

const ExecutionContext& current_execution() { return current; }

Error give_scratch(KernelRuntimeContext& context, uint64_t nbytes, ExecutionContext* execution) {
  if (nbytes == 0) return Error::Ok;
  auto scratch = context.allocate_temp(nbytes, kDeviceAlignment);
  if (!scratch.ok())
    return fail(Error::MemoryAllocationFailed, "out of memory for %llu bytes of scratch",
                static_cast<unsigned long long>(nbytes));
  execution->scratch = scratch.get();
  execution->scratch_bytes = nbytes;
  return Error::Ok;
}

}  // namespace cuda_int4
