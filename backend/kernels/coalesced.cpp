#include "coalesced.h"

#include <cinttypes>

#include "layouts.h"
#include "weight_parts.h"

namespace cuda_int4 {

int64_t coalesced_K(const LinearArgs& args) { return 2 * args.qdata.sizes[1]; }

Status validate_coalesced_weight(const LinearArgs& args) {
  const char* name = weight_name(args);
  constexpr char kShape[] = "[N, K/2]";
  CUDA_INT4_RETURN_IF_ERROR(check_qdata(args, kShape));
  if (args.qdata.sizes[1] > kMaxDim / 2) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata %s with N and K in 1..%" PRId64 ", got %s; %s", name,
                 kShape, kMaxDim, ShapeText(args.qdata).text, kWeightCure);
  }
  const int64_t N = args.qdata.sizes[0], K = coalesced_K(args);
  if (args.out_features != 0 && args.out_features != N) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected out_features %" PRId64
                 ", the rows of qdata, or none, got %" PRId64 "; %s",
                 name, N, args.out_features, kWeightCure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_group_size(args, K));
  const int64_t group_shape[2] = {N, K / args.group_size};
  CUDA_INT4_RETURN_IF_ERROR(check_scale(args, group_shape, 0));
  CUDA_INT4_RETURN_IF_ERROR(check_zero_point(args, group_shape, 0));
  if (args.meta.present()) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected no meta (coalesced.v1 is dense), got %s; %s", name,
                 ShapeText(args.meta).text, kWeightCure);
  }
  return {};
}

}  // namespace cuda_int4
