#include "forwarded_ops.h"

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <array>
#include <cctype>
#include <iterator>
#include <utility>

#include "errors.h"
#include "op_table.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::OpFunction;
using executorch::runtime::Span;

namespace {

/// `arguments` has a letter for each argument of the schema, as kKinds has them; in lower case where
/// it may be None. `_` is where the kernel puts what it returns.
struct Forwarded {
  const char* name;
  const char* arguments;
};

struct Kind {
  char letter;
  const char* words;
  bool (*is)(const EValue& value);
};

constexpr Kind kKinds[] = {
    {'T', "a tensor", [](const EValue& v) { return v.isTensor(); }},
    {'N', "a number", [](const EValue& v) { return v.isScalar(); }},
    {'I', "an int", [](const EValue& v) { return v.isInt(); }},
    {'B', "a bool", [](const EValue& v) { return v.isBool(); }},
    {'F', "a float", [](const EValue& v) { return v.isDouble(); }},
    {'S', "a string", [](const EValue& v) { return v.isString(); }},
    {'L', "a list of ints", [](const EValue& v) { return v.tryToIntList().ok(); }},
    {'D', "a list of floats", [](const EValue& v) { return v.tryToDoubleList().ok(); }},
    {'V', "a list of tensors", [](const EValue& v) { return v.tryToTensorList().ok(); }},
    {'W', "a list of tensors or None",
     [](const EValue& v) { return v.tryToListOptionalTensor().ok(); }},
    {'_', "a value", [](const EValue&) { return true; }},
};

// Forwarded to ExecuTorch's optimised or portable kernels. Left out on purpose: random numbers (no seed
// in the graph), outputs whose shape hangs on data (nonzero, masked_select, repeat_interleave),
// backward ops, and distances and transforms that no decoder or encoder has.
// clang-format off
constexpr Forwarded kAtenOps[] = {
    // elementwise, one operand
    {"_conj_physical.out", "TT"}, {"abs.out", "TT"}, {"acos.out", "TT"}, {"acosh.out", "TT"},
    {"asin.out", "TT"}, {"asinh.out", "TT"}, {"atan.out", "TT"}, {"atanh.out", "TT"},
    {"bitwise_not.out", "TT"}, {"ceil.out", "TT"}, {"clamp.out", "TnnT"}, {"cos.out", "TT"},
    {"cosh.out", "TT"}, {"elu.out", "TNNNT"}, {"erf.out", "TT"}, {"exp.out", "TT"},
    {"expm1.out", "TT"}, {"floor.out", "TT"}, {"gelu.out", "TST"}, {"glu.out", "TIT"},
    {"hardtanh.out", "TNNT"}, {"isinf.out", "TT"}, {"isnan.out", "TT"}, {"leaky_relu.out", "TNT"},
    {"log.out", "TT"}, {"log10.out", "TT"}, {"log1p.out", "TT"}, {"log2.out", "TT"},
    {"logical_not.out", "TT"}, {"logit.out", "TfT"}, {"neg.out", "TT"}, {"reciprocal.out", "TT"},
    {"relu.out", "TT"}, {"round.out", "TT"}, {"rsqrt.out", "TT"}, {"sigmoid.out", "TT"},
    {"sign.out", "TT"}, {"sin.out", "TT"}, {"sinh.out", "TT"}, {"sqrt.out", "TT"},
    {"tan.out", "TT"}, {"tanh.out", "TT"}, {"trunc.out", "TT"},
    // elementwise, two operands
    {"add.Scalar_out", "TNNT"}, {"add.out", "TTNT"}, {"atan2.out", "TTT"},
    {"bitwise_and.Scalar_out", "TNT"}, {"bitwise_and.Tensor_out", "TTT"},
    {"bitwise_left_shift.Tensor_Scalar_out", "TNT"}, {"bitwise_left_shift.Tensor_out", "TTT"},
    {"bitwise_or.Scalar_out", "TNT"}, {"bitwise_or.Tensor_out", "TTT"},
    {"bitwise_right_shift.Tensor_Scalar_out", "TNT"}, {"bitwise_right_shift.Tensor_out", "TTT"},
    {"bitwise_xor.Scalar_out", "TNT"}, {"bitwise_xor.Tensor_out", "TTT"},
    {"clamp.Tensor_out", "TttT"}, {"div.Scalar_mode_out", "TNsT"}, {"div.Scalar_out", "TNT"},
    {"div.out", "TTT"}, {"div.out_mode", "TTsT"}, {"floor_divide.out", "TTT"},
    {"fmod.Scalar_out", "TNT"}, {"fmod.Tensor_out", "TTT"}, {"logical_and.out", "TTT"},
    {"logical_or.out", "TTT"}, {"logical_xor.out", "TTT"}, {"maximum.out", "TTT"},
    {"minimum.out", "TTT"}, {"mul.Scalar_out", "TNT"}, {"mul.out", "TTT"},
    {"pow.Scalar_out", "NTT"}, {"pow.Tensor_Scalar_out", "TNT"}, {"pow.Tensor_Tensor_out", "TTT"},
    {"remainder.Scalar_out", "TNT"}, {"remainder.Tensor_out", "TTT"}, {"rsub.Scalar_out", "TNNT"},
    {"sub.Scalar_out", "TNNT"}, {"sub.out", "TTNT"},
    // comparisons and choice
    {"eq.Scalar_out", "TNT"}, {"eq.Tensor_out", "TTT"}, {"ge.Scalar_out", "TNT"},
    {"ge.Tensor_out", "TTT"}, {"gt.Scalar_out", "TNT"}, {"gt.Tensor_out", "TTT"},
    {"le.Scalar_out", "TNT"}, {"le.Tensor_out", "TTT"}, {"lt.Scalar_out", "TNT"},
    {"lt.Tensor_out", "TTT"}, {"masked_fill.Scalar_out", "TTNT"}, {"ne.Scalar_out", "TNT"},
    {"ne.Tensor_out", "TTT"}, {"where.self_out", "TTTT"},
    // reductions and order
    {"amax.out", "TLBT"}, {"amin.out", "TLBT"}, {"any.all_out", "TT"}, {"any.dims_out", "TlBT"},
    {"any.out", "TIBT"}, {"argmax.out", "TiBT"}, {"argmin.out", "TiBT"}, {"cumsum.out", "TIiT"},
    {"max.dim_max", "TIBTT"}, {"max.unary_out", "TT"}, {"mean.dtype_out", "TiT"},
    {"mean.out", "TlBiT"}, {"min.dim_min", "TIBTT"}, {"min.unary_out", "TT"},
    {"prod.int_out", "TIBiT"}, {"prod.out", "TiT"}, {"sum.IntList_out", "TlBiT"},
    {"topk.values", "TIIBBTT"}, {"var.correction_out", "TlnBT"}, {"var.out", "TlBBT"},
    {"var_mean.correction_out", "TlnBTT"}, {"_log_softmax.out", "TIBT"}, {"_softmax.out", "TIBT"},
    // products, norms, convolutions, pooling
    {"_adaptive_avg_pool2d.out", "TLT"},
    {"_native_batch_norm_legit_no_training.out", "TttTTFFTTT"}, {"addmm.out", "TTTNNT"},
    {"avg_pool2d.out", "TLLLBBiT"}, {"bmm.out", "TTT"}, {"convolution.out", "TTtLLLBLIT"},
    {"linear.out", "TTtT"}, {"max_pool2d_with_indices.out", "TLLLLBTT"}, {"mm.out", "TTT"},
    {"native_group_norm.out", "TttIIIIFTTT"}, {"native_layer_norm.out", "TLttFTTT"},
    // reading and writing by index
    {"embedding.out", "TTIBBT"}, {"gather.out", "TITBT"}, {"index.Tensor_out", "TWT"},
    {"index_put.out", "TWTBT"}, {"index_put_", "TWTB_"}, {"index_select.out", "TITT"},
    {"scatter.src_out", "TITTT"}, {"scatter.value_out", "TITNT"}, {"scatter_add.out", "TITTT"},
    {"select_scatter.out", "TTIIT"}, {"slice_scatter.out", "TTIiiIT"},
    {"_local_scalar_dense", "T_"},
    // shape and copies
    {"_to_copy.out", "TBiT"}, {"alias_copy.out", "TT"}, {"as_strided_copy.out", "TLLiT"},
    {"cat.out", "VIT"}, {"clone.out", "TiT"}, {"constant_pad_nd.out", "TLNT"},
    {"copy.out", "TTBT"}, {"copy_", "TTB_"}, {"detach_copy.out", "TT"},
    {"diagonal_copy.out", "TIIIT"}, {"expand_copy.out", "TLBT"}, {"flip.out", "TLT"},
    {"lift_fresh_copy.out", "TT"}, {"narrow_copy.out", "TIIIT"}, {"permute_copy.out", "TLT"},
    {"pixel_shuffle.out", "TIT"}, {"pixel_unshuffle.out", "TIT"}, {"reflection_pad1d.out", "TLT"},
    {"reflection_pad2d.out", "TLT"}, {"repeat.out", "TLT"}, {"replication_pad1d.out", "TLT"},
    {"replication_pad2d.out", "TLT"}, {"roll.out", "TLLT"}, {"select_copy.int_out", "TIIT"},
    {"slice_copy.Tensor_out", "TIiiIT"}, {"split_copy.Tensor_out", "TIIV"},
    {"split_with_sizes_copy.out", "TLIV"}, {"squeeze_copy.dim_out", "TIT"},
    {"squeeze_copy.dims_out", "TLT"}, {"stack.out", "VIT"}, {"t_copy.out", "TT"},
    {"transpose_copy.int_out", "TIIT"}, {"tril.out", "TIT"}, {"unbind_copy.int_out", "TIV"},
    {"unfold_copy.out", "TIIIT"}, {"unsqueeze_copy.out", "TIT"},
    {"upsample_bilinear2d.vec_out", "TlBdT"}, {"upsample_nearest2d.vec_out", "TldT"},
    {"view_copy.out", "TLT"},
    // making tensors
    {"arange.out", "NT"}, {"arange.start_out", "NNNT"}, {"empty.out", "LiT"},
    {"fill.Scalar_out", "TNT"}, {"fill.Tensor_out", "TTT"}, {"full.out", "LNT"},
    {"full_like.out", "TNiT"}, {"ones.out", "LT"}, {"scalar_tensor.out", "NT"},
    {"zeros.out", "LT"},
};

constexpr Forwarded kDimOrderOps[] = {
    {"_clone_dim_order.out", "TBlT"}, {"_empty_dim_order.out", "LlT"},
    {"_to_dim_order_copy.out", "TBlT"},
};
// clang-format on

constexpr char kAten[] = "aten::";
constexpr char kDimOrder[] = "dim_order_ops::";

/// Null, or what is wrong: the words of the argument that was expected at *at.
const char* find_wrong(const char* arguments, Span<EValue*> stack, size_t* at) {
  for (size_t i = 0; arguments[i] != '\0'; ++i) {
    *at = i;
    const bool may_be_none = std::islower(static_cast<unsigned char>(arguments[i])) != 0;
    const char letter = static_cast<char>(std::toupper(static_cast<unsigned char>(arguments[i])));
    for (const Kind& kind : kKinds) {
      if (kind.letter != letter) continue;
      if (i >= stack.size() || stack[i] == nullptr) return kind.words;
      if (!(may_be_none && stack[i]->isNone()) && !kind.is(*stack[i])) return kind.words;
    }
  }
  return nullptr;
}

template <const char* kNamespace, const Forwarded* kOps, size_t kIndex>
void run(KernelRuntimeContext& context, Span<EValue*> stack) {
  static const std::string name = std::string(kNamespace) + kOps[kIndex].name;
  static const OpFunction kernel = find_registered(name);
  size_t at = 0;
  if (const char* expected = find_wrong(kOps[kIndex].arguments, stack, &at))
    return context.fail(fail(Error::InvalidProgram,
                             "%s: expected %s as argument %zu, found none or another type; the "
                             ".pte is damaged, export it again",
                             name.c_str(), expected, at));
  kernel(context, stack);
}

template <const char* kNamespace, const Forwarded* kOps, size_t... kIndices>
constexpr std::array<OpFunction, sizeof...(kIndices)> run_each(std::index_sequence<kIndices...>) {
  return {&run<kNamespace, kOps, kIndices>...};
}

constexpr auto kRunAten =
    run_each<kAten, kAtenOps>(std::make_index_sequence<std::size(kAtenOps)>());
constexpr auto kRunDimOrder =
    run_each<kDimOrder, kDimOrderOps>(std::make_index_sequence<std::size(kDimOrderOps)>());

struct Family {
  std::string_view graph_namespace;
  Span<const Forwarded> ops;
  Span<const OpFunction> kernels;
};

const Family kFamilies[] = {
    {kAten, {kAtenOps, std::size(kAtenOps)}, {kRunAten.data(), kRunAten.size()}},
    {kDimOrder,
     {kDimOrderOps, std::size(kDimOrderOps)},
     {kRunDimOrder.data(), kRunDimOrder.size()}},
};

}  // namespace

OpFunction find_forwarded(std::string_view graph_name) {
  if (find_registered(graph_name) == nullptr) return nullptr;
  for (const Family& family : kFamilies) {
    const size_t length = family.graph_namespace.size();
    if (graph_name.substr(0, length) != family.graph_namespace) continue;
    for (size_t i = 0; i < family.ops.size(); ++i)
      if (graph_name.substr(length) == family.ops[i].name) return family.kernels[i];
  }
  return nullptr;
}

std::string forwarded_graph_name(std::string_view name) {
  for (const Family& family : kFamilies)
    for (const Forwarded& op : family.ops)
      if (name == op.name) return std::string(family.graph_namespace) + op.name;
  return {};
}

std::vector<std::string> forwarded_ops() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies)
    for (const Forwarded& op : family.ops) {
      std::string name = std::string(family.graph_namespace) + op.name;
      if (find_registered(name) != nullptr) names.push_back(std::move(name));
    }
  return names;
}

}  // namespace cuda_int4
