#include "coalesced.h"

#include <cinttypes>

#include "checks.h"
#include "layouts.h"

namespace cuda_int4 {

namespace {

constexpr char kCure[] = "the weight is damaged or was packed for something else, pack it again";
constexpr char kAlignCure[] = "copy the tensor (.clone()) so that it starts on its own allocation";

Status check_group_size(const char* name, int64_t K, int64_t group_size) {
  const bool listed = group_size == 32 || group_size == 64 || group_size == 128 ||
                      group_size == 256 || group_size == K;
  if (!listed) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected group_size 32, 64, 128, 256 or K=%" PRId64 ", got %" PRId64
                 "; quantize with one of these",
                 name, K, group_size);
  }
  if (K % 32 != 0 || K % group_size != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected K %% 32 == 0 and K %% group_size == 0, got K=%" PRId64
                 ", group_size=%" PRId64 "; pick a group_size that divides K, or pad K",
                 name, K, group_size);
  }
  return {};
}

}  // namespace

int64_t linear_M(const LinearArgs& args) {
  int64_t M = 1;
  for (int d = 0; d + 1 < args.x.ndim; ++d) M *= args.x.sizes[d];
  return M;
}

Status validate_coalesced_weight(const LinearArgs& args) {
  const char* name = weight_name(args);
  int64_t numel = 0;

  const TensorCheck qdata{name, "qdata", kCure};
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(qdata, args.qdata, &numel));
  if (args.qdata.dtype != DType::kUInt8) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata of dtype uint8 (codes 0..15), got %s; %s", name,
                 dtype_name(args.qdata.dtype), kCure);
  }
  if (args.qdata.ndim != 2 || numel == 0 || args.qdata.sizes[1] > kMaxDim / 2) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata [N, K/2] with N and K in 1..%" PRId64 ", got %s; %s", name,
                 kMaxDim, ShapeText(args.qdata).text, kCure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_alignment({name, "qdata", kAlignCure}, args.qdata, 16));

  const int64_t N = linear_N(args), K = linear_K(args);
  CUDA_INT4_RETURN_IF_ERROR(check_group_size(name, K, args.group_size));

  const int64_t group_shape[2] = {N, K / args.group_size};
  const TensorCheck scale{name, "scale", kCure};
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(scale, args.scale, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(scale, args.scale));
  CUDA_INT4_RETURN_IF_ERROR(check_shape(scale, args.scale, 2, group_shape));
  CUDA_INT4_RETURN_IF_ERROR(
      check_alignment({name, "scale", kAlignCure}, args.scale, dtype_bytes(args.scale.dtype)));

  if (args.zero_point.present()) {
    const TensorCheck zero_point{name, "zero_point", kCure};
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(zero_point, args.zero_point, &numel));
    if (args.zero_point.dtype != args.scale.dtype && args.zero_point.dtype != DType::kFloat32) {
      return error(StatusCode::kInvalidArgument,
                   "%.200s: expected zero_point of dtype %s (scale's) or float32, got %s; %s", name,
                   dtype_name(args.scale.dtype), dtype_name(args.zero_point.dtype), kCure);
    }
    CUDA_INT4_RETURN_IF_ERROR(check_shape(zero_point, args.zero_point, 2, group_shape));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment({name, "zero_point", kAlignCure}, args.zero_point,
                                              dtype_bytes(args.zero_point.dtype)));
  }
  if (args.meta.present()) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected no meta (coalesced.v1 is dense), got %s; %s", name,
                 ShapeText(args.meta).text, kCure);
  }
  return {};
}

}  // namespace cuda_int4
