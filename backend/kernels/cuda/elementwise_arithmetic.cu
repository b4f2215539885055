// elementwise_arithmetic -- out[i] = op(a[i], b[i], c[i]): sums, products, comparisons, choice, bits
//
//   operand    dtype  shape              order in memory      align
//   a, b, c    any    that of out        any strides, 0 too   dtype
//   out        any    up to 8 dims       any strides          dtype; may be an operand itself
//
// Requires  a, b and c broadcast to out   (checked by who calls: cuda_ops_elementwise.cpp)
// Grid      blocks of 128; a thread takes 1 or 2 vectors of 16 bytes of the widest operand, or 2 or
//           4 single elements where strides, sizes or addresses do not allow vectors
// Bytes     reads a, b, c (broadcast ones once, out of cache), writes out
// Numerics  computes in float32, float64 or int64 (two's complement); one rounding at the store.
//           Integer division by 0 gives 0 and is noted; a shift by 64 and more leaves copies of the
//           sign, or zeros
// Source    own
#include "elementwise.cuh"

namespace cuda_int4 {

namespace {

template <typename C>
__device__ __forceinline__ bool is_nan(C value) {
  return value != value;
}

template <typename C>
__device__ __forceinline__ C maximum(C a, C b) {
  return is_nan(a) || a > b ? a : b;  // b where it is NaN: no comparison with it holds
}

template <typename C>
__device__ __forceinline__ C minimum(C a, C b) {
  return is_nan(a) || a < b ? a : b;
}

// ---- division, as PyTorch defines it ----

__device__ __forceinline__ int64_t div_trunc(int64_t a, int64_t b) {
  if (b == -1) return static_cast<int64_t>(-static_cast<uint64_t>(a));  // INT64_MIN / -1
  return b == 0 ? 0 : a / b;
}

__device__ __forceinline__ int64_t fmod_of(int64_t a, int64_t b) {
  return b == 0 || b == -1 ? 0 : a % b;
}

template <typename C>
__device__ __forceinline__ C div_trunc(C a, C b) {
  return trunc(a / b);
}

template <typename C>
__device__ __forceinline__ C fmod_of(C a, C b) {
  return fmod(a, b);
}

template <typename C>
__device__ __forceinline__ C remainder_of(C a, C b) {
  const C rest = fmod_of(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

__device__ __forceinline__ int64_t div_floor(int64_t a, int64_t b) {
  const int64_t quotient = div_trunc(a, b);
  return fmod_of(a, b) != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

// Python's: floor of the exact quotient, not of the rounded one.
template <typename C>
__device__ __forceinline__ C div_floor(C a, C b) {
  if (b == 0) return a / b;
  const C rest = fmod(a, b);
  C quotient = (a - rest) / b;
  if (rest != 0 && (rest < 0) != (b < 0)) quotient -= 1;
  if (quotient == 0) return copysign(static_cast<C>(0), a / b);
  const C down = floor(quotient);
  return quotient - down > static_cast<C>(0.5) ? down + 1 : down;
}

// ---- bits ----

__device__ __forceinline__ int64_t shift_left(int64_t a, int64_t b) {
  return b < 0 || b > 63 ? 0 : static_cast<int64_t>(static_cast<uint64_t>(a) << b);
}

__device__ __forceinline__ int64_t shift_right(int64_t a, int64_t b) {
  return a >> (b < 0 || b > 63 ? 63 : b);
}

struct Arithmetic {
  template <typename C, int kWidth>
  static __device__ __forceinline__ bool divides_by_zero(ElementwiseOp op, const C (&b)[kWidth]) {
    if constexpr (!std::is_integral_v<C>) return false;
    if (op != ElementwiseOp::kDivFloor && op != ElementwiseOp::kDivTrunc &&
        op != ElementwiseOp::kFmod && op != ElementwiseOp::kRemainder)
      return false;
    bool any = false;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) any = any || b[i] == 0;
    return any;
  }

  template <typename C, int kWidth>
  static __device__ __forceinline__ void apply(ElementwiseOp op, const C (&a)[kWidth],
                                               const C (&b)[kWidth], const C (&c)[kWidth], C alpha,
                                               C (&y)[kWidth]) {
    switch (op) {
      case ElementwiseOp::kNeg:
        return each(y, [&](int i) { return -a[i]; });
      case ElementwiseOp::kAbs:
        if constexpr (std::is_integral_v<C>)
          return each(y, [&](int i) { return a[i] < 0 ? -a[i] : a[i]; });
        else
          return each(y, [&](int i) { return fabs(a[i]); });
      case ElementwiseOp::kSign:
        return each(y, [&](int i) { return (a[i] > 0) - (a[i] < 0); });
      case ElementwiseOp::kRelu:
        return each(y, [&](int i) { return a[i] < 0 ? 0 : a[i]; });
      case ElementwiseOp::kLogicalNot:
        return each(y, [&](int i) { return a[i] == 0; });
      case ElementwiseOp::kAdd:
        return each(y, [&](int i) { return a[i] + alpha * b[i]; });
      case ElementwiseOp::kMul:
        return each(y, [&](int i) { return a[i] * b[i]; });
      case ElementwiseOp::kDivFloor:
        return each(y, [&](int i) { return div_floor(a[i], b[i]); });
      case ElementwiseOp::kDivTrunc:
        return each(y, [&](int i) { return div_trunc(a[i], b[i]); });
      case ElementwiseOp::kFmod:
        return each(y, [&](int i) { return fmod_of(a[i], b[i]); });
      case ElementwiseOp::kRemainder:
        return each(y, [&](int i) { return remainder_of(a[i], b[i]); });
      case ElementwiseOp::kMaximum:
        return each(y, [&](int i) { return maximum(a[i], b[i]); });
      case ElementwiseOp::kMinimum:
        return each(y, [&](int i) { return minimum(a[i], b[i]); });
      case ElementwiseOp::kEq:
        return each(y, [&](int i) { return a[i] == b[i]; });
      case ElementwiseOp::kNe:
        return each(y, [&](int i) { return a[i] != b[i]; });
      case ElementwiseOp::kLt:
        return each(y, [&](int i) { return a[i] < b[i]; });
      case ElementwiseOp::kLe:
        return each(y, [&](int i) { return a[i] <= b[i]; });
      case ElementwiseOp::kGt:
        return each(y, [&](int i) { return a[i] > b[i]; });
      case ElementwiseOp::kGe:
        return each(y, [&](int i) { return a[i] >= b[i]; });
      case ElementwiseOp::kLogicalAnd:
        return each(y, [&](int i) { return a[i] != 0 && b[i] != 0; });
      case ElementwiseOp::kLogicalOr:
        return each(y, [&](int i) { return a[i] != 0 || b[i] != 0; });
      case ElementwiseOp::kLogicalXor:
        return each(y, [&](int i) { return (a[i] != 0) != (b[i] != 0); });
      case ElementwiseOp::kWhere:
        return each(y, [&](int i) { return a[i] != 0 ? b[i] : c[i]; });
      case ElementwiseOp::kClamp:
        return each(y, [&](int i) { return minimum(maximum(a[i], b[i]), c[i]); });
      default:
        break;
    }
    if constexpr (std::is_integral_v<C>) {
      switch (op) {
        case ElementwiseOp::kBitwiseNot:
          return each(y, [&](int i) { return ~a[i]; });
        case ElementwiseOp::kBitwiseAnd:
          return each(y, [&](int i) { return a[i] & b[i]; });
        case ElementwiseOp::kBitwiseOr:
          return each(y, [&](int i) { return a[i] | b[i]; });
        case ElementwiseOp::kBitwiseXor:
          return each(y, [&](int i) { return a[i] ^ b[i]; });
        case ElementwiseOp::kShiftLeft:
          return each(y, [&](int i) { return shift_left(a[i], b[i]); });
        case ElementwiseOp::kShiftRight:
          return each(y, [&](int i) { return shift_right(a[i], b[i]); });
        default:  // kCopy, and kCeil and its like, which leave an integer as it is
          return each(y, [&](int i) { return a[i]; });
      }
    } else {
      switch (op) {
        case ElementwiseOp::kCeil:
          return each(y, [&](int i) { return ceil(a[i]); });
        case ElementwiseOp::kFloor:
          return each(y, [&](int i) { return floor(a[i]); });
        case ElementwiseOp::kRound:
          return each(y, [&](int i) { return rint(a[i]); });
        case ElementwiseOp::kTrunc:
          return each(y, [&](int i) { return trunc(a[i]); });
        case ElementwiseOp::kSqrt:
          return each(y, [&](int i) { return sqrt(a[i]); });
        case ElementwiseOp::kRsqrt:
          return each(y, [&](int i) { return rsqrt(a[i]); });
        case ElementwiseOp::kReciprocal:
          return each(y, [&](int i) { return 1 / a[i]; });
        case ElementwiseOp::kIsNan:
          return each(y, [&](int i) { return is_nan(a[i]); });
        case ElementwiseOp::kIsInf:
          return each(y, [&](int i) { return isinf(a[i]); });
        case ElementwiseOp::kDiv:
          return each(y, [&](int i) { return a[i] / b[i]; });
        case ElementwiseOp::kLeakyRelu:
          return each(y, [&](int i) { return a[i] > 0 ? a[i] : a[i] * b[i]; });
        default:  // kCopy
          return each(y, [&](int i) { return a[i]; });
      }
    }
  }
};

/// Casts between any two of the dtypes.
template <DType... kDTypes>
bool launch_casts(const ElementwiseArgs& args, const LoopNest& nest, const FaultNote& note,
                  cudaStream_t stream, Status* status) {
  const auto from = [&](auto in) {
    return (... || launch_fixed<Arithmetic, ElementwiseOp::kCopy, decltype(in)::value, kDTypes>(
                       args, nest, note, stream, status));
  };
  return (... || from(std::integral_constant<DType, kDTypes>{}));
}

template <bool kSingly>
bool launch_one_op(const ElementwiseArgs& args, const LoopNest& nest, const FaultNote& note,
                   cudaStream_t stream, Status* status) {
  return launch_fixed_ops<Arithmetic, kSingly, ElementwiseOp::kAdd, ElementwiseOp::kMul,
                          ElementwiseOp::kDiv, ElementwiseOp::kNeg, ElementwiseOp::kRsqrt,
                          ElementwiseOp::kWhere>(args, nest, note, stream, status);
}

}  // namespace

Status launch_elementwise_arithmetic(const ElementwiseArgs& args, const LoopNest& nest,
                                     const FaultNote& note, cudaStream_t stream) {
  Status status;
  switch (args.compute) {
    case ComputeType::kFloat32:
      if (launch_one_op<false>(args, nest, note, stream, &status) ||
          launch_casts<DType::kFloat16, DType::kBFloat16, DType::kFloat32>(args, nest, note, stream,
                                                                           &status))
        return status;
      if (elementwise_allows(args, nest, 8))
        return launch_elementwise<Arithmetic, float, 8, 1>(args, nest, note, stream);
      if (elementwise_allows(args, nest, 4))
        return launch_elementwise<Arithmetic, float, 4, 1>(args, nest, note, stream);
      if (launch_one_op<true>(args, nest, note, stream, &status)) return status;
      return launch_elementwise<Arithmetic, float, 1, 4>(args, nest, note, stream);
    case ComputeType::kInt64:
      if (elementwise_allows(args, nest, 4))
        return launch_elementwise<Arithmetic, int64_t, 4, 1>(args, nest, note, stream);
      return launch_elementwise<Arithmetic, int64_t, 1, 4>(args, nest, note, stream);
    case ComputeType::kFloat64:
      return launch_elementwise<Arithmetic, double, 1, 2>(args, nest, note, stream);
  }
  return status;
}

}  // namespace cuda_int4
