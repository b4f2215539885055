#include "cuda_ops.h"
#include "execution.h"
#include "tensor_bridge.h"
#include "tensor_op_call.h"

namespace cuda_int4 {

using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using Stack = Span<EValue*>;

namespace {

bool is_index(const TensorView& view) {
  return view.dtype == DType::kInt32 || view.dtype == DType::kInt64;
}

TensorView index_input(TensorOpCall& call, size_t i) {
  const TensorView index = call.tensor(i);
  call.require(is_index(index), "an index of int32 or int64");
  return index;
}

void append(TensorView* view, int64_t size, int64_t stride) {
  view->sizes[view->ndim] = size;
  view->strides[view->ndim++] = stride;
}

/// `x` and `index` over the positions [x before dim..., index..., x after dim...], where the index
/// stands for dimension `dim` of x: both ops of rows are this.
void over_positions(TensorOpCall& call, const TensorView& x, int dim, const TensorView& index,
                    IndexArgs* args) {
  call.require(x.ndim - 1 + index.ndim <= kMaxDims, "a result of at most 8 dimensions");
  if (!call.ok()) return;
  args->indexed = x;
  args->indexed.ndim = 0;
  args->n_dims = 1;
  args->dims[0] = {index, x.sizes[dim], x.strides[dim]};
  TensorView& over_index = args->dims[0].index;
  over_index.ndim = 0;
  for (int d = 0; d < x.ndim; ++d) {
    if (d != dim) {
      append(&args->indexed, x.sizes[d], x.strides[d]);
      append(&over_index, x.sizes[d], 0);
      continue;
    }
    for (int e = 0; e < index.ndim; ++e) {
      append(&args->indexed, index.sizes[e], 0);
      append(&over_index, index.sizes[e], index.strides[e]);
    }
  }
}

void gather(TensorOpCall& call, const IndexArgs& args) {
  call.require(args.plain.dtype == args.indexed.dtype, "a result of the tensor's dtype");
  if (const TensorKernels* table = call.kernels()) {
    IndexArgs named = args;
    named.who = call.op();
    call.check(table->gather(named, current_execution()));
  }
}

void scatter(KernelRuntimeContext& context, TensorOpCall& call, const IndexArgs& args) {
  if (const TensorKernels* table = call.kernels()) {
    IndexArgs named = args;
    named.who = call.op();
    ExecutionContext execution = current_execution();
    call.set_error(give_scratch(context, table->scatter_scratch_bytes(named), &execution));
    if (call.ok()) call.check(table->scatter(named, execution));
  }
}

// ---- rows ----

// embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse, *, out)
void embedding_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("embedding.out", stack, 6);
  const TensorView weight = call.tensor(0), index = index_input(call, 1);
  call.require(weight.ndim == 2, "a weight of 2 dimensions");
  IndexArgs args = {};
  over_positions(call, weight, 0, index, &args);
  args.plain = call.out(5, args.indexed);
  gather(call, args);
  call.finish(context);
}

// index_select(self, dim, index, *, out)
void index_select_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("index_select.out", stack, 4);
  const TensorView x = call.tensor(0), index = index_input(call, 2);
  const int dim = call.dim(call.integer(1), x.ndim);
  call.require(index.ndim <= 1, "an index of one dimension");
  if (!call.ok()) return call.finish(context);
  // A tensor or an index without dimensions counts as one of one element.
  const int64_t ones[] = {1};
  const TensorView from = x.ndim == 0 ? reshaped(x, ones, 1) : x;
  IndexArgs args = {};
  over_positions(call, from, dim, index.ndim == 0 ? reshaped(index, ones, 1) : index, &args);
  args.plain = call.out(3, x.ndim == 0 ? x : args.indexed);
  if (call.ok() && x.ndim == 0) args.plain = reshaped(args.plain, ones, 1);
  gather(call, args);
  call.finish(context);
}

// ---- element by element along one dimension ----

/// `x` at index 0 of `dim`, over the sizes of `index`.
void along_dim(TensorOpCall& call, const TensorView& x, int dim, const TensorView& index,
               IndexArgs* args) {
  call.require(x.ndim == index.ndim, "an index of as many dimensions as the tensor");
  if (!call.ok()) return;
  const int64_t stride = x.ndim == 0 ? 0 : x.strides[dim];
  args->n_dims = 1;
  args->dims[0] = {index, x.ndim == 0 ? 1 : x.sizes[dim], stride};
  args->indexed = x;
  for (int d = 0; d < x.ndim; ++d) {
    call.require(d == dim || index.sizes[d] <= x.sizes[d],
                 "an index no larger than the tensor in the other dimensions");
    args->indexed.sizes[d] = index.sizes[d];
  }
  if (x.ndim > 0) args->indexed.strides[dim] = 0;
}

// gather(self, dim, index, *, sparse_grad, out)
void gather_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("gather.out", stack, 5);
  const TensorView x = call.tensor(0), index = index_input(call, 2);
  const int dim = call.dim(call.integer(1), x.ndim);
  IndexArgs args = {};
  along_dim(call, x, dim, index, &args);
  args.plain = call.out(4, index);
  gather(call, args);
  call.finish(context);
}

/// out = self, unless it is self.
TensorView out_as_self(TensorOpCall& call, size_t i, const TensorView& self) {
  const TensorView out = call.out(i, self);
  call.require(out.dtype == self.dtype, "a result of the tensor's dtype");
  if (call.ok() && out.data != self.data) call.move(out, self);
  return out;
}

// scatter(self, dim, index, src tensor or value number, *, out), scatter_add of the same arguments
template <bool kAdds>
void scatter_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call(kAdds ? "scatter_add.out" : "scatter.out", stack, 5);
  const TensorView self = call.tensor(0), index = index_input(call, 2);
  const int dim = call.dim(call.integer(1), self.ndim);
  IndexArgs args = {};
  const TensorView out = out_as_self(call, 4, self);
  along_dim(call, out, dim, index, &args);
  if (call.ok() && stack[3]->isTensor()) {
    const TensorView src = call.tensor(3);
    call.require(src.ndim == index.ndim && src.dtype == self.dtype,
                 "a source of the tensor's dtype and as many dimensions as the index");
    for (int d = 0; d < index.ndim && call.ok(); ++d)
      call.require(index.sizes[d] <= src.sizes[d], "a source at least as large as the index");
    args.plain = index;  // its sizes
    args.plain.data = src.data;
    args.plain.dtype = src.dtype;
    for (int d = 0; d < index.ndim; ++d) args.plain.strides[d] = src.strides[d];
  } else {
    call.require(!kAdds, "a source to add");
    args.plain = absent_view();
    args.value = number_of(call.scalar(3));
  }
  args.accumulates = kAdds;
  scatter(context, call, args);
  call.finish(context);
}

// ---- by one index for each of several dimensions ----

/// The indices of index and index_put: a list of tensors that broadcast to one shape, or None.
/// The positions are those of x with the indexed dimensions taken out and the shape of the indices
/// put in their place, or in front where other dimensions lie between them.
void by_indices(TensorOpCall& call, const TensorView& x, size_t list, IndexArgs* args) {
  const size_t n = call.list_size(list);
  call.require(n <= size_t(x.ndim < 0 ? 0 : x.ndim), "at most one index for each dimension");
  if (!call.ok()) return;
  TensorView indices[kMaxDims];
  int first = -1, last = -1, n_given = 0, index_ndim = 0;
  for (int d = 0; d < x.ndim; ++d) {
    indices[d] = size_t(d) < n ? call.list_tensor(list, size_t(d)) : absent_view();
    if (!call.ok() || !indices[d].present()) continue;
    call.require(is_index(indices[d]),
                 "indices of int32 or int64 (of a mask the positions are needed, where() does "
                 "without them)");
    if (first < 0) first = d;
    last = d;
    ++n_given;
    index_ndim = indices[d].ndim > index_ndim ? indices[d].ndim : index_ndim;
  }
  call.require(n_given > 0, "at least one index");
  call.require(x.ndim - n_given + index_ndim <= kMaxDims, "a result of at most 8 dimensions");
  int64_t sizes[kMaxDims];  // that all indices broadcast to
  for (int e = 0; e < index_ndim; ++e) sizes[e] = 1;
  for (int d = first; call.ok() && d <= last; ++d)
    for (int e = 0; e < indices[d].ndim; ++e) {
      int64_t& size = sizes[e + index_ndim - indices[d].ndim];
      if (size == 1) size = indices[d].sizes[e];
      call.require(indices[d].sizes[e] == size || indices[d].sizes[e] == 1,
                   "indices whose shapes broadcast to one");
    }
  if (!call.ok()) return;
  const bool is_adjacent = last - first + 1 == n_given;
  const int at = is_adjacent ? first : 0;  // dimensions of x in front of those of the indices

  args->indexed = x;
  args->indexed.ndim = 0;
  args->n_dims = 0;
  const auto add_rest = [&](int from, int to) {
    for (int d = from; d < to; ++d)
      if (!indices[d].present()) append(&args->indexed, x.sizes[d], x.strides[d]);
  };
  add_rest(0, at);
  for (int e = 0; e < index_ndim; ++e) append(&args->indexed, sizes[e], 0);
  add_rest(at, x.ndim);
  // Small indices can broadcast to more positions than int64 counts.
  int64_t n_positions = 0;
  call.check(check_sizes({call.op(), "the positions", "the .pte is damaged, export it again"},
                         args->indexed, &n_positions));
  for (int d = first; d <= last; ++d) {
    if (!indices[d].present()) continue;
    TensorView broadcast, over = args->indexed;
    if (!expanded(indices[d], sizes, index_ndim, &broadcast)) return;
    over.data = broadcast.data;
    over.dtype = broadcast.dtype;
    for (int e = 0; e < over.ndim; ++e)
      over.strides[e] = e >= at && e < at + index_ndim ? broadcast.strides[e - at] : 0;
    args->dims[args->n_dims++] = {over, x.sizes[d], x.strides[d]};
  }
  args->wraps = true;
}

// index(self, indices[], *, out)
void index_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("index.Tensor_out", stack, 3);
  const TensorView x = call.tensor(0);
  IndexArgs args = {};
  by_indices(call, x, 1, &args);
  args.plain = call.out(2, args.indexed);
  gather(call, args);
  call.finish(context);
}

/// to[indices] = values, which broadcast to the positions.
void put(KernelRuntimeContext& context, TensorOpCall& call, const TensorView& to) {
  IndexArgs args = {};
  by_indices(call, to, 1, &args);
  const TensorView values = call.tensor(2);
  call.require(values.dtype == to.dtype, "values of the tensor's dtype");
  if (call.ok())
    call.require(expanded(values, args.indexed.sizes, args.indexed.ndim, &args.plain),
                 "values that broadcast to the positions of the indices");
  args.accumulates = call.boolean(3);
  scatter(context, call, args);
}

// index_put(self, indices[], values, accumulate, *, out)
void index_put_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("index_put.out", stack, 5);
  put(context, call, out_as_self(call, 4, call.tensor(0)));
  call.finish(context);
}

// index_put_(self, indices[], values, accumulate)
void index_put_in_place(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("index_put_", stack, 4);
  put(context, call, call.tensor(0));
  call.finish(context);
}

constexpr CudaOp kOps[] = {
    {"aten::embedding.out", &embedding_out},
    {"aten::gather.out", &gather_out},
    {"aten::index.Tensor_out", &index_out},
    {"aten::index_put.out", &index_put_out},
    {"aten::index_put_", &index_put_in_place},
    {"aten::index_select.out", &index_select_out},
    {"aten::scatter.src_out", &scatter_out<false>},
    {"aten::scatter.value_out", &scatter_out<false>},
    {"aten::scatter_add.out", &scatter_out<true>},
};

}  // namespace

CudaOps cuda_index_ops() { return {kOps, std::size(kOps)}; }

}  // namespace cuda_int4
