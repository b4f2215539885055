// For tests: one op (or a weight's validator) on a stated instruction set, its work cut into the
// smallest ranges the grain allows and run last range first, so that a result that depends on the
// cuts shows.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../checks.h"
#include "isa.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

namespace {

void smallest_ranges_last_first(int64_t n, int64_t grain,
                                void (*fn)(void* context, int64_t begin, int64_t end),
                                void* context) {
  const int64_t step = larger(grain, 1);
  for (int64_t range = ceil_div(n, step) - 1; range >= 0; --range) {
    fn(context, range * step, smaller(n, (range + 1) * step));
  }
}

Status run(const char* op, const void* args, const CpuKernels& kernels) {
  ExecutionContext context = {DeviceKind::kCpu, nullptr, smallest_ranges_last_first, nullptr, 0};
  if (strcmp(op, "linear") == 0) {
    const LinearArgs& linear_args = *static_cast<const LinearArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_linear(linear_args));
    const bool is_coalesced = strcmp(linear_args.layout_tag, "coalesced.v1") == 0;
    const uint64_t needed_bytes = is_coalesced
                                      ? linear_coalesced_scratch_bytes_on(kernels, linear_args)
                                      : linear_marlin_scratch_bytes_on(kernels, linear_args);
    const std::unique_ptr<void, void (*)(void*)> scratch(
        aligned_alloc(64, (needed_bytes + (needed_bytes == 0) + 63) / 64 * 64), free);
    if (scratch == nullptr) return error(StatusCode::kOutOfMemory, "run_with_isa: out of memory");
    context.scratch = scratch.get();
    context.scratch_bytes = needed_bytes;
    if (linear_args.y.nbytes == 0) return {};
    return is_coalesced ? linear_coalesced_on(kernels, linear_args, context)
                        : linear_marlin_on(kernels, linear_args, context);
  }
  if (strcmp(op, "linear_weight") == 0) {
    return validate_linear_weight(*static_cast<const LinearArgs*>(args));
  }
  if (strcmp(op, "linear_values") == 0) {
    const LinearArgs& weight_args = *static_cast<const LinearArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_linear_weight(weight_args));
    return validate_linear_values(weight_args);
  }
  if (strcmp(op, "attention") == 0) {
    const AttentionArgs& attention_args = *static_cast<const AttentionArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_attention(attention_args));
    return attention_on(kernels, attention_args, context);
  }
  if (strcmp(op, "rms_norm") == 0) {
    const RmsNormArgs& norm_args = *static_cast<const RmsNormArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_rms_norm(norm_args));
    return rms_norm_on(kernels, norm_args, context);
  }
  if (strcmp(op, "silu") == 0) {
    const SiluArgs& silu_args = *static_cast<const SiluArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_silu(silu_args));
    return silu_on(kernels, silu_args, context);
  }
  if (strcmp(op, "add_rms_norm") == 0) {
    const AddRmsNormArgs& norm_args = *static_cast<const AddRmsNormArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_add_rms_norm(norm_args));
    return add_rms_norm_on(kernels, norm_args, context);
  }
  if (strcmp(op, "gate_mul") == 0) {
    const GateMulArgs& gate_args = *static_cast<const GateMulArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_gate_mul(gate_args));
    return gate_mul_on(kernels, gate_args, context);
  }
  if (strcmp(op, "rope_append") == 0) {
    const RopeAppendArgs& rope_args = *static_cast<const RopeAppendArgs*>(args);
    CUDA_INT4_RETURN_IF_ERROR(validate_rope_append(rope_args));
    return rope_append_on(kernels, rope_args, context);
  }
  return error(StatusCode::kInvalidArgument,
               "run_with_isa: expected linear, linear_weight, linear_values, attention, rms_norm, "
               "silu, add_rms_norm, gate_mul or rope_append, got \"%.64s\"; fix the test",
               op);
}

}  // namespace

}  // namespace cpu
}  // namespace cuda_int4

// args: the op's argument struct. Returns the StatusCode, and the message in *status.
// kUnsupported: this machine or build does not have `isa`.
extern "C" __attribute__((visibility("default"))) int32_t cuda_int4_run_with_isa(
    const char* op, const void* args, const char* isa, cuda_int4::Status* status) {
  using namespace cuda_int4;
  const cpu::CpuKernels* kernels = cpu::kernels_for_isa(isa);
  *status = kernels == nullptr
                ? error(StatusCode::kUnsupported, "run_with_isa: no \"%.64s\" on this machine", isa)
                : cpu::run(op, args, *kernels);
  return static_cast<int32_t>(status->code);
}
