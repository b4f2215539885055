// cuda_int4::attention on CUDA: the choice of a kernel.
#include <cinttypes>

#include "../attention_arguments.h"
#include "../checks.h"
#include "attention.cuh"
#include "launch_status.cuh"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::attention";

// `unit`: elements in 16 bytes.
bool rows_are_aligned(const void* data, const int64_t (&strides)[3], const int64_t (&sizes)[3],
                      int unit) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && (sizes[d] == 1 || strides[d] % unit == 0);
  return aligned;
}

struct Choice {
  uint64_t (*scratch_bytes)(const AttentionKernelArgs& args);
  cudaError_t (*launch)(const AttentionKernelArgs& args, cudaStream_t stream);
};

uint64_t no_scratch(const AttentionKernelArgs&) { return 0; }

constexpr int64_t kMostSplitQueries = 16;  // above, keys are few or queries fill the machine

Choice choose(const AttentionKernelArgs& args) {
  if (fits_attention_decode(args)) return {no_scratch, launch_attention_decode};
  if (args.S <= kMostSplitQueries && fits_attention_split(args)) {
    return {attention_split_scratch_bytes, launch_attention_split};
  }
  if (fits_attention_wgmma(args)) return {attention_tiles_scratch_bytes, launch_attention_wgmma};
  if (fits_attention_tiles(args)) return {attention_tiles_scratch_bytes, launch_attention_tiles};
  return {no_scratch, launch_attention_rows};
}

// Int8 keys and values that only attention_decode takes as they are.
bool needs_dequantized(const AttentionKernelArgs& args) {
  return args.k_scale != nullptr && !fits_attention_decode(args);
}

uint64_t dequantized_bytes(const AttentionKernelArgs& args) {  // of k; v has as many
  constexpr uint64_t kAlignment = 256;
  const auto n_elems = static_cast<uint64_t>(args.B * args.Hkv * args.T * args.D);
  const uint64_t n_bytes = n_elems * static_cast<uint64_t>(dtype_bytes(args.dtype));
  return (n_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The same call on k and v of the dtype of q that lie at the start of the scratch.
AttentionKernelArgs dequantized(const AttentionKernelArgs& args) {
  AttentionKernelArgs p = args;
  const int64_t strides[3] = {args.Hkv * args.T * args.D, args.T * args.D, args.D};
  for (int d = 0; d < 3; ++d) p.k_strides[d] = p.v_strides[d] = strides[d];
  char* scratch = static_cast<char*>(args.scratch);
  p.k_scale = p.v_scale = nullptr;
  p.k = scratch;
  p.v = scratch == nullptr ? nullptr : scratch + dequantized_bytes(args);
  p.scratch = scratch == nullptr ? nullptr : scratch + 2 * dequantized_bytes(args);
  return p;
}

}  // namespace

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

bool is_tensor_core_ready(const AttentionKernelArgs& args) {
  const int64_t q_sizes[3] = {args.B, args.Hq, args.S}, k_sizes[3] = {args.B, args.Hkv, args.T};
  const int kv_unit = args.k_scale == nullptr ? 8 : 16;
  return (args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16) && args.D % 8 == 0 &&
         args.D <= kMaxCudaHeadDim && rows_are_aligned(args.q, args.q_strides, q_sizes, 8) &&
         rows_are_aligned(args.k, args.k_strides, k_sizes, kv_unit) &&
         rows_are_aligned(args.v, args.v_strides, k_sizes, kv_unit) &&
         reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
}

uint64_t cuda_attention_scratch_bytes(const AttentionArgs& args) {
  const AttentionKernelArgs p = attention_kernel_arguments<AttentionKernelArgs>(args);
  if (!needs_dequantized(p)) return choose(p).scratch_bytes(p);
  const AttentionKernelArgs q = dequantized(p);
  return 2 * dequantized_bytes(p) + choose(q).scratch_bytes(q);
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
  const auto stream = static_cast<cudaStream_t>(context.stream);
  if (needs_dequantized(p)) {
    const AttentionKernelArgs q = dequantized(p);
    const cudaError_t code =
        launch_attention_dequantize(p, const_cast<void*>(q.k), const_cast<void*>(q.v), stream);
    return launch_status(kOp, code == cudaSuccess ? choose(q).launch(q, stream) : code);
  }
  return launch_status(kOp, choose(p).launch(p, stream));
}

}  // namespace cuda_int4
