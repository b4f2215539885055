// The elementwise kernel, a template over the type it computes with, the family of its ops and how
// many elements a thread takes; elementwise_arithmetic.cu and elementwise_math.cu instantiate it.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"
#include "fault.cuh"
#include "launch_status.cuh"
#include "loop_nest.cuh"
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
  int32_t n_bytes;  // of one load
  Number number;
};

struct ElementwiseParams {
  DeviceLoop<4> loop;  // operand 0 is out
  ElementwiseOp op;
  ElementwiseOperand in[3];
  Number alpha;
  char* out;
  DType out_dtype;
  int32_t out_n_bytes;
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

// Family::apply(op, a, b, c, alpha, y), kWidth values each, and Family::divides_by_zero(op, b).
template <typename Family, typename C, int kWidth>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_kernel(const __grid_constant__ ElementwiseParams p) {
  const uint32_t step = blockIdx.x * kElementwiseThreads + threadIdx.x;
  if (step >= p.loop.n_steps) return;
  int64_t offsets[4];
  p.loop.offsets(step, offsets);
  RawElems<kWidth> raw[3];
#pragma unroll
  for (int k = 0; k < 3; ++k)
    if (p.in[k].mode != OperandMode::kNumber)
      raw[k].load(p.in[k].data + offsets[k + 1], p.in[k].n_bytes);
  C x[3][kWidth];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (p.in[k].mode == OperandMode::kVector) {
      from_raw<C, kWidth>(raw[k], p.in[k].dtype, x[k]);
      continue;
    }
    C one[1] = {number_as<C>(p.in[k].number)};
    if (p.in[k].mode == OperandMode::kSplat) {
      RawElems<1> first;
      first.words[0] = raw[k].words[0], first.words[1] = raw[k].words[1];
      from_raw<C, 1>(first, p.in[k].dtype, one);
    }
    each(x[k], [&](int) { return one[0]; });
  }
  if (Family::divides_by_zero(p.op, x[1])) note_fault(p.note, kDivisionByZero, 0, 0);
  C y[kWidth];
  Family::apply(p.op, x[0], x[1], x[2], number_as<C>(p.alpha), y);
  RawElems<kWidth> result;
  to_raw<C, kWidth>(y, p.out_dtype, &result);
  result.store(p.out + offsets[0], p.out_n_bytes);
}

// As many elements to a thread as `nest` allows: 8 where all have at most 2 bytes, else 4, else 1.
template <typename Family, typename C, int kWidth>
Status launch_elementwise(const ElementwiseArgs& args, const LoopNest& collapsed,
                          const FaultNote& note, cudaStream_t stream) {
  LoopNest nest = collapsed;
  ElementwiseParams p = {};
  p.op = args.op;
  p.alpha = args.alpha;
  p.note = note;
  p.out = nest.data[0];
  p.out_dtype = args.out.dtype;
  p.out_n_bytes = static_cast<int32_t>(kWidth * dtype_bytes(args.out.dtype));
  for (int k = 0; k < 3; ++k) {
    ElementwiseOperand& in = p.in[k];
    in.mode = OperandMode::kNumber;
    in.number = args.numbers[k];
    if (k >= args.n_in || !args.in[k].present()) continue;
    const int32_t bytes = static_cast<int32_t>(dtype_bytes(args.in[k].dtype));
    in.data = nest.data[k + 1];
    in.dtype = args.in[k].dtype;
    in.mode = kWidth > 1 && nest.is_splat(k + 1) ? OperandMode::kSplat : OperandMode::kVector;
    in.n_bytes = in.mode == OperandMode::kVector ? kWidth * bytes : bytes;
  }
  nest.widen(kWidth);
  p.loop = nest.device_loop<4>();
  const unsigned blocks = (p.loop.n_steps + kElementwiseThreads - 1) / kElementwiseThreads;
  elementwise_kernel<Family, C, kWidth><<<blocks, kElementwiseThreads, 0, stream>>>(p);
  return launch_status(args.who, cudaGetLastError());
}

/// Whether all operands can be taken kWidth elements at a time.
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

/// add, mul, where, comparisons, ...: elementwise_arithmetic.cu.
Status launch_elementwise_arithmetic(const ElementwiseArgs& args, const LoopNest& nest,
                                     const FaultNote& note, cudaStream_t stream);
/// exp, gelu, pow, ...: elementwise_math.cu.
Status launch_elementwise_math(const ElementwiseArgs& args, const LoopNest& nest,
                               const FaultNote& note, cudaStream_t stream);

}  // namespace cuda_int4
