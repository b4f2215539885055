// TensorOpCall -- one call of a generic op on CUDA: its arguments, checked views of them, and the
// kernels. The ops of elementwise, shape and index kind are written in these terms.
//
//   TensorOpCall call("permute_copy.out", stack, 3);
//   ... views of call.input(0) and call.out(2, sizes, ndim) ...
//   call.move(to, from);
//   call.finish(context);
#pragma once

#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include "../kernels/checks.h"
#include "../kernels/cuda/cuda_kernels.h"
#include "op_arguments.h"

namespace cuda_int4 {

Number number_of(const ScalarArgument& scalar);
Number number_of(int64_t value);

class TensorOpCall : public OpArguments {
 public:
  TensorOpCall(const char* op, Stack stack, size_t n_schema);

  bool ok() const { return error() == executorch::runtime::Error::Ok; }
  /// The caller's finding, in the words of checks.h.
  void check(const Status& status);
  /// An error "op: expected ..." unless `holds`.
  void require(bool holds, const char* expected);
  /// For what takes elements in the order of memory.
  void require_contiguous(const TensorView& view);

  /// -ndim..ndim-1 to 0..ndim-1; a tensor without dimensions counts as one of one. 0 on error.
  int dim(int64_t given, int ndim);

  /// to = from, cast where the dtypes differ; of the same sizes.
  void move(const TensorView& to, const TensorView& from);
  /// The same for parts of one op that do not overlap, in few launches; flush() queues the last.
  void add_part(const TensorView& to, const TensorView& from);
  void flush();
  void elementwise(const ElementwiseArgs& args);
  void fill(const TensorView& out, Number start, Number step);

  /// The table of kernels and the execution, once all is well; kernels() is null on error.
  const TensorKernels* kernels();

  void finish(executorch::runtime::KernelRuntimeContext& context);

 private:
  static constexpr int kMaxParts = 8;
  CopyPart parts_[kMaxParts];
  int n_parts_ = 0;
};

// ---- views of views; sizes have been checked ----

/// `length` elements of a dimension from `start` in steps of `step`, which may be negative.
TensorView sliced(const TensorView& view, int dim, int64_t start, int64_t length, int64_t step = 1);
/// Without dimension `dim`, at `index` of it.
TensorView selected(const TensorView& view, int dim, int64_t index);
/// Broadcast: sizes of 1 repeat; false where `sizes` do not allow it.
bool expanded(const TensorView& view, const int64_t* sizes, int ndim, TensorView* out);
/// Another shape of a contiguous view.
TensorView reshaped(const TensorView& view, const int64_t* sizes, int ndim);
int64_t numel(const TensorView& view);
bool same_sizes(const TensorView& a, const TensorView& b);

}  // namespace cuda_int4
