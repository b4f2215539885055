// cuda_int4::attention on CUDA: the choice of a kernel.
#include <cinttypes>

#include "../checks.h"
#include "attention.cuh"
#include "launch_status.cuh"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::attention";

AttentionKernelArgs make_kernel_args(const AttentionArgs& args) {
  AttentionKernelArgs p = {};
  p.q = args.q.data;
  p.k = args.k.data;
  p.v = args.v.data;
  p.y = args.y.data;
  p.dtype = args.q.dtype;
  p.is_causal = args.is_causal;
  p.B = args.q.sizes[0];
  p.Hq = args.q.sizes[1];
  p.S = args.q.sizes[2];
  p.D = args.q.sizes[3];
  p.Hkv = args.k.sizes[1];
  p.T = args.k.sizes[2];
  p.scale = static_cast<float>(args.scale);
  for (int d = 0; d < 3; ++d) {
    p.q_strides[d] = args.q.strides[d];
    p.k_strides[d] = args.k.strides[d];
    p.v_strides[d] = args.v.strides[d];
  }
  if (args.mask.present()) {
    p.mask = args.mask.data;
    p.mask_is_bool = args.mask.dtype == DType::kBool;
    for (int d = 0; d < args.mask.ndim; ++d) {
      p.mask_strides[4 - args.mask.ndim + d] = args.mask.sizes[d] == 1 ? 0 : args.mask.strides[d];
    }
  }
  return p;
}

}  // namespace

uint64_t cuda_attention_scratch_bytes(const AttentionArgs&) { return 0; }

Status cuda_attention(const AttentionArgs& args, const ExecutionContext& context) {
  AttentionKernelArgs p = make_kernel_args(args);
  p.scratch = context.scratch;
  if (p.D > kMaxCudaHeadDim) {
    return error(StatusCode::kUnsupported,
                 "%s: expected head size D of at most %" PRId64 ", got %" PRId64
                 "; leave this attention outside the delegate",
                 kOp, kMaxCudaHeadDim, p.D);
  }
  return launch_status(kOp, launch_attention_rows(p, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
