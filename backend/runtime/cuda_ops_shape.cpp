#include <algorithm>
#include <cmath>

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

// ---- the same elements in the same order ----

/// out(self, ..., out) of `n_schema` arguments, cast to the dtype of out.
template <size_t kSchema>
void copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("copy of a tensor", stack, kSchema);
  const TensorView x = call.tensor(0);
  call.move(call.out(kSchema - 1, x), x);
  call.finish(context);
}

/// x in the order of its elements, with the sizes of an `out` of as many of them.
void move_reshaped(TensorOpCall& call, const TensorView& out, const TensorView& x) {
  call.require_contiguous(out);
  if (!call.ok()) return;
  call.require(numel(out) == numel(x), "a result of as many elements as the operand");
  call.move(reshaped(out, x.sizes, x.ndim), x);
}

// view_copy(self, size, *, out)
void view_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("view_copy.out", stack, 3);
  const TensorView x = call.tensor(0);
  int64_t sizes[kMaxDims];
  const int ndim = int(call.integers(1, sizes, kMaxDims));
  int64_t known = 1;
  int64_t* inferred = nullptr;
  for (int d = 0; d < ndim; ++d) {
    if (sizes[d] == -1 && inferred == nullptr)
      inferred = &sizes[d];
    else if (sizes[d] >= 0 && (sizes[d] == 0 || known <= kMaxElems / sizes[d]))
      known *= sizes[d];
    else
      call.require(false, "sizes of which at most one is -1");
  }
  if (inferred != nullptr) *inferred = known > 0 ? numel(x) / known : 0;
  move_reshaped(call, call.out(2, sizes, ndim), x);
  call.finish(context);
}

// unsqueeze_copy(self, dim, *, out)
void unsqueeze_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("unsqueeze_copy.out", stack, 3);
  const TensorView x = call.tensor(0);
  const int dim = call.dim(call.integer(1), x.ndim + 1);
  int64_t sizes[kMaxDims + 1] = {0};
  for (int d = 0; d < x.ndim; ++d) sizes[d < dim ? d : d + 1] = x.sizes[d];
  sizes[dim] = 1;
  move_reshaped(call, call.out(2, sizes, x.ndim + 1), x);
  call.finish(context);
}

// squeeze_copy(self, dim or dims, *, out)
void squeeze_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("squeeze_copy.out", stack, 3);
  const TensorView x = call.tensor(0);
  int64_t given[kMaxDims];
  size_t n = 1;
  if (call.ok() && stack[1]->isInt())
    given[0] = call.integer(1);
  else
    n = call.integers(1, given, kMaxDims);
  bool goes[kMaxDims] = {false};
  for (size_t i = 0; i < n && call.ok(); ++i) goes[call.dim(given[i], x.ndim)] = true;
  int64_t sizes[kMaxDims] = {0};
  int ndim = 0;
  for (int d = 0; d < x.ndim; ++d)
    if (!goes[d] || x.sizes[d] != 1) sizes[ndim++] = x.sizes[d];
  move_reshaped(call, call.out(2, sizes, ndim), x);
  call.finish(context);
}

// copy(self, src, non_blocking, *, out) and copy_(self, src, non_blocking): src, broadcast to self
template <size_t kSchema>
void copy_src(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("copy", stack, kSchema);
  const TensorView self = call.tensor(0), src = call.tensor(1);
  const TensorView out = kSchema == 3 ? self : call.out(3, self);
  TensorView from;
  if (call.ok())
    call.require(expanded(src, self.sizes, self.ndim, &from),
                 "a source that broadcasts to the tensor");
  if (call.ok()) call.move(out, from);
  call.finish(context);
}

// ---- views that are copied out ----

// expand_copy(self, size, *, implicit, out)
void expand_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("expand_copy.out", stack, 4);
  const TensorView x = call.tensor(0);
  int64_t sizes[kMaxDims];
  const int ndim = int(call.integers(1, sizes, kMaxDims));
  for (int d = 0; d < ndim && call.ok(); ++d)
    if (sizes[d] == -1) {
      call.require(d >= ndim - x.ndim, "a size for each new dimension");
      if (call.ok()) sizes[d] = x.sizes[d - (ndim - x.ndim)];
    }
  TensorView from;
  if (call.ok())
    call.require(expanded(x, sizes, ndim, &from), "sizes that the tensor broadcasts to");
  call.move(call.out(3, sizes, ndim), from);
  call.finish(context);
}

/// Dimension d of the result is dimension dims[d] of x.
void move_permuted(TensorOpCall& call, size_t out, const TensorView& x, const int* dims) {
  if (!call.ok()) return;
  TensorView from = x;
  for (int d = 0; d < x.ndim; ++d) {
    from.sizes[d] = x.sizes[dims[d]];
    from.strides[d] = x.strides[dims[d]];
  }
  call.move(call.out(out, from), from);
}

// permute_copy(self, dims, *, out)
void permute_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("permute_copy.out", stack, 3);
  const TensorView x = call.tensor(0);
  int64_t given[kMaxDims];
  const int n = int(call.integers(1, given, kMaxDims));
  call.require(n == x.ndim, "each dimension of the tensor once");
  int dims[kMaxDims] = {0};
  unsigned seen = 0;
  for (int d = 0; d < n && call.ok(); ++d) {
    dims[d] = call.dim(given[d], x.ndim);
    seen |= 1u << dims[d];
  }
  call.require(seen + 1 == 1u << n, "each dimension of the tensor once");
  move_permuted(call, 2, x, dims);
  call.finish(context);
}

void move_transposed(TensorOpCall& call, size_t out, const TensorView& x, int dim0, int dim1) {
  int dims[kMaxDims] = {0, 1, 2, 3, 4, 5, 6, 7};
  std::swap(dims[dim0], dims[dim1]);
  move_permuted(call, out, x, dims);
}

// transpose_copy(self, dim0, dim1, *, out)
void transpose_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("transpose_copy.int_out", stack, 4);
  const TensorView x = call.tensor(0);
  const int dim0 = call.dim(call.integer(1), x.ndim), dim1 = call.dim(call.integer(2), x.ndim);
  move_transposed(call, 3, x, dim0, dim1);
  call.finish(context);
}

// t_copy(self, *, out)
void t_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("t_copy.out", stack, 2);
  const TensorView x = call.tensor(0);
  call.require(x.ndim <= 2, "a tensor of at most 2 dimensions");
  move_transposed(call, 1, x, 0, x.ndim == 2 ? 1 : 0);
  call.finish(context);
}

// select_copy(self, dim, index, *, out)
void select_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("select_copy.int_out", stack, 4);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(1), x.ndim);
  const int64_t given = call.integer(2), size = call.ok() ? x.sizes[dim] : 0;
  call.require(given >= -size && given < size, "an index that the dimension has");
  if (call.ok()) {
    const TensorView from = selected(x, dim, given < 0 ? given + size : given);
    call.move(call.out(3, from), from);
  }
  call.finish(context);
}

/// start, end and step of a slice of `size` elements, as Python cuts them.
struct SliceRange {
  int64_t start, length, step;
};

SliceRange slice_range(TensorOpCall& call, size_t first, int64_t size) {
  const auto within = [size](int64_t at) {
    return std::clamp<int64_t>(at < 0 ? at + size : at, 0, size);
  };
  const int64_t start = within(call.integer_or(first, 0));
  const int64_t end = within(call.integer_or(first + 1, size));
  const int64_t step = call.integer(first + 2);
  call.require(step > 0, "a step of at least 1");
  if (!call.ok()) return {0, 0, 1};
  // A longer step than the dimension is never taken, and its stride could pass int64.
  return {start, end > start ? (end - start - 1) / step + 1 : 0,
          std::min(step, std::max<int64_t>(size, 1))};
}

// slice_copy(self, dim, start?, end?, step, *, out)
void slice_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("slice_copy.Tensor_out", stack, 6);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(1), x.ndim);
  const SliceRange range = slice_range(call, 2, x.sizes[dim]);
  const TensorView from = sliced(x, dim, range.start, range.length, range.step);
  call.move(call.out(5, from), from);
  call.finish(context);
}

// narrow_copy(self, dim, start, length, *, out)
void narrow_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("narrow_copy.out", stack, 5);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(1), x.ndim);
  const int64_t size = x.sizes[dim], length = call.integer(3);
  int64_t start = call.integer(2);
  if (start < 0) start += size;
  call.require(start >= 0 && length >= 0 && length <= size && start <= size - length,
               "a start and a length within the dimension");
  if (call.ok()) {
    const TensorView from = sliced(x, dim, start, length);
    call.move(call.out(4, from), from);
  }
  call.finish(context);
}

// diagonal_copy(self, offset, dim1, dim2, *, out)
void diagonal_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("diagonal_copy.out", stack, 5);
  const TensorView x = call.tensor(0);
  call.require(x.ndim >= 2, "a tensor of at least 2 dimensions");
  const int64_t offset = call.integer(1);
  const int row = call.dim(call.integer(2), x.ndim), column = call.dim(call.integer(3), x.ndim);
  call.require(row != column, "two different dimensions");
  call.require(offset >= -kMaxDim && offset <= kMaxDim, "an offset of at most 2147483647");
  if (!call.ok()) return call.finish(context);
  const int64_t first_row = offset < 0 ? -offset : 0, first_column = offset > 0 ? offset : 0;
  const int64_t length =
      std::max<int64_t>(0, std::min(x.sizes[row] - first_row, x.sizes[column] - first_column));
  TensorView diagonal = sliced(sliced(x, row, first_row, length), column, first_column, length);
  diagonal.strides[row] += diagonal.strides[column];  // both step together
  TensorView from = diagonal;
  from.ndim = 0;
  for (int d = 0; d <= x.ndim; ++d) {  // the others in order, then the diagonal
    const int of = d == x.ndim ? row : d;
    if (d == row || d == column) continue;
    from.sizes[from.ndim] = diagonal.sizes[of];
    from.strides[from.ndim++] = diagonal.strides[of];
  }
  call.move(call.out(4, from), from);
  call.finish(context);
}

// unfold_copy(self, dimension, size, step, *, out): windows of a dimension, as a new last dimension
void unfold_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("unfold_copy.out", stack, 5);
  const TensorView x = call.tensor(0);
  const int64_t size = call.integer(2), step = call.integer(3);
  const int dim = call.dim(call.integer(1), x.ndim);
  call.require(x.ndim > 0 && x.ndim < kMaxDims, "a tensor of 1 to 7 dimensions");
  call.require(step > 0 && size >= 0 && size <= x.sizes[dim],
               "a window within the dimension, and a step of at least 1");
  if (call.ok()) {
    TensorView from = sliced(x, dim, 0, (x.sizes[dim] - size) / step + 1,
                             std::min(step, std::max<int64_t>(x.sizes[dim], 1)));
    from.sizes[from.ndim] = size;
    from.strides[from.ndim++] = x.strides[dim];
    call.move(call.out(4, from), from);
  }
  call.finish(context);
}

// as_strided_copy(self, size, stride, storage_offset?, *, out)
void as_strided_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("as_strided_copy.out", stack, 5);
  const TensorView x = call.tensor(0);
  TensorView from = x;
  from.ndim = int(call.integers(1, from.sizes, kMaxDims));
  const int n_strides = int(call.integers(2, from.strides, kMaxDims));
  const int64_t offset = call.integer_or(3, 0);
  call.require(n_strides == from.ndim, "a stride for each size");
  const int64_t offset_bytes_most = int64_t(x.nbytes) / dtype_bytes(x.dtype);
  call.require(offset >= 0 && offset <= offset_bytes_most, "an offset within the tensor");
  if (!call.ok()) return call.finish(context);
  from.nbytes = x.nbytes - uint64_t(offset * dtype_bytes(x.dtype));
  int64_t n = 0;
  call.check(
      check_strided({call.op(), "a view", "the .pte is damaged, export it again"}, from, &n));
  if (call.ok()) {
    if (n > 0) from.data = static_cast<char*>(x.data) + offset * dtype_bytes(x.dtype);
    call.move(call.out(4, from), from);
  }
  call.finish(context);
}

// repeat(self, repeats, *, out): out viewed as [r0, s0, r1, s1, ...]
void repeat_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("repeat.out", stack, 3);
  const TensorView x = call.tensor(0);
  int64_t repeats[kMaxDims], sizes[kMaxDims] = {0};
  const int ndim = int(call.integers(1, repeats, kMaxDims)), missing = ndim - x.ndim;
  call.require(missing >= 0, "a count for each dimension");
  if (!call.ok()) return call.finish(context);
  TensorView pairs = x;
  pairs.ndim = 0;
  const auto add = [&](int64_t size, int64_t stride) {
    if (size == 1) return;
    call.require(pairs.ndim < kMaxDims, "at most 8 dimensions of which more than one is repeated");
    if (!call.ok()) return;
    pairs.sizes[pairs.ndim] = size;
    pairs.strides[pairs.ndim++] = stride;
  };
  for (int d = 0; d < ndim; ++d) {
    const int64_t size = d < missing ? 1 : x.sizes[d - missing];
    call.require(repeats[d] >= 0 && (size == 0 || repeats[d] <= kMaxDim / size),
                 "counts that are not negative");
    if (!call.ok()) return call.finish(context);
    sizes[d] = repeats[d] * size;
    add(repeats[d], 0);
    if (d >= missing) add(size, x.strides[d - missing]);
  }
  const TensorView out = call.out(2, sizes, ndim);
  call.require_contiguous(out);
  if (call.ok()) call.move(reshaped(out, pairs.sizes, pairs.ndim), pairs);
  call.finish(context);
}

/// view as `sizes`, its dimensions in the order of `dims`; sizes are those before the permutation.
TensorView split_and_permuted(const TensorView& view, const int64_t* sizes, const int* dims,
                              int ndim) {
  const TensorView split = reshaped(view, sizes, ndim);
  TensorView permuted = split;
  for (int d = 0; d < ndim; ++d) {
    permuted.sizes[d] = split.sizes[dims[d]];
    permuted.strides[d] = split.strides[dims[d]];
  }
  return permuted;
}

// pixel_shuffle(self, upscale_factor, *, out) [..., C r^2, H, W] -> [..., C, H r, W r], and back
template <bool kUnshuffles>
void pixel_shuffle_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call(kUnshuffles ? "pixel_unshuffle.out" : "pixel_shuffle.out", stack, 3);
  const TensorView x = call.tensor(0);
  const int64_t r = call.integer(1);
  call.require(x.ndim >= 3 && r > 0 && r <= 32767,
               "at least 3 dimensions and a factor of at least 1");
  if (!call.ok()) return call.finish(context);
  const int64_t* last = x.sizes + x.ndim - 3;
  int64_t sizes[kMaxDims], batch = 1;
  for (int d = 0; d < x.ndim; ++d) sizes[d] = x.sizes[d];
  for (int d = 0; d < x.ndim - 3; ++d) batch *= x.sizes[d];
  int64_t* new_last = sizes + x.ndim - 3;
  if (kUnshuffles) {
    call.require(last[1] % r == 0 && last[2] % r == 0, "sides that the factor divides");
    new_last[0] = last[0] * r * r, new_last[1] = last[1] / r, new_last[2] = last[2] / r;
  } else {
    call.require(last[0] % (r * r) == 0, "channels that the square of the factor divides");
    new_last[0] = last[0] / (r * r), new_last[1] = last[1] * r, new_last[2] = last[2] * r;
  }
  const TensorView out = call.out(2, sizes, x.ndim);
  call.require_contiguous(x);
  call.require_contiguous(out);
  if (!call.ok()) return call.finish(context);
  // Both as [batch, C, r, r, H, W].
  const int64_t* wide = kUnshuffles ? last : new_last;  // C, H r, W r
  const int64_t H = wide[1] / r, W = wide[2] / r;
  const int64_t deep_sizes[] = {batch, wide[0], r, r, H, W},
                wide_sizes[] = {batch, wide[0], H, r, W, r};
  const int to_deep[] = {0, 1, 3, 5, 2, 4};
  const TensorView deep = reshaped(kUnshuffles ? out : x, deep_sizes, 6);
  const TensorView flat = split_and_permuted(kUnshuffles ? x : out, wide_sizes, to_deep, 6);
  call.move(kUnshuffles ? deep : flat, kUnshuffles ? flat : deep);
  call.finish(context);
}

// ---- parts of one tensor ----

/// The parts of dimension `dim` of x as the tensors of list `out`.
template <typename Length>
void split(TensorOpCall& call, const TensorView& x, int dim, size_t out, size_t n, Length length) {
  int64_t start = 0;
  for (size_t j = 0; j < n && call.ok(); ++j) {
    const int64_t part = length(j);
    call.require(part >= 0 && part <= x.sizes[dim] - start, "parts that make up the dimension");
    if (!call.ok()) return;
    const TensorView from = sliced(x, dim, start, part);
    call.add_part(call.list_out(out, j, from.sizes, from.ndim), from);
    start += part;
  }
  call.require(start == x.sizes[dim], "parts that make up the dimension");
}

// split_copy(self, split_size, dim, *, out[])
void split_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("split_copy.Tensor_out", stack, 4);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(2), x.ndim);
  const int64_t size = call.integer(1), total = x.sizes[dim];
  call.require(size > 0 || (size == 0 && total == 0), "parts of at least 1");
  if (call.ok())
    split(call, x, dim, 3, call.list_size(3),
          [=](size_t j) { return std::min(size, total - int64_t(j) * size); });
  call.finish(context);
}

// split_with_sizes_copy(self, split_sizes, dim, *, out[])
void split_with_sizes_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("split_with_sizes_copy.out", stack, 4);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(2), x.ndim);
  constexpr size_t kMaxSplits = 256;
  int64_t sizes[kMaxSplits];
  const size_t n = call.integers(1, sizes, kMaxSplits);
  call.require(n == call.list_size(3), "a result for each part");
  if (call.ok()) split(call, x, dim, 3, n, [&](size_t j) { return sizes[j]; });
  call.finish(context);
}

// unbind_copy(self, dim, *, out[])
void unbind_copy_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("unbind_copy.int_out", stack, 3);
  const TensorView x = call.tensor(0);
  call.require(x.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(1), x.ndim);
  const size_t n = call.list_size(2);
  if (call.ok()) call.require(int64_t(n) == x.sizes[dim], "a result for each index");
  for (size_t j = 0; j < n && call.ok(); ++j) {
    const TensorView from = selected(x, dim, int64_t(j));
    call.add_part(call.list_out(2, j, from.sizes, from.ndim), from);
  }
  call.finish(context);
}

// ---- one tensor of several ----

// cat(tensors, dim, *, out)
void cat_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("cat.out", stack, 3);
  const size_t n = call.list_size(0);
  call.require(n > 0, "at least one tensor");
  // An empty tensor of one dimension goes with any others.
  const auto is_legacy_empty = [](const TensorView& x) { return x.ndim == 1 && x.sizes[0] == 0; };
  TensorView first = call.list_tensor(0, 0);
  for (size_t j = 1; j < n && is_legacy_empty(first); ++j) first = call.list_tensor(0, j);
  const int dim = call.dim(call.integer(1), first.ndim);
  call.require(first.ndim > 0, "tensors of at least 1 dimension");
  if (!call.ok()) return call.finish(context);
  TensorView all = first;
  all.sizes[dim] = 0;
  for (size_t j = 0; j < n && call.ok(); ++j) {
    const TensorView x = call.list_tensor(0, j);
    if (!call.ok() || is_legacy_empty(x)) continue;
    for (int d = 0; d < first.ndim; ++d)
      call.require(x.ndim == first.ndim && (d == dim || x.sizes[d] == first.sizes[d]),
                   "tensors of the same sizes but along one dimension");
    all.sizes[dim] += x.sizes[dim];
  }
  const TensorView out = call.out(2, all);
  int64_t start = 0;
  for (size_t j = 0; j < n && call.ok(); ++j) {
    const TensorView x = call.list_tensor(0, j);
    if (is_legacy_empty(x)) continue;
    call.add_part(sliced(out, dim, start, x.sizes[dim]), x);
    start += x.sizes[dim];
  }
  call.finish(context);
}

// stack(tensors, dim, *, out)
void stack_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("stack.out", stack, 3);
  const size_t n = call.list_size(0);
  call.require(n > 0, "at least one tensor");
  const TensorView first = call.list_tensor(0, 0);
  const int dim = call.dim(call.integer(1), first.ndim + 1);
  if (!call.ok()) return call.finish(context);
  int64_t sizes[kMaxDims + 1] = {0};
  for (int d = 0; d < first.ndim; ++d) sizes[d < dim ? d : d + 1] = first.sizes[d];
  sizes[dim] = int64_t(n);
  const TensorView out = call.out(2, sizes, first.ndim + 1);
  for (size_t j = 0; j < n && call.ok(); ++j) {
    const TensorView x = call.list_tensor(0, j);
    call.require(same_sizes(x, first), "tensors of the same sizes");
    if (call.ok()) call.add_part(selected(out, dim, int64_t(j)), x);
  }
  call.finish(context);
}

/// out = self, with src where `part` cuts it.
template <typename Part>
void scatter_part(TensorOpCall& call, const TensorView& self, const TensorView& src,
                  size_t out_index, Part part) {
  const TensorView out = call.out(out_index, self);
  if (!call.ok()) return;
  if (out.data != self.data) call.move(out, self);
  const TensorView to = part(out);
  TensorView from;
  call.require(expanded(src, to.sizes, to.ndim, &from), "a source that broadcasts to the part");
  if (call.ok()) call.move(to, from);
}

// slice_scatter(self, src, dim, start?, end?, step, *, out)
void slice_scatter_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("slice_scatter.out", stack, 7);
  const TensorView self = call.tensor(0), src = call.tensor(1);
  call.require(self.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(2), self.ndim);
  const SliceRange range = slice_range(call, 3, self.sizes[dim]);
  scatter_part(call, self, src, 6, [&](const TensorView& out) {
    return sliced(out, dim, range.start, range.length, range.step);
  });
  call.finish(context);
}

// select_scatter(self, src, dim, index, *, out)
void select_scatter_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("select_scatter.out", stack, 5);
  const TensorView self = call.tensor(0), src = call.tensor(1);
  call.require(self.ndim > 0, "a tensor of at least 1 dimension");
  const int dim = call.dim(call.integer(2), self.ndim);
  const int64_t given = call.integer(3), size = self.sizes[dim];
  call.require(given >= -size && given < size, "an index that the dimension has");
  scatter_part(call, self, src, 4, [&](const TensorView& out) {
    return selected(out, dim, given < 0 ? given + size : given);
  });
  call.finish(context);
}

// ---- other orders and margins: each dimension falls into ranges that are copied ----

struct Range {
  int64_t to, length, from, step;
};

/// Copies all combinations of the ranges of each dimension.
struct Ranges {
  static constexpr int kMaxRanges = 3;
  Range ranges[kMaxDims][kMaxRanges];
  int counts[kMaxDims] = {0};

  void add(int dim, const Range& range) {
    if (range.length > 0) ranges[dim][counts[dim]++] = range;
  }
  void keep(int dim, int64_t size) { add(dim, {0, size, 0, 1}); }

  void move(TensorOpCall& call, const TensorView& to, const TensorView& from, int dim = 0) const {
    if (dim == to.ndim) return call.add_part(to, from);
    for (int i = 0; i < counts[dim]; ++i) {
      const Range& r = ranges[dim][i];
      move(call, sliced(to, dim, r.to, r.length), sliced(from, dim, r.from, r.length, r.step),
           dim + 1);
    }
  }
};

// flip(self, dims, *, out)
void flip_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("flip.out", stack, 3);
  const TensorView x = call.tensor(0);
  int64_t given[kMaxDims];
  const size_t n = call.integers(1, given, kMaxDims);
  TensorView from = x;
  for (size_t i = 0; i < n && call.ok(); ++i) {
    const int dim = call.dim(given[i], x.ndim);
    if (x.ndim > 0 && x.sizes[dim] > 0)
      from = sliced(from, dim, x.sizes[dim] - 1, x.sizes[dim], -1);
  }
  call.move(call.out(2, x), from);
  call.finish(context);
}

// roll(self, shifts, dims, *, out); no dims: of the elements in order
void roll_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("roll.out", stack, 4);
  TensorView x = call.tensor(0);
  int64_t shifts[kMaxDims], dims[kMaxDims];
  const size_t n = call.integers(1, shifts, kMaxDims);
  size_t n_dims = call.integers(2, dims, kMaxDims);
  TensorView out = call.out(3, x);
  if (!call.ok()) return call.finish(context);
  if (n_dims == 0) {
    call.require_contiguous(x);
    call.require_contiguous(out);
    const int64_t all[] = {numel(x)};
    x = reshaped(x, all, 1), out = reshaped(out, all, 1);
    dims[n_dims++] = 0;
  }
  call.require(n == n_dims, "a shift for each dimension");
  int64_t by[kMaxDims] = {0};
  for (size_t i = 0; i < n && call.ok(); ++i) {
    const int dim = call.dim(dims[i], x.ndim);
    if (x.sizes[dim] > 0)
      by[dim] = (by[dim] + shifts[i] % x.sizes[dim] + x.sizes[dim]) % x.sizes[dim];
  }
  Ranges ranges;
  for (int d = 0; d < x.ndim; ++d) {
    ranges.add(d, {by[d], x.sizes[d] - by[d], 0, 1});
    ranges.add(d, {0, by[d], x.sizes[d] - by[d], 1});
  }
  if (call.ok()) ranges.move(call, out, x);
  call.finish(context);
}

/// Margins of the last dimensions: padding[0], padding[1] before and after the last one, and so on.
struct Padding {
  int64_t before[kMaxDims] = {0}, after[kMaxDims] = {0}, sizes[kMaxDims] = {0};

  Padding(TensorOpCall& call, const TensorView& x, size_t i) {
    int64_t given[2 * kMaxDims];
    const int n = int(call.integers(i, given, 2 * kMaxDims));
    call.require(n % 2 == 0 && n / 2 <= x.ndim,
                 "a pair of margins for each of the last dimensions");
    if (!call.ok()) return;
    for (int d = 0; d < n / 2; ++d) {
      before[x.ndim - 1 - d] = given[2 * d];
      after[x.ndim - 1 - d] = given[2 * d + 1];
    }
    for (int d = 0; d < x.ndim; ++d) {
      constexpr int64_t kMost = kMaxDim;
      call.require(
          before[d] >= -kMost && before[d] <= kMost && after[d] >= -kMost && after[d] <= kMost,
          "margins of at most 2147483647");
      if (!call.ok()) return;
      sizes[d] = x.sizes[d] + before[d] + after[d];
      call.require(sizes[d] >= 0, "margins that leave something of the tensor");
    }
  }
};

// constant_pad_nd(self, pad, value, *, out)
void constant_pad_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("constant_pad_nd.out", stack, 4);
  const TensorView x = call.tensor(0);
  const Padding padding(call, x, 1);
  const Number value = number_of(call.scalar(2));
  const TensorView out = call.out(3, padding.sizes, x.ndim);
  TensorView to = out, from = x;
  bool has_margin = false;
  for (int d = 0; d < x.ndim && call.ok(); ++d) {
    const int64_t before = padding.before[d], after = padding.after[d];
    has_margin = has_margin || before > 0 || after > 0;
    const int64_t length = std::max<int64_t>(
        0, x.sizes[d] + std::min<int64_t>(before, 0) + std::min<int64_t>(after, 0));
    to = sliced(to, d, std::max<int64_t>(before, 0), length);
    from = sliced(from, d, std::max<int64_t>(-before, 0), length);
  }
  if (has_margin) call.fill(out, value, number_of(int64_t{0}));
  if (call.ok()) call.move(to, from);
  call.finish(context);
}

/// reflection_padNd, replication_padNd(self, padding, *, out)
template <bool kReflects>
void mirror_pad_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call(kReflects ? "reflection_pad.out" : "replication_pad.out", stack, 3);
  const TensorView x = call.tensor(0);
  const Padding padding(call, x, 1);
  Ranges ranges;
  for (int d = 0; d < x.ndim && call.ok(); ++d) {
    const int64_t size = x.sizes[d], before = padding.before[d], after = padding.after[d];
    const int64_t most = kReflects ? size - 1 : kMaxDim;
    if (before != 0 || after != 0)
      call.require(before >= 0 && after >= 0 && before <= most && after <= most && size > 0,
                   "margins that are not negative and smaller than what they mirror");
    ranges.add(d, kReflects ? Range{0, before, before, -1} : Range{0, before, 0, 0});
    ranges.add(d, {before, size, 0, 1});
    ranges.add(d, kReflects ? Range{before + size, after, size - 2, -1}
                            : Range{before + size, after, size - 1, 0});
  }
  const TensorView out = call.out(2, padding.sizes, x.ndim);
  if (call.ok() && numel(out) > 0) ranges.move(call, out, x);
  call.finish(context);
}

// ---- making tensors ----

// arange(end, *, out) and arange(start, end, step, *, out)
template <size_t kSchema>
void arange_out(KernelRuntimeContext& context, Stack stack) {
  constexpr bool kHasStart = kSchema == 4;
  TensorOpCall call("arange.out", stack, kSchema);
  const Number start = kHasStart ? number_of(call.scalar(0)) : number_of(int64_t{0});
  const Number end = number_of(call.scalar(kHasStart ? 1 : 0));
  const Number step = kHasStart ? number_of(call.scalar(2)) : number_of(int64_t{1});
  const double n = std::ceil((end.as_double - start.as_double) / step.as_double);
  call.require(n >= 0 && n <= double(kMaxDim), "an end that steps from the start reach");
  const int64_t sizes[] = {call.ok() ? int64_t(n) : 0};
  call.fill(call.out(kSchema - 1, sizes, 1), start, step);
  call.finish(context);
}

/// An op(size, ..., out) of `n_schema` arguments that makes a tensor: of zeros, of ones, ...
TensorView out_of_sizes(TensorOpCall& call, size_t n_schema) {
  int64_t sizes[kMaxDims];
  const int ndim = int(call.integers(0, sizes, kMaxDims));
  return call.out(n_schema - 1, sizes, ndim);
}

// empty(size, *, memory_format or dim_order, out)
void empty_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("empty.out", stack, 3);
  out_of_sizes(call, 3);
  call.finish(context);
}

// zeros(size, *, out), ones(size, *, out)
template <int64_t kValue>
void constant_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call(kValue == 0 ? "zeros.out" : "ones.out", stack, 2);
  call.fill(out_of_sizes(call, 2), number_of(kValue), number_of(int64_t{0}));
  call.finish(context);
}

// full(size, fill_value, *, out)
void full_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("full.out", stack, 3);
  const TensorView out = out_of_sizes(call, 3);
  call.fill(out, number_of(call.scalar(1)), number_of(int64_t{0}));
  call.finish(context);
}

// full_like(self, fill_value, *, memory_format, out) and fill(self, value, *, out)
template <size_t kSchema>
void fill_like_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call(kSchema == 4 ? "full_like.out" : "fill.out", stack, kSchema);
  const TensorView out = call.out(kSchema - 1, call.tensor(0));
  if (call.ok() && stack[1]->isTensor()) {
    const TensorView value = call.tensor(1);
    TensorView from;
    call.require(call.ok() && value.ndim == 0, "a value without dimensions");
    if (call.ok() && expanded(value, out.sizes, out.ndim, &from)) call.move(out, from);
  } else {
    call.fill(out, number_of(call.scalar(1)), number_of(int64_t{0}));
  }
  call.finish(context);
}

// scalar_tensor(s, *, out)
void scalar_tensor_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("scalar_tensor.out", stack, 2);
  const Number value = number_of(call.scalar(0));
  call.fill(call.out(1, nullptr, 0), value, number_of(int64_t{0}));
  call.finish(context);
}

// tril(self, diagonal, *, out)
void tril_out(KernelRuntimeContext& context, Stack stack) {
  TensorOpCall call("tril.out", stack, 3);
  const TensorView x = call.tensor(0);
  const int64_t diagonal = call.integer(1);
  call.require(x.ndim >= 2, "a tensor of at least 2 dimensions");
  const TensorView out = call.out(2, x);
  call.require(out.dtype == x.dtype, "a result of the tensor's dtype");
  call.require_contiguous(x);
  call.require_contiguous(out);
  if (const TensorKernels* table = call.kernels())
    call.check(table->tril({call.op(), out, x, diagonal}, current_execution()));
  call.finish(context);
}

constexpr CudaOp kOps[] = {
    {"aten::_conj_physical.out", &copy_out<2>},
    {"aten::_to_copy.out", &copy_out<4>},
    {"aten::alias_copy.out", &copy_out<2>},
    {"aten::arange.out", &arange_out<2>},
    {"aten::arange.start_out", &arange_out<4>},
    {"aten::as_strided_copy.out", &as_strided_copy_out},
    {"aten::cat.out", &cat_out},
    {"aten::clone.out", &copy_out<3>},
    {"aten::constant_pad_nd.out", &constant_pad_out},
    {"aten::copy.out", &copy_src<4>},
    {"aten::copy_", &copy_src<3>},
    {"aten::detach_copy.out", &copy_out<2>},
    {"aten::diagonal_copy.out", &diagonal_copy_out},
    {"aten::empty.out", &empty_out},
    {"aten::expand_copy.out", &expand_copy_out},
    {"aten::fill.Scalar_out", &fill_like_out<3>},
    {"aten::fill.Tensor_out", &fill_like_out<3>},
    {"aten::flip.out", &flip_out},
    {"aten::full.out", &full_out},
    {"aten::full_like.out", &fill_like_out<4>},
    {"aten::lift_fresh_copy.out", &copy_out<2>},
    {"aten::narrow_copy.out", &narrow_copy_out},
    {"aten::ones.out", &constant_out<1>},
    {"aten::permute_copy.out", &permute_copy_out},
    {"aten::pixel_shuffle.out", &pixel_shuffle_out<false>},
    {"aten::pixel_unshuffle.out", &pixel_shuffle_out<true>},
    {"aten::reflection_pad1d.out", &mirror_pad_out<true>},
    {"aten::reflection_pad2d.out", &mirror_pad_out<true>},
    {"aten::repeat.out", &repeat_out},
    {"aten::replication_pad1d.out", &mirror_pad_out<false>},
    {"aten::replication_pad2d.out", &mirror_pad_out<false>},
    {"aten::roll.out", &roll_out},
    {"aten::scalar_tensor.out", &scalar_tensor_out},
    {"aten::select_copy.int_out", &select_copy_out},
    {"aten::select_scatter.out", &select_scatter_out},
    {"aten::slice_copy.Tensor_out", &slice_copy_out},
    {"aten::slice_scatter.out", &slice_scatter_out},
    {"aten::split_copy.Tensor_out", &split_copy_out},
    {"aten::split_with_sizes_copy.out", &split_with_sizes_copy_out},
    {"aten::squeeze_copy.dim_out", &squeeze_copy_out},
    {"aten::squeeze_copy.dims_out", &squeeze_copy_out},
    {"aten::stack.out", &stack_out},
    {"aten::t_copy.out", &t_copy_out},
    {"aten::transpose_copy.int_out", &transpose_copy_out},
    {"aten::tril.out", &tril_out},
    {"aten::unbind_copy.int_out", &unbind_copy_out},
    {"aten::unfold_copy.out", &unfold_copy_out},
    {"aten::unsqueeze_copy.out", &unsqueeze_copy_out},
    {"aten::view_copy.out", &view_copy_out},
    {"aten::zeros.out", &constant_out<0>},
    {"dim_order_ops::_clone_dim_order.out", &copy_out<4>},
    {"dim_order_ops::_empty_dim_order.out", &empty_out},
    {"dim_order_ops::_to_dim_order_copy.out", &copy_out<4>},
};

}  // namespace

CudaOps cuda_shape_ops() { return {kOps, std::size(kOps)}; }

}  // namespace cuda_int4
