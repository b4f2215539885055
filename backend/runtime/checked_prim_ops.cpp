#include "checked_prim_ops.h"

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <array>
#include <cstdint>

#include "errors.h"
#include "op_table.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::OpFunction;
using executorch::runtime::Span;

namespace {

constexpr char kView[] = "executorch_prim::et_view.default";
constexpr char kCopyIndex[] = "executorch_prim::et_copy_index.tensor";
constexpr char kSize[] = "aten::sym_size.int";
constexpr char kNumel[] = "aten::sym_numel";
constexpr char kFloorDivide[] = "executorch_prim::floordiv.Scalar";
constexpr char kFloorDivideInt[] = "executorch_prim::floordiv.int";
constexpr char kModulo[] = "executorch_prim::mod.Scalar";
constexpr char kModuloInt[] = "executorch_prim::mod.int";

void wrong(KernelRuntimeContext& context, const char* op, const char* expected) {
  context.fail(fail(Error::InvalidProgram,
                    "%s: expected %s, found others; the .pte is damaged, export it again", op,
                    expected));
}

template <const char* kName>
void run(KernelRuntimeContext& context, Span<EValue*> stack) {
  static const OpFunction kernel = find_registered(kName);
  kernel(context, stack);
}

void view(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr int64_t kMaxViewDims = 16;  // ExecuTorch's own
  if (stack.size() != 3 || !stack[0]->isTensor() || !stack[1]->tryToIntList().ok() ||
      !stack[2]->isTensor() ||
      stack[0]->toTensor().scalar_type() != stack[2]->toTensor().scalar_type() ||
      stack[2]->toTensor().dim() > kMaxViewDims)
    return wrong(context, kView, "a tensor, sizes and a view of the tensor's dtype");
  run<kView>(context, stack);
}

/// to[index] = from
void copy_index(KernelRuntimeContext& context, Span<EValue*> stack) {
  bool is_right = stack.size() == 3 && stack[0]->isTensor() && stack[1]->isTensor() &&
                  stack[2]->isInt() && stack[2]->toInt() >= 0;
  if (is_right) {
    const auto to = stack[0]->toTensor(), from = stack[1]->toTensor();
    is_right = to.scalar_type() == from.scalar_type() && to.dim() == from.dim() + 1;
    for (int64_t d = 0; is_right && d < from.dim(); ++d) is_right = to.size(d + 1) == from.size(d);
  }
  if (!is_right)
    return wrong(context, kCopyIndex, "a tensor, one like its rows and the number of a row");
  auto to = stack[0]->toTensor();
  const auto from = stack[1]->toTensor();
  const int64_t index = stack[2]->toInt();
  // It grows to the row, and ExecuTorch aborts where the memory planned for it does not reach so far.
  std::array<executorch::aten::SizesType, executorch::runtime::kTensorDimensionLimit> sizes = {};
  bool has_room = index < INT32_MAX && to.dim() <= int64_t(sizes.size());
  if (has_room) {
    sizes[0] = executorch::aten::SizesType(index + 1);
    for (int64_t d = 0; d < from.dim(); ++d) sizes[size_t(d) + 1] = to.size(d + 1);
    has_room =
        executorch::runtime::resize_tensor(to, {sizes.data(), size_t(to.dim())}) == Error::Ok;
  }
  if (!has_room || (to.nbytes() > 0 && (to.const_data_ptr() == nullptr ||
                                        (from.nbytes() > 0 && from.const_data_ptr() == nullptr))))
    return context.fail(fail(Error::InvalidProgram,
                             "%s: expected the number of a row that memory is planned for, got "
                             "%lld; the .pte is damaged, export it again",
                             kCopyIndex, static_cast<long long>(index)));
  run<kCopyIndex>(context, stack);
}

void size(KernelRuntimeContext& context, Span<EValue*> stack) {
  const bool is_right = stack.size() == 3 && stack[0]->isTensor() && stack[1]->isInt();
  const int64_t ndim = is_right ? stack[0]->toTensor().dim() : 0;
  if (!is_right || stack[1]->toInt() < -ndim || stack[1]->toInt() >= ndim)
    return wrong(context, kSize, "a tensor and the number of a dimension that it has");
  run<kSize>(context, stack);
}

void numel(KernelRuntimeContext& context, Span<EValue*> stack) {
  if (stack.size() != 2 || !stack[0]->isTensor()) return wrong(context, kNumel, "a tensor");
  run<kNumel>(context, stack);
}

/// Quotients and remainders of ints: none by 0, and not the one that int64 does not hold.
template <const char* kName>
void divide(KernelRuntimeContext& context, Span<EValue*> stack) {
  if (stack.size() == 3 && stack[0]->isInt() && stack[1]->isInt()) {
    const int64_t by = stack[1]->toInt();
    if (by == 0 || (by == -1 && stack[0]->toInt() == INT64_MIN))
      return context.fail(fail(Error::InvalidArgument,
                               "%s: expected a divisor other than 0 of a size, got %lld / %lld; "
                               "run with sizes the model was exported for",
                               kName, static_cast<long long>(stack[0]->toInt()),
                               static_cast<long long>(by)));
  }
  run<kName>(context, stack);
}

struct Checked {
  const char* name;
  OpFunction kernel;
};

constexpr Checked kChecked[] = {
    {kView, &view},
    {kCopyIndex, &copy_index},
    {kSize, &size},
    {kNumel, &numel},
    {kFloorDivide, &divide<kFloorDivide>},
    {kFloorDivideInt, &divide<kFloorDivideInt>},
    {kModulo, &divide<kModulo>},
    {kModuloInt, &divide<kModuloInt>},
};

}  // namespace

OpFunction find_checked_prim_op(std::string_view name) {
  for (const Checked& op : kChecked)
    if (name == op.name) return op.kernel;
  return nullptr;
}

}  // namespace cuda_int4
