// cuda_int4::linear: validation and the way to a kernel, for every layout and device.
#include <cinttypes>
#include <cstring>

#include "checks.h"
#include "layouts.h"
#include "linear_sizes.h"
#include "ops.h"

namespace cuda_int4 {

namespace {

constexpr char kCallCure[] = "fix the call: it disagrees with the weight";

Status check_activation(const LinearArgs& args) {
  const char* activation = args.activation;
  if (activation != nullptr &&
      (strcmp(activation, "none") == 0 || strcmp(activation, "int8") == 0)) {
    return {};
  }
  return error(StatusCode::kInvalidArgument,
               "%.200s: expected activation \"none\" (w4a16) or \"int8\" (w4a8), got \"%.64s\"; "
               "export the model again",
               weight_name(args), activation == nullptr ? "(null)" : activation);
}

Status check_bias(const LinearArgs& args, int64_t N) {
  if (!args.bias.present()) return {};
  const TensorCheck bias{weight_name(args), "bias", "pass a contiguous bias of shape [N]"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(bias, args.bias, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(bias, args.bias));
  CUDA_INT4_RETURN_IF_ERROR(check_shape(bias, args.bias, 1, &N));
  return check_alignment(bias, args.bias, dtype_bytes(args.bias.dtype));
}

// The row of the layout and a weight that fits it.
Status validate_weight(const LinearArgs& args, const Layout** layout) {
  CUDA_INT4_RETURN_IF_ERROR(find_layout(args, layout));
  CUDA_INT4_RETURN_IF_ERROR(check_activation(args));
  CUDA_INT4_RETURN_IF_ERROR((*layout)->validate_weight(args));
  return check_bias(args, linear_N(args));
}

bool is_device(DeviceKind device) {
  return device == DeviceKind::kCpu || device == DeviceKind::kCuda;
}

Status validate_call(const LinearArgs& args, const Layout& layout) {
  const char* name = weight_name(args);
  const int64_t N = linear_N(args), K = layout.K(args);
  int64_t numel = 0;

  const TensorCheck x{name, "x", "pass x as a contiguous float tensor [..., K]"};
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(x, args.x, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(x, args.x));
  if (args.x.ndim < 1 || args.x.sizes[args.x.ndim - 1] != K) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected x [..., K=%" PRId64 "], got %s; %s", name, K,
                 ShapeText(args.x).text, kCallCure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(x, args.x, dtype_bytes(args.x.dtype)));

  const TensorCheck y{name, "y", "allocate y of shape [..., N] and the dtype of x"};
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(y, args.y, &numel));
  int64_t y_shape[kMaxDims];
  for (int d = 0; d < args.x.ndim; ++d) y_shape[d] = args.x.sizes[d];
  y_shape[args.x.ndim - 1] = N;
  CUDA_INT4_RETURN_IF_ERROR(check_shape(y, args.y, args.x.ndim, y_shape));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(y, args.y, dtype_bytes(args.y.dtype)));

  if (args.y.dtype != args.x.dtype) {
    return error(StatusCode::kInvalidArgument, "%.200s: expected y of dtype %s (x's), got %s; %s",
                 name, dtype_name(args.x.dtype), dtype_name(args.y.dtype), y.cure);
  }
  if (args.bias.present() && args.bias.dtype != args.x.dtype) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected bias of dtype %s (x's), got %s; cast one to the other", name,
                 dtype_name(args.x.dtype), dtype_name(args.bias.dtype));
  }
  const TensorView* const views[] = {&args.x,          &args.y,    &args.qdata, &args.scale,
                                     &args.zero_point, &args.meta, &args.bias};
  const char* const parts[] = {"x", "y", "qdata", "scale", "zero_point", "meta", "bias"};
  for (int i = 0; i < 7; ++i) {
    if (!views[i]->present()) continue;
    CUDA_INT4_RETURN_IF_ERROR(
        check_data({name, parts[i], "pass a tensor that owns memory"}, *views[i]));
  }
  return {};
}

}  // namespace

Status validate_linear_weight(const LinearArgs& args) {
  const Layout* layout = nullptr;
  return validate_weight(args, &layout);
}

void linear_weight_sizes(const LinearArgs& args, int64_t* N, int64_t* K) {
  const Layout* layout = nullptr;
  *N = *K = 0;
  if (!find_layout(args, &layout).ok()) return;
  *N = linear_N(args);
  *K = layout->K(args);
}

Status validate_linear_values(const LinearArgs& args) {
  const Layout* layout = nullptr;
  CUDA_INT4_RETURN_IF_ERROR(find_layout(args, &layout));
  return layout->validate_values == nullptr ? Status{} : layout->validate_values(args);
}

Status validate_linear(const LinearArgs& args) {
  const Layout* layout = nullptr;
  CUDA_INT4_RETURN_IF_ERROR(validate_weight(args, &layout));
  return validate_call(args, *layout);
}

uint64_t linear_scratch_bytes(const LinearArgs& args, DeviceKind device) {
  const Layout* layout = nullptr;
  if (!is_device(device) || !find_layout(args, &layout).ok()) return 0;
  return layout->kernels[static_cast<int>(device)].scratch_bytes(args);
}

Status linear(const LinearArgs& args, const ExecutionContext& context) {
  const Layout* layout = nullptr;
  CUDA_INT4_RETURN_IF_ERROR(validate_weight(args, &layout));
  CUDA_INT4_RETURN_IF_ERROR(validate_call(args, *layout));
  if (!is_device(context.device)) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected device 0 (cpu) or 1 (cuda), got %d", weight_name(args),
                 static_cast<int>(context.device));
  }
  if (args.y.nbytes == 0) return {};
  const Layout::Kernels& kernels = layout->kernels[static_cast<int>(context.device)];
  CUDA_INT4_RETURN_IF_ERROR(check_scratch(weight_name(args), context, kernels.scratch_bytes(args)));
  return kernels.linear(args, context);
}

}  // namespace cuda_int4
