// cuda_int4::attention on CUDA: the choice of a kernel.
#include <cinttypes>

#include "../attention_arguments.h"
#include "../checks.h"
#include "attention.cuh"
#include "launch_status.cuh"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::attention";

bool rows_are_aligned(const void* data, const int64_t (&strides)[3], const int64_t (&sizes)[3]) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && (sizes[d] == 1 || strides[d] % 8 == 0);
  return aligned;
}

struct Choice {
  uint64_t (*scratch_bytes)(const AttentionKernelArgs& args);
  cudaError_t (*launch)(const AttentionKernelArgs& args, cudaStream_t stream);
};

uint64_t no_scratch(const AttentionKernelArgs&) { return 0; }

constexpr int64_t kMostSplitQueries = 16;  // above, keys are few or queries fill the machine

Choice choose(const AttentionKernelArgs& args) {
  if (args.S <= kMostSplitQueries && fits_attention_split(args)) {
    return {attention_split_scratch_bytes, launch_attention_split};
  }
  if (fits_attention_wgmma(args)) return {attention_tiles_scratch_bytes, launch_attention_wgmma};
  if (fits_attention_tiles(args)) return {attention_tiles_scratch_bytes, launch_attention_tiles};
  return {no_scratch, launch_attention_rows};
}

}  // namespace

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

bool is_tensor_core_ready(const AttentionKernelArgs& args) {
  const int64_t q_sizes[3] = {args.B, args.Hq, args.S}, k_sizes[3] = {args.B, args.Hkv, args.T};
  return (args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16) && args.D % 8 == 0 &&
         args.D <= kMaxCudaHeadDim && rows_are_aligned(args.q, args.q_strides, q_sizes) &&
         rows_are_aligned(args.k, args.k_strides, k_sizes) &&
         rows_are_aligned(args.v, args.v_strides, k_sizes) &&
         reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
}

uint64_t cuda_attention_scratch_bytes(const AttentionArgs& args) {
  const AttentionKernelArgs p = attention_kernel_arguments<AttentionKernelArgs>(args);
  return choose(p).scratch_bytes(p);
}

Status cuda_attention(const AttentionArgs& args, const ExecutionContext& context) {
  AttentionKernelArgs p = attention_kernel_arguments<AttentionKernelArgs>(args);
  p.scratch = context.scratch;
  if (p.D > kMaxCudaHeadDim) {
    return error(StatusCode::kUnsupported,
                 "%s: expected head size D of at most %" PRId64 ", got %" PRId64
                 "; leave this attention outside the delegate",
                 kOp, kMaxCudaHeadDim, p.D);
  }
  return launch_status(kOp, choose(p).launch(p, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
