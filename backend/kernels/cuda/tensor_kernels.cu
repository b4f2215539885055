// The table of tensor_kernels.h.
#include "copy.cuh"
#include "elementwise.cuh"
#include "indexing.cuh"
#include "tensor_kernels.h"

namespace cuda_int4 {

namespace {

cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

Status elementwise(const ElementwiseArgs& args, const ExecutionContext& context) {
  LoopNest nest = loop_over(args.out, 1 + args.n_in);
  nest.set(0, args.out);
  for (int k = 0; k < args.n_in; ++k)
    if (args.in[k].present()) nest.set(k + 1, args.in[k]);
  if (nest.n_steps() == 0) return {};
  nest.collapse();
  const auto launch =
      args.op < kFirstMath ? launch_elementwise_arithmetic : launch_elementwise_math;
  return nest.in_pieces([&](const LoopNest& piece) {
    return launch(args, piece, fault_note(context), stream_of(context));
  });
}

Status copy(const char* who, const CopyPart* parts, int n_parts, const ExecutionContext& context) {
  return launch_copy(who, parts, n_parts, stream_of(context));
}

Status fill(const FillArgs& args, const ExecutionContext& context) {
  return launch_fill(args, stream_of(context));
}

Status tril(const TrilArgs& args, const ExecutionContext& context) {
  return launch_tril(args, stream_of(context));
}

Status gather(const IndexArgs& args, const ExecutionContext& context) {
  return launch_gather(args, fault_note(context), stream_of(context));
}

Status scatter(const IndexArgs& args, const ExecutionContext& context) {
  if (args.accumulates)
    return launch_accumulate(args, fault_note(context), context.scratch, stream_of(context));
  return launch_scatter(args, fault_note(context), stream_of(context));
}

uint64_t scatter_scratch_bytes(const IndexArgs& args) {
  return args.accumulates ? accumulate_scratch_bytes(args) : 0;
}

}  // namespace

const TensorKernels kTensorKernels = {elementwise,          copy, fill, tril, gather, scatter,
                                      scatter_scratch_bytes};

}  // namespace cuda_int4
