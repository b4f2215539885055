// cuda_int4::attention: validation, and the way to the CPU and CUDA kernels.
#include <cinttypes>

#include "attention_arguments.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/numeric.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"
#include "parallel_ranges.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::attention";

// [B, H, L, D] with the last dimension contiguous, of a float dtype, or int8 where that may be.
Status check_heads(const char* part, const TensorView& view, bool may_be_int8) {
  const TensorCheck check{kOp, part, "pass a tensor [B, H, L, D] whose last dimension is dense"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_strided(check, view, &numel));
  if (!may_be_int8 || view.dtype != DType::kInt8)
    CUDA_INT4_RETURN_IF_ERROR(check_float_kind(check, view));
  if (view.ndim != 4) {
    return error(StatusCode::kInvalidArgument, "%s: expected %s [B, H, L, D], got %s; %s", kOp,
                 part, ShapeText(view).text, check.cure);
  }
  if (view.sizes[3] > 1 && view.strides[3] != 1) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected stride 1 in the last dimension of %s, got %" PRId64 "; %s", kOp,
                 part, view.strides[3], check.cure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(check, view));
  return check_alignment(check, view, dtype_bytes(view.dtype));
}

Status check_mask(const AttentionArgs& args) {
  if (!args.mask.present()) return {};
  const TensorCheck check{kOp, "mask",
                          "pass a bool or additive mask that broadcasts to [B, Hq, S, T]"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_strided(check, args.mask, &numel));
  if (args.mask.dtype != DType::kBool && args.mask.dtype != args.q.dtype) {
    return error(StatusCode::kInvalidArgument, "%s: expected mask of dtype bool or %s, got %s; %s",
                 kOp, dtype_name(args.q.dtype), dtype_name(args.mask.dtype), check.cure);
  }
  const int64_t full[4] = {args.q.sizes[0], args.q.sizes[1], args.q.sizes[2], args.k.sizes[2]};
  bool fits = args.mask.ndim <= 4;
  for (int d = 0; fits && d < args.mask.ndim; ++d) {
    const int64_t size = args.mask.sizes[d], want = full[4 - args.mask.ndim + d];
    fits = size == want || size == 1;
  }
  if (!fits) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected mask that broadcasts to [%" PRId64 ", %" PRId64 ", %" PRId64
                 ", %" PRId64 "], got %s; %s",
                 kOp, full[0], full[1], full[2], full[3], ShapeText(args.mask).text, check.cure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(check, args.mask));
  return check_alignment(check, args.mask, dtype_bytes(args.mask.dtype));
}

Status check_positions(const AttentionArgs& args) {
  if (args.window < 0 || args.window > kMaxDim || (args.window > 0 && !args.input_pos.present())) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected window 0 (none), or in 1..%" PRId64 " with input_pos, got %" PRId64
                 " %s input_pos; fix the call",
                 kOp, kMaxDim, args.window, args.input_pos.present() ? "with" : "without");
  }
  if (!args.input_pos.present()) return {};
  if (args.mask.present() || args.is_causal) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected input_pos by itself, got it with %s; leave one of them out", kOp,
                 args.is_causal ? "is_causal" : "a mask");
  }
  const TensorCheck check{kOp, "input_pos", "pass one int32 or int64 position per query"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(check, args.input_pos, &numel));
  if (args.input_pos.dtype != DType::kInt32 && args.input_pos.dtype != DType::kInt64) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected input_pos of dtype int32 or int64, got %s; %s", kOp,
                 dtype_name(args.input_pos.dtype), check.cure);
  }
  const int64_t sizes[] = {args.q.sizes[0], args.q.sizes[2]};  // [B, S], or its end [S]
  const bool by_batch = args.input_pos.ndim == 2;
  CUDA_INT4_RETURN_IF_ERROR(
      check_shape(check, args.input_pos, by_batch ? 2 : 1, by_batch ? sizes : sizes + 1));
  CUDA_INT4_RETURN_IF_ERROR(check_data(check, args.input_pos));
  return check_alignment(check, args.input_pos, dtype_bytes(args.input_pos.dtype));
}

// k and v are int8 where there are scales, and only there.
Status check_scales(const AttentionArgs& args) {
  const bool is_int8 = args.k.dtype == DType::kInt8;
  if (args.k_scale.present() != is_int8 || args.v_scale.present() != is_int8) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected k_scale and v_scale with k and v of dtype int8 and without any "
                 "otherwise, got k of %s %s k_scale and %s v_scale; fix the call",
                 kOp, dtype_name(args.k.dtype), args.k_scale.present() ? "with" : "without",
                 args.v_scale.present() ? "with" : "without");
  }
  if (!is_int8) return {};
  const TensorView* const views[] = {&args.k_scale, &args.v_scale};
  const char* const names[] = {"k_scale", "v_scale"};
  for (int i = 0; i < 2; ++i) {
    const TensorCheck check{kOp, names[i], "pass a contiguous float32 scale, k's shape without D"};
    int64_t numel = 0;
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(check, *views[i], &numel));
    if (views[i]->dtype != DType::kFloat32) {
      return error(StatusCode::kInvalidArgument, "%s: expected %s of dtype float32, got %s; %s",
                   kOp, names[i], dtype_name(views[i]->dtype), check.cure);
    }
    CUDA_INT4_RETURN_IF_ERROR(check_shape(check, *views[i], 3, args.k.sizes));
    CUDA_INT4_RETURN_IF_ERROR(check_data(check, *views[i]));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(check, *views[i], 4));
  }
  return {};
}

}  // namespace

Status validate_attention(const AttentionArgs& args) {
  CUDA_INT4_RETURN_IF_ERROR(check_heads("q", args.q, false));
  CUDA_INT4_RETURN_IF_ERROR(check_heads("k", args.k, true));
  CUDA_INT4_RETURN_IF_ERROR(check_heads("v", args.v, true));
  const TensorCheck y{kOp, "y",
                      args.merge_heads ? "allocate a contiguous y [B, S, Hq * D]"
                                       : "allocate a contiguous y like q"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(y, args.y, &numel));
  if (args.merge_heads) {
    const int64_t* q_sizes = args.q.sizes;
    const int64_t sizes[] = {q_sizes[0], q_sizes[2], q_sizes[1] * q_sizes[3]};
    CUDA_INT4_RETURN_IF_ERROR(check_shape(y, args.y, 3, sizes));
  } else {
    CUDA_INT4_RETURN_IF_ERROR(check_same_shape(y, args.y, args.q));
  }
  CUDA_INT4_RETURN_IF_ERROR(check_data(y, args.y));
  CUDA_INT4_RETURN_IF_ERROR(check_alignment(y, args.y, dtype_bytes(args.y.dtype)));

  const TensorView& q = args.q;
  const TensorView& k = args.k;
  const bool kv_fit = args.v.dtype == k.dtype && (k.dtype == q.dtype || k.dtype == DType::kInt8);
  if (!kv_fit || args.y.dtype != q.dtype) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected q, k, v and y of one dtype (k and v may both be int8), got %s, %s, "
                 "%s and %s; cast them",
                 kOp, dtype_name(q.dtype), dtype_name(k.dtype), dtype_name(args.v.dtype),
                 dtype_name(args.y.dtype));
  }
  const int64_t Hkv = k.sizes[1];
  if (k.sizes[0] < q.sizes[0] || k.sizes[3] != q.sizes[3] || Hkv == 0 || q.sizes[1] % Hkv != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected k [B or more, Hkv, T, D] with the B and D of q and Hq %% Hkv == 0, "
                 "got q %s and k %s; fix the call",
                 kOp, ShapeText(q).text, ShapeText(k).text);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_same_shape({kOp, "v", "v has the shape of k"}, args.v, args.k));
  if (!(args.scale - args.scale == 0)) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected a finite scale, got %f; the usual one is 1/sqrt(D)", kOp,
                 args.scale);
  }
  // Written so that NaN fails; a float32 must hold it and its inverse.
  if (!(args.softcap == 0 || (args.softcap >= 1e-30 && args.softcap <= 1e30))) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected softcap 0 (none) or between 1e-30 and 1e30, got %g; fix the call",
                 kOp, args.softcap);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_scales(args));
  CUDA_INT4_RETURN_IF_ERROR(check_positions(args));
  return check_mask(args);
}

uint64_t attention_scratch_bytes(const AttentionArgs& args, DeviceKind device) {
  if (args.y.nbytes == 0) return 0;  // nothing is launched: attention()
  const CudaKernels* kernels = device == DeviceKind::kCuda ? cuda_kernels() : nullptr;
  return kernels == nullptr ? 0 : kernels->attention_scratch_bytes(args);
}

namespace cpu {

Status attention_on(const CpuKernels& kernels, const AttentionArgs& args,
                    const ExecutionContext& context) {
  const auto job = attention_kernel_arguments<AttentionJob>(args);
  if (job.D > kMaxHeadDim) {
    return error(StatusCode::kUnsupported,
                 "%s: expected head size D of at most %" PRId64 ", got %" PRId64
                 "; leave this attention outside the delegate",
                 kOp, kMaxHeadDim, job.D);
  }
  const int64_t row_blocks = ceil_div(job.Hq / job.Hkv * job.S, kAttentionRows);
  const int64_t work_per_item = kAttentionRows * larger(job.D * job.T, 1);
  parallel_ranges(context, job.B * job.Hkv * row_blocks, ceil_div(int64_t{1} << 16, work_per_item),
                  [&](int64_t begin, int64_t end) { kernels.attention(job, begin, end); });
  return {};
}

}  // namespace cpu

Status attention(const AttentionArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_attention(args));
  if (args.y.nbytes == 0) return {};
  if (context.device == DeviceKind::kCuda) {
    const CudaKernels* kernels = cuda_kernels();
    if (kernels == nullptr) return built_without_cuda(kOp);
    CUDA_INT4_RETURN_IF_ERROR(check_scratch(kOp, context, kernels->attention_scratch_bytes(args)));
    return kernels->attention(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::attention_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
