#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include <cstring>
#include <limits>
#include <utility>

#include "cuda_ops.h"
#include "errors.h"
#include "tensor_bridge.h"
#include "tensor_op_call.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using Stack = Span<EValue*>;

namespace {

/// The dtype that ATen's promotion arrives at, as far as a kernel has to know it: tensors with
/// dimensions go before those without, and these before numbers, within booleans, integers, floats.
class Promotion {
 public:
  void add(const TensorView& view) {
    Level& level = view.ndim > 0 ? dimmed_ : single_;
    const Category category = category_of(view.dtype);
    if (category > level.category) level = {category, false};
    if (category == level.category) level.is_float64 |= view.dtype == DType::kFloat64;
  }
  void add(const ScalarArgument& scalar) {
    const Category category = scalar.kind == ScalarArgument::Kind::kBool  ? Category::kBool
                              : scalar.kind == ScalarArgument::Kind::kInt ? Category::kInt
                                                                          : Category::kFloat;
    if (category > number_.category) number_ = {category, false};
  }

  bool is_bool() const { return highest() == Category::kBool; }
  ComputeType compute(bool always_float) const {
    const Category category = highest();
    if (category < Category::kFloat)
      return always_float ? ComputeType::kFloat32 : ComputeType::kInt64;
    for (const Level& level : {dimmed_, single_})
      if (level.category == category)
        return level.is_float64 ? ComputeType::kFloat64 : ComputeType::kFloat32;
    return ComputeType::kFloat32;
  }

 private:
  enum class Category { kNone, kBool, kInt, kFloat };
  struct Level {
    Category category = Category::kNone;
    bool is_float64 = false;
  };

  static Category category_of(DType dtype) {
    if (dtype == DType::kBool) return Category::kBool;
    return is_float_kind(dtype) || dtype == DType::kFloat64 ? Category::kFloat : Category::kInt;
  }
  Category highest() const {
    Category category = number_.category;
    for (const Level& level : {dimmed_, single_})
      if (level.category > category) category = level.category;
    return category;
  }

  Level dimmed_, single_, number_;
};

constexpr Number kLowest = {-std::numeric_limits<double>::infinity(),
                            std::numeric_limits<int64_t>::min()};
constexpr Number kGreatest = {std::numeric_limits<double>::infinity(),
                              std::numeric_limits<int64_t>::max()};

/// The operands of one elementwise call, tensors and numbers, on their way to a kernel.
struct Elementwise {
  TensorOpCall call;
  ElementwiseArgs args = {};
  Promotion promotion;
  int ndim = 0;  // of the result
  int64_t sizes[kMaxDims] = {0};

  Elementwise(const char* op, Stack stack, size_t n_schema) : call(op, stack, n_schema) {
    args.alpha = number_of(1);
    for (TensorView& view : args.in) view = absent_view();
  }

  /// Operand k is argument i, a tensor or a number.
  void operand(int k, Stack stack, size_t i, bool promotes = true) {
    if (args.n_in <= k) args.n_in = k + 1;
    if (!call.ok()) return;
    if (!stack[i]->isTensor()) {
      const ScalarArgument scalar = call.scalar(i);
      args.numbers[k] = number_of(scalar);
      if (promotes) promotion.add(scalar);
      return;
    }
    args.in[k] = call.tensor(i);
    if (!call.ok()) return;
    if (promotes) promotion.add(args.in[k]);
    broadcast(args.in[k]);
  }

  /// Operand k is argument i, or a number where that is None.
  void operand_or(int k, Stack stack, size_t i, Number if_none) {
    if (!call.is_none(i)) return operand(k, stack, i);
    number(k, if_none);
  }

  void number(int k, Number value) {
    if (args.n_in <= k) args.n_in = k + 1;
    args.in[k] = absent_view();
    args.numbers[k] = value;
  }

  void broadcast(const TensorView& view) {
    if (view.ndim > ndim) {
      for (int d = ndim - 1; d >= 0; --d) sizes[d + view.ndim - ndim] = sizes[d];
      for (int d = 0; d < view.ndim - ndim; ++d) sizes[d] = 1;
      ndim = view.ndim;
    }
    for (int d = 0; d < view.ndim; ++d) {
      int64_t& size = sizes[d + ndim - view.ndim];
      if (size == 1) size = view.sizes[d];
      call.require(view.sizes[d] == size || view.sizes[d] == 1,
                   "operands whose shapes broadcast to one");
    }
  }

  void run(ElementwiseOp op, bool always_float, size_t out, KernelRuntimeContext& context) {
    args.op = op;
    args.compute = promotion.compute(always_float);
    args.out = call.out(out, sizes, ndim);
    call.elementwise(args);
    call.finish(context);
  }
};

// What the arguments of an op are, `out` last.
enum class Form {
  kUnary,          // self
  kUnaryFloat,     // self; of integers in float32
  kBinary,         // self, other: each a tensor or a number
  kBinaryFloat,    // the same; of integers in float32
  kAlpha,          // self, other, alpha
  kAlphaReversed,  // self, other, alpha: other - alpha * self
};

struct Row {
  const char* name;
  Form form;
  ElementwiseOp op;
  bool negates_alpha = false;
};

// clang-format off
constexpr Row kRows[] = {
    {"aten::abs.out", Form::kUnary, ElementwiseOp::kAbs},
    {"aten::acos.out", Form::kUnaryFloat, ElementwiseOp::kAcos},
    {"aten::acosh.out", Form::kUnaryFloat, ElementwiseOp::kAcosh},
    {"aten::asin.out", Form::kUnaryFloat, ElementwiseOp::kAsin},
    {"aten::asinh.out", Form::kUnaryFloat, ElementwiseOp::kAsinh},
    {"aten::atan.out", Form::kUnaryFloat, ElementwiseOp::kAtan},
    {"aten::atanh.out", Form::kUnaryFloat, ElementwiseOp::kAtanh},
    {"aten::bitwise_not.out", Form::kUnary, ElementwiseOp::kBitwiseNot},
    {"aten::ceil.out", Form::kUnary, ElementwiseOp::kCeil},
    {"aten::cos.out", Form::kUnaryFloat, ElementwiseOp::kCos},
    {"aten::cosh.out", Form::kUnaryFloat, ElementwiseOp::kCosh},
    {"aten::erf.out", Form::kUnaryFloat, ElementwiseOp::kErf},
    {"aten::exp.out", Form::kUnaryFloat, ElementwiseOp::kExp},
    {"aten::expm1.out", Form::kUnaryFloat, ElementwiseOp::kExpm1},
    {"aten::floor.out", Form::kUnary, ElementwiseOp::kFloor},
    {"aten::isinf.out", Form::kUnaryFloat, ElementwiseOp::kIsInf},
    {"aten::isnan.out", Form::kUnaryFloat, ElementwiseOp::kIsNan},
    {"aten::log.out", Form::kUnaryFloat, ElementwiseOp::kLog},
    {"aten::log10.out", Form::kUnaryFloat, ElementwiseOp::kLog10},
    {"aten::log1p.out", Form::kUnaryFloat, ElementwiseOp::kLog1p},
    {"aten::log2.out", Form::kUnaryFloat, ElementwiseOp::kLog2},
    {"aten::logical_not.out", Form::kUnary, ElementwiseOp::kLogicalNot},
    {"aten::neg.out", Form::kUnary, ElementwiseOp::kNeg},
    {"aten::reciprocal.out", Form::kUnaryFloat, ElementwiseOp::kReciprocal},
    {"aten::relu.out", Form::kUnary, ElementwiseOp::kRelu},
    {"aten::round.out", Form::kUnary, ElementwiseOp::kRound},
    {"aten::rsqrt.out", Form::kUnaryFloat, ElementwiseOp::kRsqrt},
    {"aten::sigmoid.out", Form::kUnaryFloat, ElementwiseOp::kSigmoid},
    {"aten::sign.out", Form::kUnary, ElementwiseOp::kSign},
    {"aten::sin.out", Form::kUnaryFloat, ElementwiseOp::kSin},
    {"aten::sinh.out", Form::kUnaryFloat, ElementwiseOp::kSinh},
    {"aten::sqrt.out", Form::kUnaryFloat, ElementwiseOp::kSqrt},
    {"aten::tan.out", Form::kUnaryFloat, ElementwiseOp::kTan},
    {"aten::tanh.out", Form::kUnaryFloat, ElementwiseOp::kTanh},
    {"aten::trunc.out", Form::kUnary, ElementwiseOp::kTrunc},

    {"aten::add.out", Form::kAlpha, ElementwiseOp::kAdd},
    {"aten::add.Scalar_out", Form::kAlpha, ElementwiseOp::kAdd},
    {"aten::sub.out", Form::kAlpha, ElementwiseOp::kAdd, true},
    {"aten::sub.Scalar_out", Form::kAlpha, ElementwiseOp::kAdd, true},
    {"aten::rsub.Scalar_out", Form::kAlphaReversed, ElementwiseOp::kAdd, true},
    {"aten::mul.out", Form::kBinary, ElementwiseOp::kMul},
    {"aten::mul.Scalar_out", Form::kBinary, ElementwiseOp::kMul},
    {"aten::div.out", Form::kBinaryFloat, ElementwiseOp::kDiv},
    {"aten::div.Scalar_out", Form::kBinaryFloat, ElementwiseOp::kDiv},
    {"aten::floor_divide.out", Form::kBinary, ElementwiseOp::kDivFloor},
    {"aten::fmod.Tensor_out", Form::kBinary, ElementwiseOp::kFmod},
    {"aten::fmod.Scalar_out", Form::kBinary, ElementwiseOp::kFmod},
    {"aten::remainder.Tensor_out", Form::kBinary, ElementwiseOp::kRemainder},
    {"aten::remainder.Scalar_out", Form::kBinary, ElementwiseOp::kRemainder},
    {"aten::atan2.out", Form::kBinaryFloat, ElementwiseOp::kAtan2},
    {"aten::maximum.out", Form::kBinary, ElementwiseOp::kMaximum},
    {"aten::minimum.out", Form::kBinary, ElementwiseOp::kMinimum},
    {"aten::pow.Scalar_out", Form::kBinary, ElementwiseOp::kPow},
    {"aten::pow.Tensor_Tensor_out", Form::kBinary, ElementwiseOp::kPow},

    {"aten::bitwise_and.Scalar_out", Form::kBinary, ElementwiseOp::kBitwiseAnd},
    {"aten::bitwise_and.Tensor_out", Form::kBinary, ElementwiseOp::kBitwiseAnd},
    {"aten::bitwise_or.Scalar_out", Form::kBinary, ElementwiseOp::kBitwiseOr},
    {"aten::bitwise_or.Tensor_out", Form::kBinary, ElementwiseOp::kBitwiseOr},
    {"aten::bitwise_xor.Scalar_out", Form::kBinary, ElementwiseOp::kBitwiseXor},
    {"aten::bitwise_xor.Tensor_out", Form::kBinary, ElementwiseOp::kBitwiseXor},
    {"aten::bitwise_left_shift.Tensor_Scalar_out", Form::kBinary, ElementwiseOp::kShiftLeft},
    {"aten::bitwise_left_shift.Tensor_out", Form::kBinary, ElementwiseOp::kShiftLeft},
    {"aten::bitwise_right_shift.Tensor_Scalar_out", Form::kBinary, ElementwiseOp::kShiftRight},
    {"aten::bitwise_right_shift.Tensor_out", Form::kBinary, ElementwiseOp::kShiftRight},

    {"aten::eq.Scalar_out", Form::kBinary, ElementwiseOp::kEq},
    {"aten::eq.Tensor_out", Form::kBinary, ElementwiseOp::kEq},
    {"aten::ge.Scalar_out", Form::kBinary, ElementwiseOp::kGe},
    {"aten::ge.Tensor_out", Form::kBinary, ElementwiseOp::kGe},
    {"aten::gt.Scalar_out", Form::kBinary, ElementwiseOp::kGt},
    {"aten::gt.Tensor_out", Form::kBinary, ElementwiseOp::kGt},
    {"aten::le.Scalar_out", Form::kBinary, ElementwiseOp::kLe},
    {"aten::le.Tensor_out", Form::kBinary, ElementwiseOp::kLe},
    {"aten::lt.Scalar_out", Form::kBinary, ElementwiseOp::kLt},
    {"aten::lt.Tensor_out", Form::kBinary, ElementwiseOp::kLt},
    {"aten::ne.Scalar_out", Form::kBinary, ElementwiseOp::kNe},
    {"aten::ne.Tensor_out", Form::kBinary, ElementwiseOp::kNe},
    {"aten::logical_and.out", Form::kBinary, ElementwiseOp::kLogicalAnd},
    {"aten::logical_or.out", Form::kBinary, ElementwiseOp::kLogicalOr},
    {"aten::logical_xor.out", Form::kBinary, ElementwiseOp::kLogicalXor},
};
// clang-format on

const char* without_namespace(const char* name) { return std::strstr(name, "::") + 2; }

void run_row(const Row& row, KernelRuntimeContext& context, Stack stack) {
  const bool is_unary = row.form == Form::kUnary || row.form == Form::kUnaryFloat;
  const bool has_alpha = row.form == Form::kAlpha || row.form == Form::kAlphaReversed;
  const bool always_float = row.form == Form::kUnaryFloat || row.form == Form::kBinaryFloat;
  const size_t out = is_unary ? 1 : has_alpha ? 3 : 2;
  Elementwise e(without_namespace(row.name), stack, out + 1);
  const int first = row.form == Form::kAlphaReversed ? 1 : 0;
  e.operand(first, stack, 0);
  if (!is_unary) e.operand(1 - first, stack, 1);
  if (has_alpha && e.call.ok()) {
    const Number alpha = number_of(e.call.scalar(2));
    e.args.alpha = row.negates_alpha ? Number{-alpha.as_double, -alpha.as_int} : alpha;
  }
  const bool flips = row.op == ElementwiseOp::kBitwiseNot && e.promotion.is_bool();
  e.run(flips ? ElementwiseOp::kLogicalNot : row.op, always_float, out, context);
}

template <size_t kRow>
void run_row(KernelRuntimeContext& context, Stack stack) {
  run_row(kRows[kRow], context, stack);
}

// ---- ops of their own form ----

// div(self, other, *, rounding_mode?, out); other: a tensor or a number
void div_mode_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("div.out_mode", stack, 4);
  e.operand(0, stack, 0);
  e.operand(1, stack, 1);
  if (e.call.is_none(2)) return e.run(ElementwiseOp::kDiv, true, 3, context);
  const bool floors = std::strcmp(e.call.string(2), "floor") == 0;
  e.call.require(floors || std::strcmp(e.call.string(2), "trunc") == 0,
                 "rounding_mode 'floor', 'trunc' or none");
  e.run(floors ? ElementwiseOp::kDivFloor : ElementwiseOp::kDivTrunc, false, 3, context);
}

// pow(self, exponent number, *, out): the exponents of every day are cheaper, and exact where pow
// may err by an ulp
void pow_tensor_scalar_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("pow.Tensor_Scalar_out", stack, 3);
  e.operand(0, stack, 0);
  e.operand(1, stack, 1);
  const double exponent = e.args.numbers[1].as_double;
  if (exponent == 2) {
    e.args.in[1] = e.args.in[0];
    return e.run(ElementwiseOp::kMul, false, 2, context);
  }
  const bool is_float = e.promotion.compute(false) != ComputeType::kInt64;
  const ElementwiseOp op = !is_float          ? ElementwiseOp::kPow
                           : exponent == 0.5  ? ElementwiseOp::kSqrt
                           : exponent == -0.5 ? ElementwiseOp::kRsqrt
                           : exponent == -1   ? ElementwiseOp::kReciprocal
                                              : ElementwiseOp::kPow;
  e.run(op, false, 2, context);
}

// clamp(self, min?, max?, *, out); min and max: numbers, or tensors in clamp.Tensor
void clamp_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("clamp.out", stack, 4);
  e.operand(0, stack, 0);
  e.operand_or(1, stack, 1, kLowest);
  e.operand_or(2, stack, 2, kGreatest);
  e.run(ElementwiseOp::kClamp, false, 3, context);
}

// hardtanh(self, min_val, max_val, *, out)
void hardtanh_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("hardtanh.out", stack, 4);
  e.operand(0, stack, 0);
  e.operand(1, stack, 1, false);
  e.operand(2, stack, 2, false);
  e.run(ElementwiseOp::kClamp, false, 3, context);
}

// where(condition, self, other, *, out)
void where_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("where.self_out", stack, 4);
  e.operand(0, stack, 0, false);
  e.operand(1, stack, 1);
  e.operand(2, stack, 2);
  e.run(ElementwiseOp::kWhere, false, 3, context);
}

// masked_fill(self, mask, value number, *, out)
void masked_fill_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("masked_fill.Scalar_out", stack, 4);
  e.operand(2, stack, 0);
  e.operand(0, stack, 1, false);
  e.operand(1, stack, 2, false);
  e.run(ElementwiseOp::kWhere, false, 3, context);
}

// gelu(self, *, approximate, out)
void gelu_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("gelu.out", stack, 3);
  e.operand(0, stack, 0);
  const bool by_tanh = std::strcmp(e.call.string(1), "tanh") == 0;
  e.call.require(by_tanh || std::strcmp(e.call.string(1), "none") == 0,
                 "approximate 'none' or 'tanh'");
  e.run(by_tanh ? ElementwiseOp::kGeluTanh : ElementwiseOp::kGelu, true, 2, context);
}

// leaky_relu(self, negative_slope, *, out)
void leaky_relu_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("leaky_relu.out", stack, 3);
  e.operand(0, stack, 0);
  e.operand(1, stack, 1, false);
  e.run(ElementwiseOp::kLeakyRelu, true, 2, context);
}

// elu(self, alpha, scale, input_scale, *, out)
void elu_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("elu.out", stack, 5);
  e.operand(0, stack, 0);
  const double alpha = e.call.number(1), scale = e.call.number(2);
  e.number(1, {alpha * scale, 0});
  e.number(2, {scale, 0});
  e.args.alpha = {e.call.number(3), 0};
  e.run(ElementwiseOp::kElu, true, 4, context);
}

// logit(self, eps?, *, out)
void logit_out(KernelRuntimeContext& context, Stack stack) {
  Elementwise e("logit.out", stack, 3);
  e.operand(0, stack, 0);
  e.number(1, {e.call.is_none(1) ? -1 : e.call.number(1), 0});
  e.run(ElementwiseOp::kLogit, true, 2, context);
}

constexpr CudaOp kOwnForms[] = {
    {"aten::clamp.Tensor_out", &clamp_out},
    {"aten::clamp.out", &clamp_out},
    {"aten::div.Scalar_mode_out", &div_mode_out},
    {"aten::div.out_mode", &div_mode_out},
    {"aten::elu.out", &elu_out},
    {"aten::gelu.out", &gelu_out},
    {"aten::hardtanh.out", &hardtanh_out},
    {"aten::leaky_relu.out", &leaky_relu_out},
    {"aten::logit.out", &logit_out},
    {"aten::masked_fill.Scalar_out", &masked_fill_out},
    {"aten::pow.Tensor_Scalar_out", &pow_tensor_scalar_out},
    {"aten::where.self_out", &where_out},
};

struct Table {
  CudaOp ops[std::size(kRows) + std::size(kOwnForms)];
};

template <size_t... kRow>
constexpr Table make_table(std::index_sequence<kRow...>) {
  Table table = {{{kRows[kRow].name, &run_row<kRow>}...}};
  for (size_t i = 0; i < std::size(kOwnForms); ++i) table.ops[sizeof...(kRow) + i] = kOwnForms[i];
  return table;
}

constexpr Table kTable = make_table(std::make_index_sequence<std::size(kRows)>());

}  // namespace

CudaOps cuda_elementwise_ops() { return {kTable.ops, std::size(kTable.ops)}; }

}  // namespace cuda_int4
