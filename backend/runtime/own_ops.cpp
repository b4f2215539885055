#include "own_ops.h"

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include "../kernels/ops.h"
#include "errors.h"
#include "parallel.h"
#include "tensor_bridge.h"

namespace cuda_int4 {

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

namespace {

/// Takes the arguments of one call apart without ever asserting on what a damaged file put there.
/// After the first wrong one, error() is set and the rest come back empty.
class Arguments {
 public:
  Arguments(const char* op, Span<EValue*> stack, size_t n_schema) : op_(op), stack_(stack) {
    // The emitter appends what an out variant returns, which is `out` again.
    if (stack.size() != n_schema && stack.size() != n_schema + 1)
      error_ =
          fail(Error::InvalidProgram,
               "cuda_int4::%s: expected %zu arguments, got %zu; the .pte is damaged, export it "
               "again",
               op, n_schema, stack.size());
  }

  Error error() const { return error_; }

  TensorView tensor(size_t i) {
    TensorView view = absent_view();
    const EValue* value = at(i);
    if (value == nullptr) return view;
    auto t = value->tryToTensor();
    if (!t.ok() || !view_of(t.get(), &view)) wrong(i, "a tensor");
    return view;
  }
  TensorView optional_tensor(size_t i) {
    const EValue* value = at(i);
    return value == nullptr || value->isNone() ? absent_view() : tensor(i);
  }
  int64_t integer(size_t i) {
    const EValue* value = at(i);
    auto v = value == nullptr ? Error::InvalidType : value->tryToInt();
    return v.ok() ? v.get() : (wrong(i, "an int"), 0);
  }
  double number(size_t i) {
    const EValue* value = at(i);
    if (value != nullptr && value->isInt()) return double(value->toInt());
    auto v = value == nullptr ? Error::InvalidType : value->tryToDouble();
    return v.ok() ? v.get() : (wrong(i, "a float"), 0.0);
  }
  bool boolean(size_t i) {
    const EValue* value = at(i);
    auto v = value == nullptr ? Error::InvalidType : value->tryToBool();
    return v.ok() ? v.get() : (wrong(i, "a bool"), false);
  }
  /// Strings of a program are followed by a NUL.
  const char* string(size_t i) {
    const EValue* value = at(i);
    auto v = value == nullptr ? Error::InvalidType : value->tryToString();
    return v.ok() ? v.get().data() : (wrong(i, "a string"), "");
  }

  /// The out tensor, resized to the sizes of `like` with `last` (if >= 0) for the last dimension.
  TensorView out(size_t i, const TensorView& like, int64_t last = -1) {
    TensorView view = absent_view();
    const EValue* value = at(i);
    if (value == nullptr) return view;
    auto t = value->tryToTensor();
    if (!t.ok()) {
      wrong(i, "a tensor");
      return view;
    }
    SizesType sizes[kMaxDims] = {0};
    for (int d = 0; d < like.ndim; ++d) sizes[d] = SizesType(like.sizes[d]);
    if (last >= 0 && like.ndim > 0) sizes[like.ndim - 1] = SizesType(last);
    Tensor tensor = t.get();
    if (executorch::runtime::resize_tensor(tensor, {sizes, size_t(like.ndim)}) != Error::Ok) {
      error_ = fail(Error::InvalidArgument,
                    "cuda_int4::%s: the result does not fit the memory planned for it; run with at "
                    "most the sizes the model was exported for",
                    op_);
      return view;
    }
    if (!view_of(tensor, &view)) wrong(i, "a tensor of a known dtype");
    return view;
  }

 private:
  const EValue* at(size_t i) const {
    return error_ == Error::Ok && i < stack_.size() ? stack_[i] : nullptr;
  }
  void wrong(size_t i, const char* expected) {
    if (error_ != Error::Ok) return;  // the first one is what went wrong
    error_ = fail(Error::InvalidProgram,
                  "cuda_int4::%s: expected argument %zu to be %s; the .pte is damaged, export it "
                  "again",
                  op_, i, expected);
  }

  const char* op_;
  Span<EValue*> stack_;
  Error error_ = Error::Ok;
};

/// Validation, scratch from the method's temporary memory, the kernel.
template <typename Args>
Error run_on_cpu(KernelRuntimeContext& context, const Args& args, Status (*validate)(const Args&),
                 uint64_t (*scratch_bytes)(const Args&, DeviceKind),
                 Status (*run)(const Args&, const ExecutionContext&)) {
  const Error invalid = fail(validate(args));
  if (invalid != Error::Ok) return invalid;
  ExecutionContext execution{DeviceKind::kCpu, nullptr, &parallel_for, nullptr, 0};
  const uint64_t nbytes = scratch_bytes == nullptr ? 0 : scratch_bytes(args, DeviceKind::kCpu);
  if (nbytes > 0) {
    constexpr size_t kAlign = 64;
    auto scratch = context.allocate_temp(nbytes, kAlign);
    if (!scratch.ok())
      return fail(Error::MemoryAllocationFailed, "out of memory for %llu bytes of scratch",
                  static_cast<unsigned long long>(nbytes));
    execution.scratch = scratch.get();
    execution.scratch_bytes = nbytes;
  }
  return fail(run(args, execution));
}

void finish(KernelRuntimeContext& context, Error error) {
  if (error != Error::Ok) context.fail(error);
}

// linear(x, qdata, scale, zero_point?, meta?, bias?, group_size, layout_tag, activation, *, out)
void linear_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  Arguments a("linear.out", stack, 10);
  LinearArgs args{};
  args.x = a.tensor(0);
  args.qdata = a.tensor(1);
  args.scale = a.tensor(2);
  args.zero_point = a.optional_tensor(3);
  args.meta = a.optional_tensor(4);
  args.bias = a.optional_tensor(5);
  args.group_size = a.integer(6);
  args.layout_tag = a.string(7);
  args.activation = a.string(8);
  // N is not the layout's to tell: out was planned as [..., N], validate_linear checks it.
  const TensorView planned = a.tensor(9);
  if (a.error() == Error::Ok && planned.ndim > 0)
    args.y = a.out(9, args.x, planned.sizes[planned.ndim - 1]);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_on_cpu(context, args, &validate_linear, &linear_scratch_bytes, &linear));
}

// attention(q, k, v, mask?, scale, is_causal, *, out)
void attention_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  Arguments a("attention.out", stack, 7);
  AttentionArgs args{};
  args.q = a.tensor(0);
  args.k = a.tensor(1);
  args.v = a.tensor(2);
  args.mask = a.optional_tensor(3);
  args.scale = a.number(4);
  args.is_causal = a.boolean(5);
  args.y = a.out(6, args.q);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context,
         run_on_cpu(context, args, &validate_attention, &attention_scratch_bytes, &attention));
}

// rms_norm(x, weight?, eps, *, out)
void rms_norm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  Arguments a("rms_norm.out", stack, 4);
  RmsNormArgs args{};
  args.x = a.tensor(0);
  args.weight = a.optional_tensor(1);
  args.eps = a.number(2);
  args.y = a.out(3, args.x);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_on_cpu<RmsNormArgs>(context, args, &validate_rms_norm, nullptr, &rms_norm));
}

// silu(x, *, out)
void silu_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  Arguments a("silu.out", stack, 2);
  SiluArgs args{};
  args.x = a.tensor(0);
  args.y = a.out(1, args.x);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_on_cpu<SiluArgs>(context, args, &validate_silu, nullptr, &silu));
}

constexpr OwnOp kOwnOps[] = {
    {"attention.out", &attention_out},
    {"linear.out", &linear_out},
    {"rms_norm.out", &rms_norm_out},
    {"silu.out", &silu_out},
};

}  // namespace

Span<const OwnOp> own_ops() { return {kOwnOps, std::size(kOwnOps)}; }

}  // namespace cuda_int4
