// The activation of w4a8 linears, quantised once and handed to each of them: quantized_activation.h.
#include "quantized_activation.h"

#include <cinttypes>

#include "checks.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"

namespace cuda_int4 {

namespace {

constexpr char kName[] = "cuda_int4::quantize_activation";

}  // namespace

uint64_t quantized_activation_bytes(int64_t M, int64_t K) {
  const int64_t parameters = K / kQuantizedGroup * quantized_tokens(M);
  return static_cast<uint64_t>(quantized_parameter_offset_bytes(M, K)) +
         static_cast<uint64_t>(parameters) * sizeof(QuantizedParameter);
}

Status check_quantized_y(const char* who, const TensorView& y, const ExecutionContext& context) {
  if (context.quantized_y == nullptr) return {};
  if (context.device != DeviceKind::kCuda) {
    return error(StatusCode::kUnsupported,
                 "%s: expected no memory for y as int8 on the CPU, got some; linear() on the CPU "
                 "quantises x itself",
                 who);
  }
  if (y.sizes[y.ndim - 1] % kQuantizedGroup != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected y [..., K] with K %% %" PRId64
                 " == 0 to write it as int8 too, got %s; "
                 "pad K",
                 who, kQuantizedGroup, ShapeText(y).text);
  }
  if (reinterpret_cast<uintptr_t>(context.quantized_y) % 16 != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected 16-byte aligned memory of quantized_activation_bytes(M, K), got %p",
                 who, context.quantized_y);
  }
  return {};
}

Status quantize_activation(const TensorView& x, void* to, const ExecutionContext& context) {
  const TensorCheck check{kName, "x", "pass x as a contiguous float tensor [..., K]"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(check, x, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(check, x));
  if (x.ndim < 1 || x.sizes[x.ndim - 1] % kQuantizedGroup != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected x [..., K] with K %% %" PRId64 " == 0, got %s; pad K", kName,
                 kQuantizedGroup, ShapeText(x).text);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(check, x, dtype_bytes(x.dtype)));
  CUDA_INT4_RETURN_IF_ERROR(check_data(check, x));
  if (context.device != DeviceKind::kCuda) {
    return error(StatusCode::kUnsupported,
                 "%s: expected device 1 (cuda), got %d; linear() on the CPU quantises x itself",
                 kName, static_cast<int>(context.device));
  }
  if (cuda_kernels() == nullptr) return built_without_cuda(kName);
  if (numel == 0) return {};
  if (to == nullptr || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected 16-byte aligned memory of quantized_activation_bytes(M, K), got %p",
                 kName, to);
  }
  return cuda_kernels()->quantize_int8(x, to, context);
}

}  // namespace cuda_int4
