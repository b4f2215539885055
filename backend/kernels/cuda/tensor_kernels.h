// The generic CUDA kernels of elementwise, copy and index kind, as one table of functions on views:
// what runtime/cuda_ops_elementwise.cpp, cuda_ops_shape.cpp and cuda_ops_index.cpp call.
// tensor_kernels.cu fills it.
//
// Views may have any strides, negative ones too; a broadcast dimension has stride 0. Tensors without
// elements launch nothing. Who calls has checked shapes; an `out` may be an input itself where both
// have the same dtype, sizes and strides.
#pragma once

#include "../tensor_view.h"

namespace cuda_int4 {

// A number of a graph, for kernels that compute in int64 and for those that compute in floats.
struct Number {
  double as_double;
  int64_t as_int;
};

// What an elementwise kernel computes with. Elements are converted to it when they are loaded, and
// to the dtype of `out` (rounded once) when they are stored.
enum class ComputeType : int32_t { kFloat32, kFloat64, kInt64 };

// a, b, c: the operands in order. Comparisons and tests give 0 or 1.
enum class ElementwiseOp : int32_t {
  // a
  kCopy,
  kNeg,
  kAbs,
  kSign,
  kRelu,
  kCeil,
  kFloor,
  kRound,  // halves to even
  kTrunc,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kIsNan,
  kIsInf,
  kLogicalNot,
  kBitwiseNot,
  // a, b
  kAdd,  // a + alpha * b
  kMul,
  kDiv,
  kDivFloor,
  kDivTrunc,
  kFmod,       // sign of a
  kRemainder,  // sign of b
  kMaximum,    // NaN if either is
  kMinimum,
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kLogicalAnd,
  kLogicalOr,
  kLogicalXor,
  kBitwiseAnd,
  kBitwiseOr,
  kBitwiseXor,
  kShiftLeft,
  kShiftRight,
  kLeakyRelu,  // a > 0 ? a : a * b
  // a, b, c
  kWhere,  // a ? b : c
  kClamp,  // min(max(a, b), c), NaN if one is
  // Functions of the mathematics library. First of them: kFirstMath.
  kExp,
  kExpm1,
  kLog,
  kLog10,
  kLog1p,
  kLog2,
  kSin,
  kCos,
  kTan,
  kSinh,
  kCosh,
  kTanh,
  kAsin,
  kAcos,
  kAtan,
  kAsinh,
  kAcosh,
  kAtanh,
  kErf,
  kGelu,
  kGeluTanh,
  kSigmoid,
  kLogit,  // of a clamped to [b, 1 - b]; b < 0: of a as it is
  kAtan2,
  kPow,
  kElu,  // a <= 0 ? expm1(a * alpha) * b : a * c
};
constexpr ElementwiseOp kFirstMath = ElementwiseOp::kExp;

struct ElementwiseArgs {
  const char* who;  // for messages
  ElementwiseOp op;
  ComputeType compute;
  int n_in;  // 1 to 3
  // An operand: a view that broadcasts to `out`, or, where it is absent, its number.
  TensorView in[3];
  Number numbers[3];
  Number alpha;
  TensorView out;
};

// to[i] = from[i], of the same sizes and dtype size; bytes are moved as they are.
struct CopyPart {
  TensorView to;
  TensorView from;
};

// to[i] = start + i * step by row-major index i, in int64 or float64.
struct FillArgs {
  const char* who;
  TensorView out;
  Number start;
  Number step;
};

// out[..., row, column] = column - row <= diagonal ? x[..., row, column] : 0; both contiguous.
struct TrilArgs {
  const char* who;
  TensorView out;
  TensorView x;
  int64_t diagonal;
};

// Reading and writing by index. The `indexed` view stands at index 0 of each indexed dimension, has
// stride 0 there, and is moved by index * stride. All views have the same sizes, those of the
// positions; broadcast ones have stride 0.
struct IndexedDim {
  TensorView index;  // int32 or int64
  int64_t size;      // of the dimension in the indexed tensor
  int64_t stride;    // in elements
};

struct IndexArgs {
  const char* who;
  TensorView plain;    // out of a gather, values of a scatter; absent: `value` for all positions
  TensorView indexed;  // source of a gather, destination of a scatter
  int n_dims;
  IndexedDim dims[kMaxDims];
  bool wraps;        // negative indices count from the end; else they are out of range
  bool accumulates;  // scatter adds, in the order of the positions, with one rounding at the end
  Number value;
};

struct TensorKernels {
  Status (*elementwise)(const ElementwiseArgs& args, const ExecutionContext& context);
  // Parts do not overlap each other; one launch for every 8 of them.
  Status (*copy)(const char* who, const CopyPart* parts, int n_parts,
                 const ExecutionContext& context);
  Status (*fill)(const FillArgs& args, const ExecutionContext& context);
  Status (*tril)(const TrilArgs& args, const ExecutionContext& context);
  // plain = indexed[index]; a value whose index is out of range is 0, and noted in context.fault.
  Status (*gather)(const IndexArgs& args, const ExecutionContext& context);
  // indexed[index] = plain; a value whose index is out of range is dropped, and noted. Where an
  // index repeats, one of its values stays, which one is not said.
  // scatter_scratch_bytes says what context.scratch must hold.
  Status (*scatter)(const IndexArgs& args, const ExecutionContext& context);
  uint64_t (*scatter_scratch_bytes)(const IndexArgs& args);
};

extern const TensorKernels kTensorKernels;  // only in a build with nvcc: go through cuda_kernels()

}  // namespace cuda_int4
