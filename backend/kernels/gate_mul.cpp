// cuda_int4::gate_mul: validation, and the kernel of the device.
#include <cmath>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/numeric.h"
#include "cuda/cuda_kernels.h"
#include "gate_functions.h"
#include "ops.h"
#include "parallel_ranges.h"
#include "quantized_activation.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::gate_mul";

}  // namespace

Status validate_gate_mul(const GateMulArgs& args) {
  const TensorCheck x{kOp, "gate_up", "pass gate_up.contiguous() of shape [..., 2 * N]"};
  const TensorCheck y{kOp, "y", "allocate a contiguous y [..., N] of gate_up's dtype"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(x, args.gate_up, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(x, args.gate_up));
  const int ndim = args.gate_up.ndim;
  if (ndim < 1 || args.gate_up.sizes[ndim - 1] % 2 != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected gate_up [..., 2 * N] of gates and as many factors, got %s; %s", kOp,
                 ShapeText(args.gate_up).text, x.cure);
  }
  TensorView halved = args.gate_up;
  halved.sizes[ndim - 1] /= 2;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(y, args.y, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_same_shape(y, args.y, halved));
  if (args.y.dtype != args.gate_up.dtype) {
    return error(StatusCode::kInvalidArgument, "%s: expected y of dtype %s (gate_up's), got %s; %s",
                 kOp, dtype_name(args.gate_up.dtype), dtype_name(args.y.dtype), y.cure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(x, args.gate_up));
  CUDA_INT4_RETURN_IF_ERROR(check_data(y, args.y));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(x, args.gate_up, dtype_bytes(args.gate_up.dtype)));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(y, args.y, dtype_bytes(args.y.dtype)));
  if (gate_function_of(args.activation) == GateFunction::kUnknown) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected activation \"silu\", \"gelu\" or \"gelu_tanh\", got \"%.64s\"; fix "
                 "the call",
                 kOp, args.activation == nullptr ? "" : args.activation);
  }
  return {};
}

namespace cpu {

namespace {

float gelu(float x) { return 0.5f * x * (1.f + std::erf(x * 0.70710678118654752f)); }

float gelu_tanh(float x) {
  constexpr float kScale = 0.79788456080286536f;  // sqrt(2 / pi)
  return 0.5f * x * (1.f + std::tanh(kScale * (x + 0.044715f * x * x * x)));
}

// y[begin .. end): columns `column` .. of one row, whose gates begin at `row`.
template <class T>
void gate_part(const CpuKernels& kernels, GateFunction function, DType dtype, const T* row, T* y,
               int64_t N, int64_t column, int64_t count) {
  const T* gate = row + column;
  const T* up = gate + N;
  if (function == GateFunction::kSilu) {
    kernels.silu({gate, y, dtype}, 0, count);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float value = to_float(gate[i]);
      from_float(function == GateFunction::kGelu ? gelu(value) : gelu_tanh(value), &y[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) from_float(to_float(y[i]) * to_float(up[i]), &y[i]);
}

template <class T>
void gate_range(const CpuKernels& kernels, const GateMulArgs& args, int64_t begin, int64_t end) {
  const GateFunction function = gate_function_of(args.activation);
  const int64_t N = args.y.sizes[args.y.ndim - 1];
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / N, column = i % N, count = smaller(N - column, end - i);
    gate_part(kernels, function, args.y.dtype,
              static_cast<const T*>(args.gate_up.data) + row * 2 * N,
              static_cast<T*>(args.y.data) + i, N, column, count);
    i += count;
  }
}

}  // namespace

Status gate_mul_on(const CpuKernels& kernels, const GateMulArgs& args,
                   const ExecutionContext& context) {
  const int64_t numel = static_cast<int64_t>(args.y.nbytes) / dtype_bytes(args.y.dtype);
  parallel_ranges(context, numel, int64_t{1} << 14, [&](int64_t begin, int64_t end) {
    if (args.y.dtype == DType::kFloat16) {
      gate_range<Half>(kernels, args, begin, end);
    } else if (args.y.dtype == DType::kBFloat16) {
      gate_range<BFloat>(kernels, args, begin, end);
    } else {
      gate_range<float>(kernels, args, begin, end);
    }
  });
  return {};
}

}  // namespace cpu

Status gate_mul(const GateMulArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_gate_mul(args));
  CUDA_INT4_RETURN_IF_ERROR(check_quantized_y(kOp, args.y, context));
  if (context.device == DeviceKind::kCuda) {
    const CudaKernels* kernels = cuda_kernels();
    return kernels == nullptr ? built_without_cuda(kOp) : kernels->math->gate_mul(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::gate_mul_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
