// cuda_int4::linear on marlin.v1 on CUDA.
#include "../checks.h"
#include "../layouts.h"
#include "../marlin.h"

namespace cuda_int4 {

uint64_t cuda_linear_marlin_scratch_bytes(const LinearArgs&) { return 0; }

Status cuda_linear_marlin(const LinearArgs& args, const ExecutionContext&) {
  return error(StatusCode::kUnsupported,
               "%.200s: expected a layout with CUDA kernels in this build (coalesced.v1), got "
               "marlin.v1; use device cpu, or pack the weight as coalesced.v1",
               weight_name(args));
}

}  // namespace cuda_int4
