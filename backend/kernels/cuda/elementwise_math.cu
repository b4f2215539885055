// elementwise_math -- out[i] = f(a[i], b[i], c[i]): functions of the mathematics library
//
//   operand    dtype  shape              order in memory      align
//   a, b, c    any    that of out        any strides, 0 too   dtype
//   out        any    up to 8 dims       any strides          dtype; may be an operand itself
//
// Requires  a, b and c broadcast to out; int64 only for kPow   (checked by who calls)
// Grid      as elementwise_arithmetic
// Bytes     reads a, b, c, writes out; the functions cost more than the bytes only for pow and tan
// Numerics  computes in float32 (CUDA's functions without fast mathematics: 1 to 4 ulp) or float64;
//           one rounding at the store
// Source    own
#include "elementwise.cuh"

namespace cuda_int4 {

namespace {

template <typename C>
__device__ __forceinline__ C sigmoid(C a) {
  return 1 / (1 + exp(-a));
}

template <typename C>
__device__ __forceinline__ C gelu(C a) {
  constexpr C kSqrtHalf = static_cast<C>(0.70710678118654752440);
  return static_cast<C>(0.5) * a * (1 + erf(a * kSqrtHalf));
}

template <typename C>
__device__ __forceinline__ C gelu_tanh(C a) {
  constexpr C kSqrt2OverPi = static_cast<C>(0.79788456080286535588);
  constexpr C kCubic = static_cast<C>(0.044715);
  return static_cast<C>(0.5) * a * (1 + tanh(kSqrt2OverPi * (a + kCubic * a * a * a)));
}

template <typename C>
__device__ __forceinline__ C logit(C a, C eps) {
  const C high = 1 - eps;
  const C p = eps < 0 ? a : a < eps ? eps : a > high ? high : a;
  return log(p / (1 - p));
}

__device__ __forceinline__ int64_t power(int64_t base, int64_t exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent & 1 ? -1 : 1) : 0;
  uint64_t result = 1, square = static_cast<uint64_t>(base);
  for (uint64_t rest = static_cast<uint64_t>(exponent); rest != 0; rest >>= 1) {
    if (rest & 1) result *= square;
    square *= square;
  }
  return static_cast<int64_t>(result);
}

struct NoDivision {
  template <typename C, int kWidth>
  static __device__ __forceinline__ bool divides_by_zero(ElementwiseOp, const C (&)[kWidth]) {
    return false;
  }
};

struct Power : NoDivision {  // of integers
  template <typename C, int kWidth>
  static __device__ __forceinline__ void apply(ElementwiseOp, const C (&a)[kWidth],
                                               const C (&b)[kWidth], const C (&)[kWidth], C,
                                               C (&y)[kWidth]) {
    each(y, [&](int i) { return power(a[i], b[i]); });
  }
};

struct Mathematics : NoDivision {
  template <typename C, int kWidth>
  static __device__ __forceinline__ void apply(ElementwiseOp op, const C (&a)[kWidth],
                                               const C (&b)[kWidth], const C (&c)[kWidth], C alpha,
                                               C (&y)[kWidth]) {
    switch (op) {
      case ElementwiseOp::kExp:
        return each(y, [&](int i) { return exp(a[i]); });
      case ElementwiseOp::kExpm1:
        return each(y, [&](int i) { return expm1(a[i]); });
      case ElementwiseOp::kLog:
        return each(y, [&](int i) { return log(a[i]); });
      case ElementwiseOp::kLog10:
        return each(y, [&](int i) { return log10(a[i]); });
      case ElementwiseOp::kLog1p:
        return each(y, [&](int i) { return log1p(a[i]); });
      case ElementwiseOp::kLog2:
        return each(y, [&](int i) { return log2(a[i]); });
      case ElementwiseOp::kSin:
        return each(y, [&](int i) { return sin(a[i]); });
      case ElementwiseOp::kCos:
        return each(y, [&](int i) { return cos(a[i]); });
      case ElementwiseOp::kTan:
        return each(y, [&](int i) { return tan(a[i]); });
      case ElementwiseOp::kSinh:
        return each(y, [&](int i) { return sinh(a[i]); });
      case ElementwiseOp::kCosh:
        return each(y, [&](int i) { return cosh(a[i]); });
      case ElementwiseOp::kTanh:
        return each(y, [&](int i) { return tanh(a[i]); });
      case ElementwiseOp::kAsin:
        return each(y, [&](int i) { return asin(a[i]); });
      case ElementwiseOp::kAcos:
        return each(y, [&](int i) { return acos(a[i]); });
      case ElementwiseOp::kAtan:
        return each(y, [&](int i) { return atan(a[i]); });
      case ElementwiseOp::kAsinh:
        return each(y, [&](int i) { return asinh(a[i]); });
      case ElementwiseOp::kAcosh:
        return each(y, [&](int i) { return acosh(a[i]); });
      case ElementwiseOp::kAtanh:
        return each(y, [&](int i) { return atanh(a[i]); });
      case ElementwiseOp::kErf:
        return each(y, [&](int i) { return erf(a[i]); });
      case ElementwiseOp::kGelu:
        return each(y, [&](int i) { return gelu(a[i]); });
      case ElementwiseOp::kGeluTanh:
        return each(y, [&](int i) { return gelu_tanh(a[i]); });
      case ElementwiseOp::kSigmoid:
        return each(y, [&](int i) { return sigmoid(a[i]); });
      case ElementwiseOp::kLogit:
        return each(y, [&](int i) { return logit(a[i], b[i]); });
      case ElementwiseOp::kAtan2:
        return each(y, [&](int i) { return atan2(a[i], b[i]); });
      case ElementwiseOp::kPow:
        return each(y, [&](int i) { return pow(a[i], b[i]); });
      case ElementwiseOp::kElu:
        return each(y, [&](int i) { return a[i] <= 0 ? expm1(a[i] * alpha) * b[i] : a[i] * c[i]; });
      default:
        return each(y, [&](int i) { return a[i]; });
    }
  }
};

template <bool kSingly>
bool launch_one_op(const ElementwiseArgs& args, const LoopNest& nest, const FaultNote& note,
                   cudaStream_t stream, Status* status) {
  return launch_fixed_ops<Mathematics, kSingly, ElementwiseOp::kExp, ElementwiseOp::kSin,
                          ElementwiseOp::kCos, ElementwiseOp::kTanh, ElementwiseOp::kSigmoid,
                          ElementwiseOp::kGelu, ElementwiseOp::kGeluTanh>(args, nest, note, stream,
                                                                          status);
}

}  // namespace

Status launch_elementwise_math(const ElementwiseArgs& args, const LoopNest& nest,
                               const FaultNote& note, cudaStream_t stream) {
  Status status;
  switch (args.compute) {
    case ComputeType::kFloat32:
      if (launch_one_op<false>(args, nest, note, stream, &status)) return status;
      if (elementwise_allows(args, nest, 4))
        return launch_elementwise<Mathematics, float, 4, 1>(args, nest, note, stream);
      if (launch_one_op<true>(args, nest, note, stream, &status)) return status;
      return launch_elementwise<Mathematics, float, 1, 4>(args, nest, note, stream);
    case ComputeType::kInt64:
      return launch_elementwise<Power, int64_t, 1, 1>(args, nest, note, stream);
    case ComputeType::kFloat64:
      return launch_elementwise<Mathematics, double, 1, 1>(args, nest, note, stream);
  }
  return status;
}

}  // namespace cuda_int4
