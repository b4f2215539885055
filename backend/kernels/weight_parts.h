// Checks on the parts of an int4 weight that the layouts share.
#pragma once

#include "checks.h"
#include "ops.h"

namespace cuda_int4 {

constexpr char kWeightCure[] =
    "the weight is damaged or was packed for something else, pack it again";
constexpr char kAlignmentCure[] =
    "copy the tensor (.clone()) so that it starts on its own allocation";

// uint8, contiguous and of two dimensions, neither of them 0. `shape` words what they are.
Status check_qdata(const LinearArgs& args, const char* shape);
Status check_group_size(const LinearArgs& args, int64_t K);
// A part of [n_groups, N] or [N, n_groups]: float kind, contiguous, of that shape; at an address
// that is a multiple of `alignment` bytes, 0: of an element's size.
Status check_scale(const LinearArgs& args, const int64_t (&shape)[2], int64_t alignment);
// Absent, or as scale is.
Status check_zero_point(const LinearArgs& args, const int64_t (&shape)[2], int64_t alignment);

}  // namespace cuda_int4
