#include "layouts.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "coalesced.h"
#include "marlin.h"

namespace cuda_int4 {

namespace {

// name, version, validator, K, validator of values, {CPU kernels, CUDA kernels}
constexpr Layout kLayouts[] = {
    {"coalesced",
     1,
     validate_coalesced_weight,
     coalesced_K,
     nullptr,
     {{cpu_linear_coalesced_scratch_bytes, cpu_linear_coalesced},
      {cuda_linear_coalesced_scratch_bytes, cuda_linear_coalesced}}},
    {"marlin",
     1,
     validate_marlin_weight,
     marlin_K,
     nullptr,
     {{cpu_linear_marlin_scratch_bytes, cpu_linear_marlin},
      {cuda_linear_marlin_scratch_bytes, cuda_linear_marlin}}},
    {"marlin24",
     1,
     validate_marlin24_weight,
     marlin24_K,
     validate_marlin24_values,
     {{cpu_linear_marlin24_scratch_bytes, cpu_linear_marlin24},
      {cuda_linear_marlin24_scratch_bytes, cuda_linear_marlin24}}},
};

// "coalesced.v1, marlin.v1, ...", for messages.
struct KnownTags {
  KnownTags() {
    size_t length = 0;
    for (const Layout& row : kLayouts) {
      length += static_cast<size_t>(snprintf(text + length, sizeof(text) - length, "%s%s.v%d",
                                             length == 0 ? "" : ", ", row.name, row.version));
    }
  }
  char text[24 * (sizeof(kLayouts) / sizeof(kLayouts[0]))];
};

// Splits "name.vN"; false where the text is not of that form. Versions of more than 6 digits are
// nobody's.
bool parse_tag(const char* tag, size_t* name_length, int* version) {
  const char* dot = strrchr(tag, '.');
  if (dot == nullptr || dot == tag || dot[1] != 'v') return false;
  const char* digits = dot + 2;
  const size_t n_digits = strspn(digits, "0123456789");
  if (n_digits == 0 || n_digits > 6 || digits[n_digits] != '\0') return false;
  *name_length = static_cast<size_t>(dot - tag);
  *version = atoi(digits);
  return true;
}

}  // namespace

const char* weight_name(const LinearArgs& args) {
  return args.name != nullptr && args.name[0] != '\0' ? args.name : "cuda_int4::linear";
}

Status find_layout(const LinearArgs& args, const Layout** layout) {
  const char* name = weight_name(args);
  const char* tag = args.layout_tag;
  if (tag == nullptr || tag[0] == '\0') {
    return error(StatusCode::kIncompatibleLayout,
                 "%.200s: expected a layout tag (%s), got none; pack the weight with "
                 "CudaCoalescedInt4Tensor.from_int4, which writes its tag, or export again",
                 name, KnownTags().text);
  }
  size_t name_length = 0;
  int version = 0;
  if (!parse_tag(tag, &name_length, &version)) {
    return error(StatusCode::kIncompatibleLayout,
                 "%.200s: expected a layout tag of the form name.vN (%s), got \"%.64s\"; export "
                 "the model again",
                 name, KnownTags().text, tag);
  }
  if (name_length == 5 && memcmp(tag, "plain", 5) == 0) {
    return error(StatusCode::kIncompatibleLayout,
                 "%.200s: expected packed weights (%s), got \"%.64s\", torchao's interchange order "
                 "with scales [n_groups, N], which no kernel reads; export through "
                 "CudaInt4Partitioner, or pack with CudaCoalescedInt4Tensor.from_int4",
                 name, KnownTags().text, tag);
  }
  for (const Layout& row : kLayouts) {
    if (strlen(row.name) != name_length || memcmp(row.name, tag, name_length) != 0) continue;
    if (row.version == version) {
      *layout = &row;
      return {};
    }
    if (version < row.version) {
      return error(StatusCode::kIncompatibleLayout,
                   "%.200s: expected layout %s.v%d, got the older \"%.64s\", whose bytes mean "
                   "something else; export the model again with this version",
                   name, row.name, row.version, tag);
    }
    return error(StatusCode::kIncompatibleLayout,
                 "%.200s: expected layout %s.v%d, got the newer \"%.64s\", which this build cannot "
                 "read; update executorch-cuda-int4, or export again with this version",
                 name, row.name, row.version, tag);
  }
  return error(StatusCode::kIncompatibleLayout,
               "%.200s: expected a layout this build knows (%s), got \"%.64s\"; install the "
               "version of executorch-cuda-int4 that wrote it, or export again with this one",
               name, KnownTags().text, tag);
}

}  // namespace cuda_int4
