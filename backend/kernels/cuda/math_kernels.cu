// The table of math_kernels.h: tensor views to plain arguments, CUDA's errors to ours.
#include "add_rms_norm.cuh"
#include "convolution_kernels.cuh"
#include "gate_mul.cuh"
#include "launch_status.cuh"
#include "math_kernels.h"
#include "matmul_kernels.cuh"
#include "norm_rows.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"
#include "rope_append.cuh"
#include "row_kernels.cuh"
#include "silu.cuh"

namespace cuda_int4 {

namespace {

cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

int64_t numel_of(const TensorView& view) {
  return static_cast<int64_t>(view.nbytes) / dtype_bytes(view.dtype);
}

// Where `context` wants y [..., K] as int8 too.
QuantizedRows quantized_rows(const TensorView& y, const ExecutionContext& context) {
  if (context.quantized_y == nullptr) return {};
  const int64_t K = y.sizes[y.ndim - 1], M = numel_of(y) / K;
  int8_t* a = static_cast<int8_t*>(context.quantized_y);
  return {a, reinterpret_cast<QuantizedParameter*>(a + quantized_parameter_offset_bytes(M, K)), K,
          quantized_tokens(M)};
}

Status run_rms_norm(const RmsNormArgs& args, const ExecutionContext& context) {
  NormRowsArgs kernel_args = {};
  kernel_args.x = args.x.data;
  kernel_args.weight = args.weight.present() ? args.weight.data : nullptr;
  kernel_args.y = args.y.data;
  kernel_args.dtype = args.x.dtype;
  kernel_args.weight_dtype = args.weight.present() ? args.weight.dtype : args.x.dtype;
  kernel_args.D = args.x.sizes[args.x.ndim - 1];
  kernel_args.n_rows = numel_of(args.x) / kernel_args.D;
  kernel_args.eps = static_cast<float>(args.eps);
  kernel_args.constant_weights = context.constant_weights;
  kernel_args.quantized = quantized_rows(args.y, context);
  return launch_status("cuda_int4::rms_norm", launch_rms_norm(kernel_args, stream_of(context)));
}

Status run_silu(const SiluArgs& args, const ExecutionContext& context) {
  const SiluKernelArgs kernel_args = {args.x.data, args.y.data, args.x.dtype, numel_of(args.x)};
  return launch_status("cuda_int4::silu", launch_silu(kernel_args, stream_of(context)));
}

Status run_add_rms_norm(const AddRmsNormArgs& args, const ExecutionContext& context) {
  NormRowsArgs kernel_args = {};
  kernel_args.x = args.x.data;
  kernel_args.residual = args.residual.data;
  kernel_args.weight = args.weight.present() ? args.weight.data : nullptr;
  kernel_args.x_norm = args.x_norm.present() ? args.x_norm.data : nullptr;
  kernel_args.sum = args.sum.data;
  kernel_args.y = args.y.data;
  kernel_args.dtype = args.x.dtype;
  kernel_args.weight_dtype = args.weight.present() ? args.weight.dtype : args.x.dtype;
  kernel_args.D = args.x.sizes[args.x.ndim - 1];
  kernel_args.n_rows = numel_of(args.x) / kernel_args.D;
  kernel_args.x_norm_dtype = args.x_norm.dtype;
  kernel_args.eps = static_cast<float>(args.eps);
  kernel_args.constant_weights = context.constant_weights;
  kernel_args.quantized = quantized_rows(args.y, context);
  return launch_status("cuda_int4::add_rms_norm",
                       launch_add_rms_norm(kernel_args, stream_of(context)));
}

Status run_gate_mul(const GateMulArgs& args, const ExecutionContext& context) {
  const GateMulKernelArgs kernel_args = {args.gate_up.data,
                                         args.y.data,
                                         args.y.dtype,
                                         gate_function_of(args.activation),
                                         numel_of(args.y),
                                         args.y.sizes[args.y.ndim - 1],
                                         quantized_rows(args.y, context)};
  return launch_status("cuda_int4::gate_mul", launch_gate_mul(kernel_args, stream_of(context)));
}

Status run_rope_append(const RopeAppendArgs& args, const ExecutionContext& context) {
  RopeAppendKernelArgs kernel_args = {};
  kernel_args.k_cache = args.k_cache.data;
  kernel_args.v_cache = args.v_cache.data;
  kernel_args.qkv = args.qkv.data;
  kernel_args.cos = args.cos.data;
  kernel_args.sin = args.sin.data;
  kernel_args.input_pos = args.input_pos.data;
  kernel_args.q_norm = args.q_norm.present() ? args.q_norm.data : nullptr;
  kernel_args.k_norm = args.k_norm.present() ? args.k_norm.data : nullptr;
  kernel_args.q = args.q.data;
  kernel_args.dtype = args.qkv.dtype;
  kernel_args.table_dtype = args.cos.dtype;
  kernel_args.q_norm_dtype = args.q_norm.dtype;
  kernel_args.k_norm_dtype = args.k_norm.dtype;
  kernel_args.pos_is_int64 = args.input_pos.dtype == DType::kInt64;
  kernel_args.interleaved = args.interleaved;
  kernel_args.B = args.qkv.sizes[0];
  kernel_args.S = args.qkv.sizes[1];
  kernel_args.n_heads = args.n_heads;
  kernel_args.n_kv_heads = args.k_cache.sizes[1];
  kernel_args.T = args.k_cache.sizes[2];
  kernel_args.D = args.k_cache.sizes[3];
  kernel_args.k_scale = args.k_scale.present() ? static_cast<float*>(args.k_scale.data) : nullptr;
  kernel_args.v_scale = args.v_scale.present() ? static_cast<float*>(args.v_scale.data) : nullptr;
  kernel_args.table_D = args.cos.sizes[args.cos.ndim - 1];
  kernel_args.table_stride = args.cos.ndim == 3 ? kernel_args.S : 0;
  kernel_args.pos_stride = args.input_pos.ndim == 2 ? kernel_args.S : 0;
  kernel_args.values_are_keys =
      args.qkv.sizes[2] / kernel_args.D < kernel_args.n_heads + 2 * kernel_args.n_kv_heads;
  kernel_args.constant_weights = context.constant_weights;
  kernel_args.eps = static_cast<float>(args.eps);
  kernel_args.note = fault_note(context);
  return launch_status("cuda_int4::rope_append",
                       launch_rope_append(kernel_args, stream_of(context)));
}

Status run_matmul(const MatmulArgs& args, const ExecutionContext& context) {
  return launch_status(
      "cuda_int4::matmul",
      launch_matmul(args, context.scratch, context.scratch_bytes, stream_of(context)));
}

Status run_reduce(const ReduceArgs& args, const ExecutionContext& context) {
  if (args.n_out == 0) return {};
  const auto launch = args.reduction == Reduction::kMaximum || args.reduction == Reduction::kMinimum
                          ? launch_reduce_extremes
                      : args.reduction == Reduction::kVariance ? launch_reduce_moments
                                                               : launch_reduce_sums;
  CUDA_INT4_RETURN_IF_ERROR(
      check_scratch("cuda_int4::reduce", context, reduce_scratch_bytes(args)));
  return launch_status("cuda_int4::reduce", launch(args, context.scratch, stream_of(context)));
}

Status run_topk(const TopkArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(check_scratch("cuda_int4::topk", context, topk_scratch_bytes(args)));
  return launch_status("cuda_int4::topk", launch_topk(args, context.scratch, stream_of(context)));
}

Status run_convolution(const ConvolutionArgs& args, const ExecutionContext& context) {
  return launch_status(
      "cuda_int4::convolution",
      launch_convolution(args, context.scratch, context.scratch_bytes, stream_of(context)));
}

// Kernels that need nothing but their arguments and the stream.
template <typename Args, cudaError_t (*kLaunch)(const Args&, cudaStream_t), const char* kName>
Status run(const Args& args, const ExecutionContext& context) {
  return launch_status(kName, kLaunch(args, stream_of(context)));
}

constexpr char kSoftmax[] = "cuda_int4::softmax";
constexpr char kLayerNorm[] = "cuda_int4::layer_norm";
constexpr char kGroupNorm[] = "cuda_int4::group_norm";
constexpr char kBatchNorm[] = "cuda_int4::batch_norm";
constexpr char kCumsum[] = "cuda_int4::cumsum";
constexpr char kPool[] = "cuda_int4::pool";
constexpr char kGlu[] = "cuda_int4::glu";

}  // namespace

const MathKernels kMathKernels = {
    run_rms_norm,
    run_silu,
    run_add_rms_norm,
    run_gate_mul,
    run_rope_append,
    matmul_scratch_bytes,
    run_matmul,
    reduce_scratch_bytes,
    run_reduce,
    run<SoftmaxArgs, launch_softmax, kSoftmax>,
    run<LayerNormArgs, launch_layer_norm, kLayerNorm>,
    run<GroupNormArgs, launch_group_norm, kGroupNorm>,
    run<BatchNormArgs, launch_batch_norm, kBatchNorm>,
    run<CumsumArgs, launch_cumsum, kCumsum>,
    run<GluArgs, launch_glu, kGlu>,
    topk_scratch_bytes,
    run_topk,
    convolution_scratch_bytes,
    run_convolution,
    run<PoolArgs, launch_pool, kPool>,
};

}  // namespace cuda_int4
