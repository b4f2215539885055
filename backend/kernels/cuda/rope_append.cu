// rope_append -- q[b, h, s]              = turn(qkv[b, s, head h])
//                k_cache[b, h, pos[s]]   = turn(qkv[b, s, head n_heads + h])
//                v_cache[b, h, pos[s]]   =      qkv[b, s, head n_heads + Hkv + h]
//                turn: (a, b) -> (a cos - b sin, b cos + a sin) of the pairs of a head
//
//   operand        dtype                 shape                           order      align
//   qkv            f16 | bf16 | f32      [B, S, (n_heads + 2 * Hkv) * D] row-major  dtype
//   cos, sin       dtype of qkv | f32    [S, D] or [S, D/2]              row-major  dtype
//   input_pos      i32 | i64             [S]                             contiguous dtype
//   k_cache (out)  dtype of qkv          [B, Hkv, T, D]                  row-major  dtype
//   v_cache (out)  dtype of qkv          [B, Hkv, T, D]                  row-major  dtype
//   q (out)        dtype of qkv          [B, n_heads, S, D]              row-major  dtype
//
// Requires  D even   (checked by validate_rope_append); pos in -T .. T - 1, from the end where below
//           0: of a token at any other only q is written, and the position is noted
// Grid      one thread per pair; at most 2^30 blocks of 256, the rest in strides
// Bytes     reads qkv, the tables and the positions, writes q and one row of each cache a token.
//           One token is bound by latency: 12 blocks for 48 heads of 128, each load in flight at once
// Numerics  fp32; both products and their sum are rounded to the dtype of the tables, the result to
//           that of qkv, as by ops of their own. Two tokens at one position: either's row, by pairs
// Source    own
#include "launch_dependent.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rope_append.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

template <typename C>
__device__ __forceinline__ float rounded_to(float value) {
  return as_float(from_float<C>(value));
}

template <typename X, typename C>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendKernelArgs p) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t half = p.D / 2, n_all = p.n_heads + 2 * p.n_kv_heads;
  const int64_t n_pairs = p.B * p.S * n_all * half;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < n_pairs;
       pair += int64_t{gridDim.x} * kThreads) {
    const int64_t i = pair % half, item = pair / half;
    const int64_t head = item % n_all, token = item / n_all;
    const int64_t s = token % p.S, b = token / p.S;
    const int64_t first = p.interleaved ? 2 * i : i;
    const int64_t second = p.interleaved ? 2 * i + 1 : i + half;
    const X* from = static_cast<const X*>(p.qkv) + item * p.D;
    const X x_a = from[first], x_b = from[second];

    X* to = static_cast<X*>(p.q) + ((b * p.n_heads + head) * p.S + s) * p.D;
    if (head >= p.n_heads) {
      const int64_t given = p.pos_is_int64 ? static_cast<const int64_t*>(p.input_pos)[s]
                                           : static_cast<const int32_t*>(p.input_pos)[s];
      const int64_t place = given < 0 ? given + p.T : given;
      if (place < 0 || place >= p.T) {
        note_fault(p.note, kIndexOutOfRange, given, p.T);
        continue;
      }
      const bool is_key = head < p.n_heads + p.n_kv_heads;
      const int64_t kv_head = head - p.n_heads - (is_key ? 0 : p.n_kv_heads);
      X* cache = static_cast<X*>(is_key ? p.k_cache : p.v_cache);
      to = cache + ((b * p.n_kv_heads + kv_head) * p.T + place) * p.D;
      if (!is_key) {
        to[first] = x_a;
        to[second] = x_b;
        continue;
      }
    }
    const int64_t row = s * p.table_D;
    const int64_t at_a = row + (p.table_D == p.D ? first : i);
    const int64_t at_b = row + (p.table_D == p.D ? second : i);
    const C* cos = static_cast<const C*>(p.cos);
    const C* sin = static_cast<const C*>(p.sin);
    const float a = as_float(x_a), b_value = as_float(x_b);
    // Never contracted: an fma would leave one product unrounded.
    const float a_cos = rounded_to<C>(__fmul_rn(a, as_float(cos[at_a])));
    const float b_sin = rounded_to<C>(__fmul_rn(b_value, as_float(sin[at_a])));
    const float b_cos = rounded_to<C>(__fmul_rn(b_value, as_float(cos[at_b])));
    const float a_sin = rounded_to<C>(__fmul_rn(a, as_float(sin[at_b])));
    to[first] = from_float<X>(rounded_to<C>(__fsub_rn(a_cos, b_sin)));
    to[second] = from_float<X>(rounded_to<C>(__fadd_rn(b_cos, a_sin)));
  }
}

template <typename X, typename C>
cudaError_t launch(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  const int64_t n_pairs = args.B * args.S * (args.n_heads + 2 * args.n_kv_heads) * (args.D / 2);
  const int64_t blocks = (n_pairs + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  return launch_dependent(rope_append_kernel<X, C>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                          kThreads, 0, stream, args);
}

template <typename X>
cudaError_t choose(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  return args.table_dtype == DType::kFloat32 ? launch<X, float>(args, stream)
                                             : launch<X, X>(args, stream);
}

}  // namespace

cudaError_t launch_rope_append(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return choose<__half>(args, stream);
    case DType::kBFloat16:
      return choose<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
