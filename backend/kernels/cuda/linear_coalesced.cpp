// cuda_int4::linear on coalesced.v1 on CUDA: what the table has, or why not.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "cuda_kernels.h"

namespace cuda_int4 {

namespace {

bool is_int8(const LinearArgs& args) { return args.activation[0] == 'i'; }

// More rows of x than the mat-vecs are for, in a dtype that tensor cores take.
bool is_matmul_w4a16(const LinearArgs& args) {
  return !is_int8(args) && linear_M(args) > 16 && args.x.dtype != DType::kFloat32;
}

}  // namespace

uint64_t cuda_linear_coalesced_scratch_bytes(const LinearArgs& args) {
  if (is_int8(args)) return quantized_activation_bytes(linear_M(args), linear_K(args));
  if (cuda_kernels() == nullptr || !is_matmul_w4a16(args)) return 0;
  return cuda_kernels()->matmul_w4a16_scratch_bytes(args);
}

Status cuda_linear_coalesced(const LinearArgs& args, const ExecutionContext& context) {
  const CudaKernels* kernels = cuda_kernels();
  if (kernels == nullptr) return built_without_cuda(weight_name(args));
  if (is_int8(args)) {
    ExecutionContext with_x = context;
    if (context.quantized_x == nullptr) {
      CUDA_INT4_RETURN_IF_ERROR(kernels->quantize_int8(args.x, context.scratch, context));
      with_x.quantized_x = context.scratch;
    }
    return kernels->linear_coalesced_w4a8(args, with_x);
  }
  if (is_matmul_w4a16(args)) return kernels->matmul_w4a16(args, context);
  return kernels->linear_coalesced_w4a16(args, context);
}

}  // namespace cuda_int4
