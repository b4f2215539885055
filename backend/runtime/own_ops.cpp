#include "own_ops.h"

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <cstring>
#include <type_traits>

#include "../kernels/ops.h"
#include "errors.h"
#include "execution.h"
#include "op_arguments.h"
#include "shared_activation.h"
#include "tensor_bridge.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

namespace {

/// Ops that write y as int8 too, where ExecutionContext has quantized_y.
template <typename Args>
constexpr bool kQuantizesY =
    std::is_same_v<Args, RmsNormArgs> || std::is_same_v<Args, AddRmsNormArgs> ||
    std::is_same_v<Args, GateMulArgs>;

/// Validation, scratch from the method's temporary memory, the kernel, on the device that runs now.
/// `shared`: x of a linear; y of an op that can write it as int8 too.
template <typename Args>
Error run_op(KernelRuntimeContext& context, const Args& args, Status (*validate)(const Args&),
             uint64_t (*scratch_bytes)(const Args&, DeviceKind),
             Status (*run)(const Args&, const ExecutionContext&), const EValue* shared = nullptr) {
  const Error invalid = fail(validate(args));
  if (invalid != Error::Ok) return invalid;
  ExecutionContext execution = current_execution();
  SharedActivation* activation = current_shared_activation();
  if (activation != nullptr && shared != nullptr) {
    Error error = Error::Ok;
    if constexpr (std::is_same_v<Args, LinearArgs>) {
      if (std::strcmp(args.activation, "int8") == 0)
        error = activation->give(shared, args, &execution);
    } else if constexpr (kQuantizesY<Args>) {
      error = activation->take(shared, args.y, &execution);
    }
    if (error != Error::Ok) return error;
  }
  if (scratch_bytes != nullptr) {
    const Error error = give_scratch(context, scratch_bytes(args, execution.device), &execution);
    if (error != Error::Ok) return error;
  }
  const Error error = fail(run(args, execution));
  if (error != Error::Ok && activation != nullptr) activation->forget();  // maybe nobody wrote it
  return error;
}

void finish(KernelRuntimeContext& context, Error error) {
  if (error != Error::Ok) context.fail(error);
}

// linear(x, qdata, scale, zero_point?, meta?, bias?, group_size, layout_tag, activation,
//        out_features?, *, out)
void linear_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  // In files from before layouts that pad N, argument 9 is out.
  const bool has_out_features = stack.size() < 10 || stack[9] == nullptr || !stack[9]->isTensor();
  const size_t out = has_out_features ? 10 : 9;
  OpArguments a("linear.out", stack, out + 1);
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
  if (has_out_features) args.out_features = a.integer_or(9, 0);
  // N is not the layout's to tell: out was planned as [..., N], validate_linear checks it.
  const TensorView planned = a.tensor(out);
  if (a.error() == Error::Ok && planned.ndim > 0)
    args.y = a.out(out, args.x, planned.sizes[planned.ndim - 1]);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context,
         run_op(context, args, &validate_linear, &linear_scratch_bytes, &linear, stack[0]));
}

// attention(q, k, v, mask?, scale, is_causal, softcap, input_pos?, window, merge_heads, k_scale?,
//           v_scale?, *, out)
void attention_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  // In files from before the soft cap, argument 6 is out; before positions, 7 of 8 or 9.
  const bool has_softcap = stack.size() < 7 || stack[6] == nullptr || !stack[6]->isTensor();
  const bool has_positions = has_softcap && stack.size() > 9;
  const size_t out = has_positions ? 12 : has_softcap ? 7 : 6;
  OpArguments a("attention.out", stack, out + 1);
  AttentionArgs args{};
  args.q = a.tensor(0);
  args.k = a.tensor(1);
  args.v = a.tensor(2);
  args.mask = a.optional_tensor(3);
  args.scale = a.number(4);
  args.is_causal = a.boolean(5);
  if (has_softcap) args.softcap = a.number(6);
  args.input_pos = has_positions ? a.optional_tensor(7) : absent_view();
  args.k_scale = has_positions ? a.optional_tensor(10) : absent_view();
  args.v_scale = has_positions ? a.optional_tensor(11) : absent_view();
  if (has_positions) {
    args.window = a.integer(8);
    args.merge_heads = a.boolean(9);
  }
  if (args.merge_heads && args.q.ndim == 4) {
    const int64_t* q_sizes = args.q.sizes;
    int64_t width = 0;
    if (__builtin_mul_overflow(q_sizes[1], q_sizes[3], &width)) width = -1;
    const int64_t sizes[] = {q_sizes[0], q_sizes[2], width};
    args.y = a.out(out, sizes, 3);
  } else {
    args.y = a.out(out, args.q);
  }
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_op(context, args, &validate_attention, &attention_scratch_bytes, &attention));
}

// rms_norm(x, weight?, eps, *, out)
void rms_norm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("rms_norm.out", stack, 4);
  RmsNormArgs args{};
  args.x = a.tensor(0);
  args.weight = a.optional_tensor(1);
  args.eps = a.number(2);
  args.y = a.out(3, args.x);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context,
         run_op<RmsNormArgs>(context, args, &validate_rms_norm, nullptr, &rms_norm, stack[3]));
}

// silu(x, *, out)
void silu_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("silu.out", stack, 2);
  SiluArgs args{};
  args.x = a.tensor(0);
  args.y = a.out(1, args.x);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_op<SiluArgs>(context, args, &validate_silu, nullptr, &silu));
}

// add_rms_norm(x, residual, weight?, x_norm?, eps, *, sum, y)
void add_rms_norm_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("add_rms_norm.out", stack, 7);
  AddRmsNormArgs args{};
  args.x = a.tensor(0);
  args.residual = a.tensor(1);
  args.weight = a.optional_tensor(2);
  args.x_norm = a.optional_tensor(3);
  args.eps = a.number(4);
  args.sum = a.out(5, args.x);
  args.y = a.out(6, args.x);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context, run_op<AddRmsNormArgs>(context, args, &validate_add_rms_norm, nullptr,
                                         &add_rms_norm, stack[6]));
}

// gate_mul(gate_up, activation, *, out)
void gate_mul_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("gate_mul.out", stack, 3);
  GateMulArgs args{};
  args.gate_up = a.tensor(0);
  args.activation = a.string(1);
  const int ndim = args.gate_up.ndim;
  if (a.error() == Error::Ok)
    args.y = a.out(2, args.gate_up, ndim > 0 ? args.gate_up.sizes[ndim - 1] / 2 : -1);
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context,
         run_op<GateMulArgs>(context, args, &validate_gate_mul, nullptr, &gate_mul, stack[2]));
}

// rope_append(k_cache!, v_cache!, qkv, cos, sin, input_pos, q_norm?, k_norm?, n_heads, interleaved,
//             eps, k_scale!?, v_scale!?, *, out)
void rope_append_out(KernelRuntimeContext& context, Span<EValue*> stack) {
  OpArguments a("rope_append.out", stack, 14);
  RopeAppendArgs args{};
  args.k_cache = a.tensor(0);
  args.v_cache = a.tensor(1);
  args.qkv = a.tensor(2);
  args.cos = a.tensor(3);
  args.sin = a.tensor(4);
  args.input_pos = a.tensor(5);
  args.q_norm = a.optional_tensor(6);
  args.k_norm = a.optional_tensor(7);
  args.n_heads = a.integer(8);
  args.interleaved = a.boolean(9);
  args.eps = a.number(10);
  args.k_scale = a.optional_tensor(11);
  args.v_scale = a.optional_tensor(12);
  if (a.error() == Error::Ok && args.qkv.ndim == 3 && args.k_cache.ndim == 4) {
    const int64_t sizes[] = {args.qkv.sizes[0], args.n_heads, args.qkv.sizes[1],
                             args.k_cache.sizes[3]};
    args.q = a.out(13, sizes, 4);
  } else {
    args.q = a.tensor(13);  // the validator says what is wrong with the others
  }
  if (a.error() != Error::Ok) return context.fail(a.error());
  finish(context,
         run_op<RopeAppendArgs>(context, args, &validate_rope_append, nullptr, &rope_append));
}

constexpr OwnOp kOwnOps[] = {
    {"add_rms_norm.out", &add_rms_norm_out},
    {"attention.out", &attention_out},
    {"gate_mul.out", &gate_mul_out},
    {"linear.out", &linear_out},
    {"rms_norm.out", &rms_norm_out},
    {"rope_append.out", &rope_append_out},
    {"silu.out", &silu_out},
};

}  // namespace

Span<const OwnOp> own_ops() { return {kOwnOps, std::size(kOwnOps)}; }

}  // namespace cuda_int4
