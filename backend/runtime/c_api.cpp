// Each function of c_api.h: catch what could be thrown, call the C++ that does it, return a number.
#include "c_api.h"

#include <cstring>
#include <vector>

#include "c_api_internal.h"
#include "checksum.h"
#include "device.h"
#include "errors.h"
#include "op_table.h"
#include "parallel.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {

/// One eager op: validate, give it scratch, run it.
template <typename Args>
int32_t eager_op(const char* name, const Args* args, int32_t device, void* stream,
                 Status (*validate)(const Args&),
                 uint64_t (*scratch_bytes)(const Args&, DeviceKind),
                 Status (*run)(const Args&, const ExecutionContext&)) noexcept {
  return guarded([&]() -> Error {
    if (args == nullptr) return fail(Error::InvalidArgument, "%s: args is nullptr", name);
    if (device != int32_t(DeviceKind::kCpu) && device != int32_t(DeviceKind::kCuda))
      return fail(Error::InvalidArgument, "%s: expected device 0 (CPU) or 1 (CUDA), got %d", name,
                  device);
    const Error invalid = fail(validate(*args));
    if (invalid != Error::Ok) return invalid;
    const bool on_cpu = device == int32_t(DeviceKind::kCpu);
    ExecutionContext context{static_cast<DeviceKind>(device), stream,
                             on_cpu ? &parallel_for : nullptr, nullptr, 0};
    if (scratch_bytes != nullptr) context.scratch_bytes = scratch_bytes(*args, context.device);
    std::vector<uint8_t> scratch;
    if (context.scratch_bytes > 0 && !on_cpu)
      return fail(
          Error::NotSupported,
          "%s: this kernel needs %llu bytes of device memory beside its tensors, which eager "
          "does not give it; run it from a .pte",
          name, static_cast<unsigned long long>(context.scratch_bytes));
    if (context.scratch_bytes > 0) {
      constexpr uint64_t kAlign = 64;
      scratch.resize(context.scratch_bytes + kAlign);
      const uint64_t misaligned = reinterpret_cast<uintptr_t>(scratch.data()) % kAlign;
      context.scratch = scratch.data() + (kAlign - misaligned) % kAlign;
    }
    return fail(run(*args, context));
  });
}

}  // namespace

const char* cuda_int4_version(void) { return CUDA_INT4_VERSION; }
const char* cuda_int4_last_error(void) { return last_error(); }
void cuda_int4_clear_last_error(void) { clear_last_error(); }
int32_t cuda_int4_cuda_built(void) { return CUDA_INT4_WITH_CUDA; }
int32_t cuda_int4_cuda_available(void) { return CUDA_INT4_WITH_CUDA && cuda_gpu_answers(); }

const char* cuda_int4_supported_ops(const char* device) {
  if (device == nullptr) return nullptr;
  if (std::strcmp(device, "cpu") == 0) return supported_ops(DeviceKind::kCpu).c_str();
  if (std::strcmp(device, "cuda") == 0) return supported_ops(DeviceKind::kCuda).c_str();
  return nullptr;
}

uint32_t cuda_int4_checksum(const void* data, uint64_t nbytes) { return checksum(data, nbytes); }

uint32_t cuda_int4_checksum_continue(uint32_t so_far, const void* data, uint64_t nbytes) {
  return checksum(data, nbytes, so_far);
}

int32_t cuda_int4_linear(const LinearArgs* args, int32_t device, void* stream) {
  return eager_op("cuda_int4::linear", args, device, stream, &validate_linear,
                  &linear_scratch_bytes, &linear);
}

int32_t cuda_int4_attention(const AttentionArgs* args, int32_t device, void* stream) {
  return eager_op("cuda_int4::attention", args, device, stream, &validate_attention,
                  &attention_scratch_bytes, &attention);
}

int32_t cuda_int4_rms_norm(const RmsNormArgs* args, int32_t device, void* stream) {
  return eager_op<RmsNormArgs>("cuda_int4::rms_norm", args, device, stream, &validate_rms_norm,
                               nullptr, &rms_norm);
}

int32_t cuda_int4_silu(const SiluArgs* args, int32_t device, void* stream) {
  return eager_op<SiluArgs>("cuda_int4::silu", args, device, stream, &validate_silu, nullptr,
                            &silu);
}
