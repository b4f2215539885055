#include "marlin.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "layouts.h"
#include "weight_parts.h"

namespace cuda_int4 {

namespace {

// qdata, group_size, scale: what both layouts have. K = k_tile * rows of qdata.
Status check_marlin_parts(const LinearArgs& args, const char* tag, int64_t k_tile) {
  const char* name = weight_name(args);
  char shape[64];
  snprintf(shape, sizeof(shape), "[K/%d, 8*Np]", static_cast<int>(k_tile));
  CUDA_INT4_RETURN_IF_ERROR(check_qdata(args, shape));
  const int64_t row_bytes = args.qdata.sizes[1], Np = row_bytes / 8;
  if (row_bytes % (8 * kMarlinTileN) != 0 || args.qdata.sizes[0] > kMaxDim / k_tile) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected qdata %s of %s, Np a multiple of %d and K in 1..%" PRId64
                 ", got %s; %s",
                 name, shape, tag, static_cast<int>(kMarlinTileN), kMaxDim,
                 ShapeText(args.qdata).text, kWeightCure);
  }
  if (args.out_features <= Np - kMarlinTileN || args.out_features > Np) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected out_features in %" PRId64 "..%" PRId64
                 ", as %s pads N to %" PRId64 ", got %" PRId64
                 "; state the N of the weight, without padding, in the call",
                 name, Np - kMarlinTileN + 1, Np, tag, Np, args.out_features);
  }
  const int64_t K = k_tile * args.qdata.sizes[0];
  CUDA_INT4_RETURN_IF_ERROR(check_group_size(args, K));
  return check_scale(args, {K / args.group_size, Np}, 16);
}

// Whether each of the 16 nibbles first | second << 2 of a word has first < second.
bool is_ordered(uint64_t nibbles) {
  const uint64_t first0 = nibbles, first1 = nibbles >> 1, second0 = nibbles >> 2,
                 second1 = nibbles >> 3;
  const uint64_t less = (second1 & ~first1) | (~(second1 ^ first1) & second0 & ~first0);
  constexpr uint64_t kLowest = 0x1111111111111111;
  return (less & kLowest) == kLowest;
}

int meta_of(const uint8_t* meta, int64_t Np, int64_t n, int64_t k) {
  const int64_t word = 2 * Np * (k / 32) + 128 * (n / 64) + 64 * (n / 2 % 2) + 8 * (n % 64 / 8) +
                       4 * (n % 2) + 2 * (k / 16 % 2) + n / 4 % 2;
  uint16_t places;
  memcpy(&places, meta + 2 * word, 2);
  return places >> (4 * (k / 4 % 4)) & 15;
}

}  // namespace

int64_t marlin_K(const LinearArgs& args) { return 16 * args.qdata.sizes[0]; }
int64_t marlin24_K(const LinearArgs& args) { return 32 * args.qdata.sizes[0]; }

Status validate_marlin_weight(const LinearArgs& args) {
  CUDA_INT4_RETURN_IF_ERROR(check_marlin_parts(args, "marlin.v1", 16));
  const int64_t group_shape[2] = {marlin_K(args) / args.group_size, marlin_padded_N(args)};
  CUDA_INT4_RETURN_IF_ERROR(check_zero_point(args, group_shape, 16));
  if (args.meta.present()) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected no meta (marlin.v1 is dense), got %s; %s", weight_name(args),
                 ShapeText(args.meta).text, kWeightCure);
  }
  return {};
}

Status validate_marlin24_weight(const LinearArgs& args) {
  const char* name = weight_name(args);
  CUDA_INT4_RETURN_IF_ERROR(check_marlin_parts(args, "marlin24.v1", 32));
  if (args.zero_point.present()) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected no zero_point (marlin24.v1 is symmetric: what is not kept is 0),"
                 " got %s; %s",
                 name, ShapeText(args.zero_point).text, kWeightCure);
  }
  const TensorCheck meta{name, "meta", kWeightCure};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(meta, args.meta, &numel));
  if (args.meta.dtype != DType::kInt16) {
    return error(StatusCode::kInvalidArgument, "%.200s: expected meta of dtype int16, got %s; %s",
                 name, dtype_name(args.meta.dtype), kWeightCure);
  }
  const int64_t shape[2] = {args.qdata.sizes[0], 2 * marlin_padded_N(args)};
  CUDA_INT4_RETURN_IF_ERROR(check_shape(meta, args.meta, 2, shape));
  return check_alignment({name, "meta", kAlignmentCure}, args.meta, 16);
}

Status validate_marlin24_values(const LinearArgs& args) {
  const uint8_t* meta = static_cast<const uint8_t*>(args.meta.data);
  const uint64_t n_words = args.meta.nbytes / 8;  // rows of meta are 256 bytes or a multiple
  bool ordered = true;
  for (uint64_t i = 0; i < n_words && ordered; ++i) {
    uint64_t nibbles;
    memcpy(&nibbles, meta + 8 * i, 8);
    ordered = is_ordered(nibbles);
  }
  if (ordered) return {};
  const int64_t Np = marlin_padded_N(args), K = marlin24_K(args);
  for (int64_t n = 0; n < Np; ++n) {
    for (int64_t k = 0; k < K; k += 4) {
      const int first = meta_of(meta, Np, n, k) & 3, second = meta_of(meta, Np, n, k) >> 2;
      if (first < second) continue;
      return error(
          StatusCode::kInvalidArgument,
          "%.200s: expected meta to name two places in order, got %d and %d for row %" PRId64
          "%s, columns %" PRId64 "..%" PRId64 "; %s",
          weight_name(args), first, second, n, n < args.out_features ? "" : " (padding)", k, k + 3,
          kWeightCure);
    }
  }
  return {};
}

}  // namespace cuda_int4
