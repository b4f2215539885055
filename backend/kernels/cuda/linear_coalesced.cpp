// cuda_int4::linear on coalesced.v1 on CUDA: what the table has, or why not.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "cuda_kernels.h"

namespace cuda_int4 {

uint64_t cuda_linear_coalesced_scratch_bytes(const LinearArgs&) { return 0; }

Status cuda_linear_coalesced(const LinearArgs& args, const ExecutionContext& context) {
  const CudaKernels* kernels = cuda_kernels();
  if (kernels == nullptr) {
    return error(StatusCode::kUnsupported,
                 "%.200s: expected a library with CUDA kernels, this one was built without nvcc; "
                 "use device cpu, or build again with nvcc on the PATH",
                 weight_name(args));
  }
  if (args.activation[0] == 'i') {
    return error(
        StatusCode::kUnsupported,
        "%.200s: expected activation \"none\" on CUDA, got \"int8\", which runs on the CPU "
        "only; export with activation=\"none\"",
        weight_name(args));
  }
  return kernels->linear_coalesced_w4a16(args, context);
}

}  // namespace cuda_int4
