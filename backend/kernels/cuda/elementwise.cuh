// The elementwise kernel, a template over the type it computes with, the family of its ops and how
// many elements a thread takes; elementwise_arithmetic.cu and elementwise_math.cu instantiate it.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"
#include "fault.cuh"
#include "launch_dependent.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"
#include "ptx.cuh"
#include "tensor_kernels.h"

namespace cuda_int4 {

constexpr int kElementwiseThreads = 128;

// How an operand reaches the registers: its elements side by side, one for all of them, or a number
// of the call.
enum class OperandMode : int32_t { kVector, kSplat, kNumber };

struct ElementwiseOperand {
  const char* data;
  DType dtype;
  OperandMode mode;
  Number number;
};

struct ElementwiseParams {
  DeviceLoop<4> loop;  // operand 0 is out
  ElementwiseOp op;
  ElementwiseOperand in[3];
  Number alpha;
  char* out;
  DType out_dtype;
  FaultNote note;
};

// y[i] = f(i)
template <int kWidth, typename C, typename F>
__device__ __forceinline__ void each(C (&y)[kWidth], F f) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] = static_cast<C>(f(i));
}

template <typename C>
__device__ __forceinline__ C number_as(const Number& number) {
  if constexpr (std::is_integral_v<C>)
    return number.as_int;
  else
    return static_cast<C>(number.as_double);
}

// What a kernel knows of its call when it is compiled: nothing ...
struct AnyCall {
  static constexpr int kInputs = 3;
  static __device__ ElementwiseOp op(const ElementwiseParams& p) { return p.op; }
  static __device__ DType in_dtype(const ElementwiseParams& p, int k) { return p.in[k].dtype; }
  static __device__ DType out_dtype(const ElementwiseParams& p) { return p.out_dtype; }
};

constexpr int elementwise_inputs(ElementwiseOp op) {
  if (op == ElementwiseOp::kWhere) return 3;
  const bool is_binary =
      op == ElementwiseOp::kAdd || op == ElementwiseOp::kMul || op == ElementwiseOp::kDiv;
  return is_binary ? 2 : 1;
}

// ... or the op and the dtypes. An add of 4096 bf16 takes 1.25 us so and 2.09 us by AnyCall (H200, in
// a CUDA graph; launch_dependent has a part in it), whose code jumps about in 3000 instructions.
template <ElementwiseOp kOp, DType kIn, DType kOut>
struct FixedCall {
  static constexpr int kInputs = elementwise_inputs(kOp);
  static __device__ constexpr ElementwiseOp op(const ElementwiseParams&) { return kOp; }
  static __host__ __device__ constexpr DType in_dtype(int k) {
    return kOp == ElementwiseOp::kWhere && k == 0 ? DType::kBool : kIn;
  }
  static __device__ constexpr DType in_dtype(const ElementwiseParams&, int k) {
    return in_dtype(k);
  }
  static __device__ constexpr DType out_dtype(const ElementwiseParams&) { return kOut; }
};

__host__ __device__ __forceinline__ constexpr int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool:
      return 1;
    case DType::kInt16:
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    default:
      return 8;
  }
}

// A thread takes kVectors times kWidth elements. Family::apply(op, a, b, c, alpha, y) computes
// them, Family::divides_by_zero(op, b) looks for what it cannot.
template <typename Family, typename C, int kWidth, int kVectors, typename Call>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_kernel(const __grid_constant__ ElementwiseParams p) {
  constexpr int kElems = kWidth * kVectors, kInputs = Call::kInputs;
  const uint32_t first = blockIdx.x * (kElementwiseThreads * kVectors) + threadIdx.x;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  RawElems<kWidth> raw[3][kVectors];
  char* out[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t step = first + v * kElementwiseThreads;
    int64_t offsets[4];
    p.loop.offsets(step, offsets);
    out[v] = step < p.loop.n_steps ? p.out + offsets[0] : nullptr;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      raw[k][v].set(0x01010101);  // past the end: no 0 to divide by
      if (out[v] == nullptr) continue;
      const int bytes = bytes_of(Call::in_dtype(p, k));
      if (p.in[k].mode == OperandMode::kVector)
        raw[k][v].load(p.in[k].data + offsets[k + 1], kWidth * bytes);
      else if (p.in[k].mode == OperandMode::kSplat)
        raw[k][v].load(p.in[k].data + offsets[k + 1], bytes);
    }
  }
  C x[3][kElems];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    if (p.in[k].mode == OperandMode::kVector) {
      from_raw(raw[k], Call::in_dtype(p, k), x[k]);
      continue;
    }
    C one[kVectors];
    each(one, [&](int) { return number_as<C>(p.in[k].number); });
    if (p.in[k].mode == OperandMode::kSplat) {
      RawElems<1> splats[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        splats[v].words[0] = raw[k][v].words[0], splats[v].words[1] = raw[k][v].words[1];
      from_raw(splats, Call::in_dtype(p, k), one);
    }
    each(x[k], [&](int i) { return one[i / kWidth]; });
  }
  C y[kElems];
  if (Family::divides_by_zero(Call::op(p), x[1])) note_fault(p.note, kDivisionByZero, 0, 0);
  Family::apply(Call::op(p), x[0], x[1], x[2], number_as<C>(p.alpha), y);
  RawElems<kWidth> result[kVectors];
  to_raw(y, Call::out_dtype(p), result);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (out[v] != nullptr) result[v].store(out[v], kWidth * bytes_of(Call::out_dtype(p)));
}
/// Whether all operands can be taken width elements at a time.
inline bool elementwise_allows(const ElementwiseArgs& args, const LoopNest& nest, int64_t width) {
  const int64_t max_bytes = width == 8 ? 2 : 8;
  for (int k = 0; k <= args.n_in; ++k) {
    const TensorView& view = k == 0 ? args.out : args.in[k - 1];
    if (!view.present() || (k > 0 && nest.is_splat(k))) continue;
    const int64_t bytes = dtype_bytes(view.dtype);
    const int64_t alignment = width * bytes < 16 ? width * bytes : 16;
    if (bytes > max_bytes || !nest.has_vectors(k, width, bytes, alignment)) return false;
  }
  return true;
}

template <typename Family, typename C, int kWidth, int kVectors, typename Call = AnyCall>
Status launch_elementwise(const ElementwiseArgs& args, const LoopNest& collapsed,
                          const FaultNote& note, cudaStream_t stream) {
  LoopNest nest = collapsed;
  ElementwiseParams p = {};
  p.op = args.op;
  p.alpha = args.alpha;
  p.note = note;
  p.out = nest.data[0];
  p.out_dtype = args.out.dtype;
  for (int k = 0; k < 3; ++k) {
    ElementwiseOperand& in = p.in[k];
    in.mode = OperandMode::kNumber;
    in.number = args.numbers[k];
    if (k >= args.n_in || !args.in[k].present()) continue;
    in.data = nest.data[k + 1];
    in.dtype = args.in[k].dtype;
    in.mode = kWidth > 1 && nest.is_splat(k + 1) ? OperandMode::kSplat : OperandMode::kVector;
  }
  nest.widen(kWidth);
  p.loop = nest.device_loop<4>();
  constexpr uint32_t kSteps = kElementwiseThreads * kVectors;
  const cudaError_t code =
      launch_dependent(elementwise_kernel<Family, C, kWidth, kVectors, Call>,
                       (p.loop.n_steps + kSteps - 1) / kSteps, kElementwiseThreads, 0, stream, p);
  return launch_status(args.who, code);
}

/// Launches the kernel for just this op and these dtypes, if the call is one of them and its
/// operands can be taken by vectors, or, with kSingly, one by one: x + a column, 16384 x 4095 bf16,
/// takes 648 us by AnyCall (H200).
template <typename Family, ElementwiseOp kOp, DType kIn, DType kOut, bool kSingly = false>
bool launch_fixed(const ElementwiseArgs& args, const LoopNest& nest, const FaultNote& note,
                  cudaStream_t stream, Status* status) {
  using Call = FixedCall<kOp, kIn, kOut>;
  constexpr int kWidth = kSingly ? 1 : bytes_of(kIn) == 2 && bytes_of(kOut) == 2 ? 8 : 4;
  constexpr int kVectors = kSingly ? 8 : 2;
  if (args.op != kOp || args.out.dtype != kOut || args.n_in != Call::kInputs) return false;
  for (int k = 0; k < args.n_in; ++k)
    if (args.in[k].present() && args.in[k].dtype != Call::in_dtype(k)) return false;
  if (!kSingly && !elementwise_allows(args, nest, kWidth)) return false;
  *status = launch_elementwise<Family, float, kWidth, kVectors, Call>(args, nest, note, stream);
  return true;
}

template <typename Family, bool kSingly, ElementwiseOp... kOps>
bool launch_fixed_ops(const ElementwiseArgs& args, const LoopNest& nest, const FaultNote& note,
                      cudaStream_t stream, Status* status) {
  constexpr DType kHalf = DType::kFloat16, kBfloat = DType::kBFloat16, kFloat = DType::kFloat32;
  const auto launch = [&](auto op) {
    constexpr ElementwiseOp kOp = decltype(op)::value;
    return launch_fixed<Family, kOp, kHalf, kHalf, kSingly>(args, nest, note, stream, status) ||
           launch_fixed<Family, kOp, kBfloat, kBfloat, kSingly>(args, nest, note, stream, status) ||
           launch_fixed<Family, kOp, kFloat, kFloat, kSingly>(args, nest, note, stream, status);
  };
  return (... || launch(std::integral_constant<ElementwiseOp, kOps>{}));
}

/// add, mul, where, comparisons, ...: elementwise_arithmetic.cu.
Status launch_elementwise_arithmetic(const ElementwiseArgs& args, const LoopNest& nest,
                                     const FaultNote& note, cudaStream_t stream);
/// exp, gelu, pow, ...: elementwise_math.cu.
Status launch_elementwise_math(const ElementwiseArgs& args, const LoopNest& nest,
                               const FaultNote& note, cudaStream_t stream);

}  // namespace cuda_int4
