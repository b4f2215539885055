// The table of CUDA kernels: arguments to launchers, CUDA's errors to ours.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "attention.cuh"
#include "cuda_kernels.h"
#include "linear_w4a8.cuh"
#include "matmul_marlin.cuh"
#include "matmul_w4a16.cuh"
#include "matvec_marlin.cuh"
#include "matvec_marlin24.cuh"
#include "matvec_w4a16_coalesced.cuh"
#include "matvec_w4a16_mma.cuh"
#include "sample.cuh"

namespace cuda_int4 {

namespace {

Status device_status(const LinearArgs& args, cudaError_t code) {
  if (code == cudaSuccess) return {};
  return error(StatusCode::kDeviceError,
               "%.200s: expected the CUDA launch to succeed, got %s (%s); check that the tensors "
               "are on the current device and that its driver is up to date",
               weight_name(args), cudaGetErrorName(code), cudaGetErrorString(code));
}

// Tensor cores where they take the shape and the dtype of x; *launched says whether.
Status linear_coalesced_w4a16_mma(const LinearArgs& args, const ExecutionContext& context,
                                  bool* launched) {
  MatvecW4A16MmaArgs kernel_args = {};
  kernel_args.x = args.x.data;
  kernel_args.qdata = static_cast<const uint8_t*>(args.qdata.data);
  kernel_args.scale = args.scale.data;
  kernel_args.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  kernel_args.bias = args.bias.present() ? args.bias.data : nullptr;
  kernel_args.y = args.y.data;
  kernel_args.dtype = args.x.dtype;
  kernel_args.scale_dtype = args.scale.dtype;
  kernel_args.zero_point_dtype =
      args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  kernel_args.M = linear_M(args);
  kernel_args.N = linear_N(args);
  kernel_args.K = linear_K(args);
  kernel_args.group_size = args.group_size;
  kernel_args.constant_weights = context.constant_weights;
  return device_status(args, launch_matvec_w4a16_mma(
                                 kernel_args, static_cast<cudaStream_t>(context.stream), launched));
}

Status linear_coalesced_w4a16(const LinearArgs& args, const ExecutionContext& context) {
  if (args.x.dtype != DType::kFloat32) {
    bool launched = false;
    CUDA_INT4_RETURN_IF_ERROR(linear_coalesced_w4a16_mma(args, context, &launched));
    if (launched) return {};
  }
  MatvecW4A16CoalescedArgs kernel_args = {};
  kernel_args.x = args.x.data;
  kernel_args.qdata = static_cast<const uint32_t*>(args.qdata.data);
  kernel_args.scale = args.scale.data;
  kernel_args.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  kernel_args.bias = args.bias.present() ? args.bias.data : nullptr;
  kernel_args.y = args.y.data;
  kernel_args.dtype = args.x.dtype;
  kernel_args.scale_dtype = args.scale.dtype;
  kernel_args.zero_point_dtype =
      args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  kernel_args.M = linear_M(args);
  kernel_args.N = linear_N(args);
  kernel_args.K = linear_K(args);
  kernel_args.group_size = args.group_size;
  return device_status(
      args, launch_matvec_w4a16_coalesced(kernel_args, static_cast<cudaStream_t>(context.stream)));
}

constexpr CudaKernels kKernels = {linear_coalesced_w4a16,
                                  quantize_int8,
                                  linear_coalesced_w4a8,
                                  matmul_w4a16_scratch_bytes,
                                  matmul_w4a16,
                                  &kMathKernels,
                                  cuda_attention_scratch_bytes,
                                  cuda_attention,
                                  &kTensorKernels,
                                  matmul_marlin_scratch_bytes,
                                  matmul_marlin,
                                  matmul_marlin24_scratch_bytes,
                                  matmul_marlin24,
                                  matvec_marlin_scratch_bytes,
                                  matvec_marlin,
                                  matvec_marlin24,
                                  cuda_sample};

}  // namespace

const CudaKernels* cuda_kernels() { return &kKernels; }

}  // namespace cuda_int4
