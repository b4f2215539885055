#include "op_table.h"

#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checked_prim_ops.h"
#include "cuda_ops.h"
#include "errors.h"
#include "forwarded_ops.h"
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
  static const OpFunction kernel = find_forwarded("aten::index_put_");
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
  if (op == "dense_linear.out") return find_forwarded("aten::linear.out");
  if (op == "index_put_") return &checked_index_put;
  return find_forwarded(forwarded_graph_name(op));
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
    std::vector<std::string> names = forwarded_ops();
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
