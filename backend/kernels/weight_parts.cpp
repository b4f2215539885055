#include "weight_parts.h"

#include <cinttypes>

#include "layouts.h"

namespace cuda_int4 {

namespace {

Status check_group_part(const char* name, const char* part, const TensorView& view,
                        const int64_t (&shape)[2], int64_t alignment) {
  CUDA_INT4_RETURN_IF_ERROR(check_shape({name, part, kWeightCure}, view, 2, shape));
  return check_alignment({name, part, kAlignmentCure}, view,
                         alignment > 0 ? alignment : dtype_bytes(view.dtype));
}

}  // namespace

Status check_qdata(const LinearArgs& args, const char* shape) {
  const char* name = weight_name(args);
  const TensorCheck qdata{name, "qdata", kWeightCure};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(qdata, args.qdata, &numel));
  if (args.qdata.dtype != DType::kUInt8) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata of dtype uint8 (codes 0..15), got %s; %s", name,
                 dtype_name(args.qdata.dtype), kWeightCure);
  }
  if (args.qdata.ndim != 2 || numel == 0) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata %s with N and K in 1..%" PRId64 ", got %s; %s", name,
                 shape, kMaxDim, ShapeText(args.qdata).text, kWeightCure);
  }
  return check_alignment({name, "qdata", kAlignmentCure}, args.qdata, 16);
}

Status check_group_size(const LinearArgs& args, int64_t K) {
  const int64_t group_size = args.group_size;
  const bool listed = group_size == 32 || group_size == 64 || group_size == 128 ||
                      group_size == 256 || group_size == K;
  if (!listed) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected group_size 32, 64, 128, 256 or K=%" PRId64 ", got %" PRId64
                 "; quantize with one of these",
                 weight_name(args), K, group_size);
  }
  if (K % 32 != 0 || K % group_size != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected K %% 32 == 0 and K %% group_size == 0, got K=%" PRId64
                 ", group_size=%" PRId64 "; pick a group_size that divides K, or pad K",
                 weight_name(args), K, group_size);
  }
  return {};
}

Status check_scale(const LinearArgs& args, const int64_t (&shape)[2], int64_t alignment) {
  const char* name = weight_name(args);
  const TensorCheck scale{name, "scale", kWeightCure};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(scale, args.scale, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(scale, args.scale));
  return check_group_part(name, "scale", args.scale, shape, alignment);
}

Status check_zero_point(const LinearArgs& args, const int64_t (&shape)[2], int64_t alignment) {
  if (!args.zero_point.present()) return {};
  const char* name = weight_name(args);
  const TensorCheck zero_point{name, "zero_point", kWeightCure};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(zero_point, args.zero_point, &numel));
  if (args.zero_point.dtype != args.scale.dtype && args.zero_point.dtype != DType::kFloat32) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected zero_point of dtype %s (scale's) or float32, got %s; %s", name,
                 dtype_name(args.scale.dtype), dtype_name(args.zero_point.dtype), kWeightCure);
  }
  return check_group_part(name, "zero_point", args.zero_point, shape, alignment);
}

}  // namespace cuda_int4
