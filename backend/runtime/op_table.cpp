#include "op_table.h"

#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checked_prim_ops.h"
#include "cuda_ops.h"
#include "errors.h"
#include "op_arguments.h"
#include "own_ops.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::OpFunction;
using executorch::runtime::Span;

namespace {

// Generic ops, forwarded to ExecuTorch's optimised or portable kernels. Left out on purpose: random
// numbers (no seed in the graph), outputs whose shape hangs on data (nonzero, masked_select,
// repeat_interleave), backward ops, and distances and transforms that no decoder or encoder has.
// clang-format off
constexpr const char* kAtenOps[] = {
    // elementwise, one operand
    "_conj_physical.out", "abs.out", "acos.out", "acosh.out", "asin.out", "asinh.out", "atan.out",
    "atanh.out", "bitwise_not.out", "ceil.out", "clamp.out", "cos.out", "cosh.out", "elu.out",
    "erf.out", "exp.out", "expm1.out", "floor.out", "gelu.out", "glu.out", "hardtanh.out",
    "isinf.out", "isnan.out", "leaky_relu.out", "log.out", "log10.out", "log1p.out", "log2.out",
    "logical_not.out", "logit.out", "neg.out", "reciprocal.out", "relu.out", "round.out",
    "rsqrt.out", "sigmoid.out", "sign.out", "sin.out", "sinh.out", "sqrt.out", "tan.out",
    "tanh.out", "trunc.out",
    // elementwise, two operands
    "add.Scalar_out", "add.out", "atan2.out", "bitwise_and.Scalar_out", "bitwise_and.Tensor_out",
    "bitwise_left_shift.Tensor_Scalar_out", "bitwise_left_shift.Tensor_out",
    "bitwise_or.Scalar_out", "bitwise_or.Tensor_out", "bitwise_right_shift.Tensor_Scalar_out",
    "bitwise_right_shift.Tensor_out", "bitwise_xor.Scalar_out", "bitwise_xor.Tensor_out",
    "clamp.Tensor_out", "div.Scalar_mode_out", "div.Scalar_out", "div.out", "div.out_mode",
    "floor_divide.out", "fmod.Scalar_out", "fmod.Tensor_out", "logical_and.out", "logical_or.out",
    "logical_xor.out", "maximum.out", "minimum.out", "mul.Scalar_out", "mul.out", "pow.Scalar_out",
    "pow.Tensor_Scalar_out", "pow.Tensor_Tensor_out", "remainder.Scalar_out",
    "remainder.Tensor_out", "rsub.Scalar_out", "sub.Scalar_out", "sub.out",
    // comparisons and choice
    "eq.Scalar_out", "eq.Tensor_out", "ge.Scalar_out", "ge.Tensor_out", "gt.Scalar_out",
    "gt.Tensor_out", "le.Scalar_out", "le.Tensor_out", "lt.Scalar_out", "lt.Tensor_out",
    "masked_fill.Scalar_out", "ne.Scalar_out", "ne.Tensor_out", "where.self_out",
    // reductions and order
    "amax.out", "amin.out", "any.all_out", "any.dims_out", "any.out", "argmax.out", "argmin.out",
    "cumsum.out", "max.dim_max", "max.unary_out", "mean.dtype_out", "mean.out", "min.dim_min",
    "min.unary_out", "prod.int_out", "prod.out", "sum.IntList_out", "topk.values",
    "var.correction_out", "var.out", "var_mean.correction_out", "_log_softmax.out", "_softmax.out",
    // products, norms, convolutions, pooling
    "_adaptive_avg_pool2d.out", "_native_batch_norm_legit_no_training.out", "addmm.out",
    "avg_pool2d.out", "bmm.out", "convolution.out", "linear.out", "max_pool2d_with_indices.out",
    "mm.out", "native_group_norm.out", "native_layer_norm.out",
    // reading and writing by index
    "embedding.out", "gather.out", "index.Tensor_out", "index_put.out", "index_put_",
    "index_select.out", "scatter.src_out", "scatter.value_out", "scatter_add.out",
    "select_scatter.out", "slice_scatter.out", "_local_scalar_dense",
    // shape and copies
    "_to_copy.out", "alias_copy.out", "as_strided_copy.out", "cat.out", "clone.out",
    "constant_pad_nd.out", "copy.out", "copy_", "detach_copy.out", "diagonal_copy.out",
    "expand_copy.out", "flip.out", "lift_fresh_copy.out", "narrow_copy.out", "permute_copy.out",
    "pixel_shuffle.out", "pixel_unshuffle.out", "reflection_pad1d.out", "reflection_pad2d.out",
    "repeat.out", "replication_pad1d.out", "replication_pad2d.out", "roll.out",
    "select_copy.int_out", "slice_copy.Tensor_out", "split_copy.Tensor_out",
    "split_with_sizes_copy.out", "squeeze_copy.dim_out", "squeeze_copy.dims_out", "stack.out",
    "t_copy.out", "transpose_copy.int_out", "tril.out", "unbind_copy.int_out", "unfold_copy.out",
    "unsqueeze_copy.out", "upsample_bilinear2d.vec_out", "upsample_nearest2d.vec_out",
    "view_copy.out",
    // making tensors
    "arange.out", "arange.start_out", "empty.out", "fill.Scalar_out", "fill.Tensor_out", "full.out",
    "full_like.out", "ones.out", "scalar_tensor.out", "zeros.out",
};
// clang-format on

constexpr const char* kDimOrderOps[] = {
    "_clone_dim_order.out",
    "_empty_dim_order.out",
    "_to_dim_order_copy.out",
};

struct Forwarded {
  const char* graph_namespace;  // renamed to cuda_int4:: in a nested program
  Span<const char* const> ops;
};

const Forwarded kForwarded[] = {
    {"aten::", {kAtenOps, std::size(kAtenOps)}},
    {"dim_order_ops::", {kDimOrderOps, std::size(kDimOrderOps)}},
};

// Names that stay as they are in a nested program, and all of whose ops are taken: they touch
// shapes and numbers, and (et_view, et_copy_index) pointers.
constexpr std::string_view kKeptNames[] = {"aten::sym_", "executorch_prim::"};

bool is_kept(std::string_view name) {
  for (const std::string_view prefix : kKeptNames)
    if (name.substr(0, prefix.size()) == prefix) return true;
  return false;
}

/// ExecuTorch's kernel aborts on values with fewer dimensions than the tensor that they go into. Our
/// export gives them as many (passes/widen_index_put.py); a file of another making may not.
void checked_index_put(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("index_put_", stack, 4);
  const TensorView self = a.tensor(0), values = a.tensor(2);
  if (a.error() == Error::Ok && values.ndim != self.ndim)
    a.set_error(fail(Error::InvalidProgram,
                     "cuda_int4::index_put_: expected values of %d dimensions, as the tensor has, "
                     "got %d; export the model again",
                     self.ndim, values.ndim));
  if (a.error() != Error::Ok) return context.fail(a.error());
  static const OpFunction kernel = find_registered("aten::index_put_");
  kernel(context, stack);
}

constexpr std::string_view kOurs = "cuda_int4::";

OpFunction find_kept(std::string_view name) {
  const OpFunction kernel = find_registered(name);
  const OpFunction checked = find_checked_prim_op(name);
  return kernel != nullptr && checked != nullptr ? checked : kernel;
}

/// Kept names that read or move tensor data on the host are not for device memory.
bool runs_on_shapes(std::string_view name) {
  return name.find("::et_copy_index") == std::string_view::npos;
}

/// "aten::mul.out" -> "mul.out", "aten::linear.out" -> "dense_linear.out": linear.out is ours.
std::string_view nested_op_name(std::string_view graph_name) {
  if (graph_name == "aten::linear.out") return "dense_linear.out";
  return graph_name.substr(graph_name.find("::") + 2);
}

std::string one_to_a_line(std::vector<std::string> names) {
  for (const OwnOp& own : own_ops()) names.push_back(std::string(kOurs) + own.name);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  std::string text;
  for (const std::string& name : names) text += name + "\n";
  return text;
}

}  // namespace

OpFunction find_registered(std::string_view name) {
  for (const Kernel& kernel : executorch::runtime::get_registered_kernels())
    if (kernel.kernel_key_.is_fallback() && name == kernel.name_) return kernel.op_;
  return nullptr;
}

OpFunction find_cpu_kernel(std::string_view nested_name) {
  if (is_kept(nested_name)) return find_kept(nested_name);
  if (nested_name.substr(0, kOurs.size()) != kOurs) return nullptr;
  const std::string_view op = nested_name.substr(kOurs.size());
  for (const OwnOp& own : own_ops())
    if (op == own.name) return own.kernel;
  if (op == "dense_linear.out") return find_registered("aten::linear.out");
  if (op == "index_put_") return &checked_index_put;
  for (const Forwarded& forwarded : kForwarded)
    for (const char* name : forwarded.ops)
      if (op == name) return find_registered(std::string(forwarded.graph_namespace) + name);
  return nullptr;
}

OpFunction find_cuda_kernel(std::string_view nested_name) {
  if (is_kept(nested_name)) return runs_on_shapes(nested_name) ? find_kept(nested_name) : nullptr;
  if (nested_name.substr(0, kOurs.size()) != kOurs) return nullptr;
  const std::string_view op = nested_name.substr(kOurs.size());
  for (const OwnOp& own : own_ops())
    if (op == own.name) return own.kernel;
  for (const Span<const CudaOp>& family : cuda_op_families())
    for (const CudaOp& cuda_op : family)
      if (op == nested_op_name(cuda_op.graph_name)) return cuda_op.kernel;
  return nullptr;
}

const std::string& supported_ops(DeviceKind device) {
  static const std::string cpu = [] {
    std::vector<std::string> names;
    for (const Forwarded& forwarded : kForwarded)
      for (const char* op : forwarded.ops) {
        std::string name = std::string(forwarded.graph_namespace) + op;
        if (find_registered(name) != nullptr) names.push_back(std::move(name));
      }
    for (const Kernel& kernel : executorch::runtime::get_registered_kernels())
      if (is_kept(kernel.name_)) names.emplace_back(kernel.name_);
    return one_to_a_line(std::move(names));
  }();
  static const std::string cuda = [] {
    std::vector<std::string> names;
    for (const Span<const CudaOp>& family : cuda_op_families())
      for (const CudaOp& op : family) names.emplace_back(op.graph_name);
    for (const Kernel& kernel : executorch::runtime::get_registered_kernels())
      if (is_kept(kernel.name_) && runs_on_shapes(kernel.name_)) names.emplace_back(kernel.name_);
    return one_to_a_line(std::move(names));
  }();
  return device == DeviceKind::kCpu ? cpu : cuda;
}

}  // namespace cuda_int4
