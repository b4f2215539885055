// The table of int4 layouts this build reads: adding one is a row in layouts.cpp and its files.
//
// A layout tag is "name.vN". The name and version together fix what each byte means; a change of
// either the order or the encoding is a new version, never a reused one.
#pragma once

#include "ops.h"

namespace cuda_int4 {

struct Layout {
  const char* name;
  int version;
  // The weight's parts against each other; data may be null (metadata only).
  Status (*validate_weight)(const LinearArgs& args);
  // K of a weight that is valid; its N: linear_N.
  int64_t (*K)(const LinearArgs& args);
  // The bytes of a valid weight, in host memory; nullptr: kernels take every byte.
  Status (*validate_values)(const LinearArgs& args);
  // Per device, indexed by DeviceKind. The arguments have passed validate_linear.
  struct Kernels {
    uint64_t (*scratch_bytes)(const LinearArgs& args);
    Status (*linear)(const LinearArgs& args, const ExecutionContext& context);
  } kernels[2];
};

// Finds the row of args.layout_tag. Tags that have none (plain.v1, an unknown name, an older or
// newer version, no tag at all) each fail with their own message and kIncompatibleLayout.
Status find_layout(const LinearArgs& args, const Layout** layout);

// The name to put in front of messages about this linear.
const char* weight_name(const LinearArgs& args);

}  // namespace cuda_int4
