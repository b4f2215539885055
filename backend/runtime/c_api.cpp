// Each function of c_api.h: catch what could be thrown, call the C++ that does it, return a number.
#include "c_api.h"

#include <cstring>
#include <vector>

#include "../kernels/checks.h"
#include "c_api_internal.h"
#include "checksum.h"
#include "device.h"
#include "errors.h"
#include "op_table.h"
#include "parallel.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {

template <typename Args>
Error check_call(const char* name, const Args* args, int32_t device) {
  if (args == nullptr) return fail(Error::InvalidArgument, "%s: args is nullptr", name);
  if (device != int32_t(DeviceKind::kCpu) && device != int32_t(DeviceKind::kCuda))
    return fail(Error::InvalidArgument, "%s: expected device 0 (CPU) or 1 (CUDA), got %d", name,
                device);
  return Error::Ok;
}

/// An op that needs no scratch; `run` validates.
template <typename Args>
int32_t eager_op(const char* name, const Args* args, int32_t device, void* stream,
                 Status (*run)(const Args&, const ExecutionContext&),
                 void* quantized_y = nullptr) noexcept {
  return guarded([&]() -> Error {
    const Error invalid = check_call(name, args, device);
    if (invalid != Error::Ok) return invalid;
    const bool on_cpu = device == int32_t(DeviceKind::kCpu);
    ExecutionContext context{static_cast<DeviceKind>(device), stream,
                             on_cpu ? &parallel_for : nullptr, nullptr, 0};
    context.quantized_y = quantized_y;
    return fail(run(*args, context));
  });
}

/// The functions of an op that needs scratch.
template <typename Args>
struct ScratchOp {
  const char* name;
  Status (*validate)(const Args&);
  uint64_t (*scratch_bytes)(const Args&, DeviceKind);
  Status (*run)(const Args&, const ExecutionContext&);
};

template <typename Args>
int32_t eager_scratch_bytes(const ScratchOp<Args>& op, const Args* args, int32_t device,
                            uint64_t* nbytes) noexcept {
  return guarded([&]() -> Error {
    Error invalid = check_call(op.name, args, device);
    if (invalid == Error::Ok && nbytes == nullptr)
      invalid = fail(Error::InvalidArgument, "%s: nbytes is nullptr", op.name);
    if (invalid == Error::Ok) invalid = fail(op.validate(*args));
    if (invalid == Error::Ok) *nbytes = op.scratch_bytes(*args, static_cast<DeviceKind>(device));
    return invalid;
  });
}

/// `run` validates, and refuses scratch that is too small.
template <typename Args>
int32_t eager_op(const ScratchOp<Args>& op, const Args* args, int32_t device, void* stream,
                 void* scratch, uint64_t scratch_bytes, const void* quantized_x = nullptr,
                 bool constant_weights = false) noexcept {
  return guarded([&]() -> Error {
    Error invalid = check_call(op.name, args, device);
    if (invalid != Error::Ok) return invalid;
    const bool on_cpu = device == int32_t(DeviceKind::kCpu);
    ExecutionContext context{static_cast<DeviceKind>(device), stream,
                             on_cpu ? &parallel_for : nullptr, scratch, scratch_bytes};
    context.quantized_x = quantized_x;
    context.constant_weights = constant_weights;
    std::vector<uint8_t> own;
    if (on_cpu && scratch == nullptr) {
      invalid = fail(op.validate(*args));
      if (invalid != Error::Ok) return invalid;
      constexpr uint64_t kAlign = 64;
      context.scratch_bytes = op.scratch_bytes(*args, context.device);
      own.resize(context.scratch_bytes == 0 ? 0 : context.scratch_bytes + kAlign);
      const uint64_t misaligned = reinterpret_cast<uintptr_t>(own.data()) % kAlign;
      context.scratch = own.data() + (kAlign - misaligned) % kAlign;
    }
    return fail(op.run(*args, context));
  });
}

constexpr ScratchOp<LinearArgs> kLinear = {"cuda_int4::linear", &validate_linear,
                                           &linear_scratch_bytes, &linear};
constexpr ScratchOp<AttentionArgs> kAttention = {"cuda_int4::attention", &validate_attention,
                                                 &attention_scratch_bytes, &attention};

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

int32_t cuda_int4_linear(const LinearArgs* args, int32_t device, void* stream, void* scratch,
                         uint64_t scratch_bytes, const void* quantized_x) {
  return eager_op(kLinear, args, device, stream, scratch, scratch_bytes, quantized_x);
}

int32_t cuda_int4_linear_of_constants(const LinearArgs* args, void* stream, void* scratch,
                                      uint64_t scratch_bytes, const void* quantized_x) {
  return eager_op(kLinear, args, int32_t(DeviceKind::kCuda), stream, scratch, scratch_bytes,
                  quantized_x, true);
}

int32_t cuda_int4_linear_scratch_bytes(const LinearArgs* args, int32_t device, uint64_t* nbytes) {
  return eager_scratch_bytes(kLinear, args, device, nbytes);
}

int32_t cuda_int4_quantize_activation(const TensorView* x, void* stream, void* to) {
  return guarded([&]() -> Error {
    if (x == nullptr || to == nullptr)
      return fail(Error::InvalidArgument, "cuda_int4::quantize_activation: %s is nullptr",
                  x == nullptr ? "x" : "to");
    ExecutionContext context{};
    context.device = DeviceKind::kCuda;
    context.stream = stream;
    return fail(quantize_activation(*x, to, context));
  });
}

uint64_t cuda_int4_quantized_activation_bytes(int64_t M, int64_t K) {
  return M < 0 || K < 0 || M > kMaxDim || K > kMaxDim ? 0 : quantized_activation_bytes(M, K);
}

int32_t cuda_int4_attention(const AttentionArgs* args, int32_t device, void* stream, void* scratch,
                            uint64_t scratch_bytes) {
  return eager_op(kAttention, args, device, stream, scratch, scratch_bytes);
}

int32_t cuda_int4_attention_scratch_bytes(const AttentionArgs* args, int32_t device,
                                          uint64_t* nbytes) {
  return eager_scratch_bytes(kAttention, args, device, nbytes);
}

int32_t cuda_int4_rms_norm(const RmsNormArgs* args, int32_t device, void* stream,
                           void* quantized_y) {
  return eager_op("cuda_int4::rms_norm", args, device, stream, &rms_norm, quantized_y);
}

int32_t cuda_int4_silu(const SiluArgs* args, int32_t device, void* stream) {
  return eager_op("cuda_int4::silu", args, device, stream, &silu);
}

int32_t cuda_int4_add_rms_norm(const AddRmsNormArgs* args, int32_t device, void* stream,
                               void* quantized_y) {
  return eager_op("cuda_int4::add_rms_norm", args, device, stream, &add_rms_norm, quantized_y);
}

int32_t cuda_int4_gate_mul(const GateMulArgs* args, int32_t device, void* stream,
                           void* quantized_y) {
  return eager_op("cuda_int4::gate_mul", args, device, stream, &gate_mul, quantized_y);
}

int32_t cuda_int4_rope_append(const RopeAppendArgs* args, int32_t device, void* stream) {
  return eager_op("cuda_int4::rope_append", args, device, stream, &rope_append);
}
