// rope_append -- q[b, h, s]              = turn(norm(qkv[b, s, head h]))
//                k_cache[b, h, pos[s]]   = turn(norm(qkv[b, s, head n_heads + h]))
//                v_cache[b, h, pos[s]]   =           qkv[b, s, head n_heads + Hkv + h]
//                turn: (a, b) -> (a cos - b sin, b cos + a sin) of the pairs of a head
//                norm: x / sqrt(mean(x^2 over the head) + eps) * weight, where there is a weight
//
//   operand        dtype                 shape                           order      align
//   qkv            f16 | bf16 | f32      [B, S, n_given * D]             row-major  dtype (16 B: fast)
//   cos, sin       dtype of qkv | f32    [(B,) S, D] or [(B,) S, D/2]    row-major  likewise
//   input_pos      i32 | i64             [S] or [B, S]                   contiguous dtype
//   q_norm, k_norm f16 | bf16 | f32      [D]                             contiguous likewise; or absent
//   k_cache (out)  dtype of qkv | i8     [>= B, Hkv, T, D]               row-major  as qkv
//   v_cache (out)  dtype of qkv | i8     [>= B, Hkv, T, D]               row-major  as qkv
//   k_scale, v_scale (out)  f32          [>= B, Hkv, T]                  row-major  4 B; with i8
//   q (out)        dtype of qkv          [B, n_heads, S, D]              row-major  as qkv
//
// Requires  D even, n_given = n_heads + 2 * Hkv, or n_heads + Hkv: then the values are the keys as they
//           are in qkv (checked by validate_rope_append); pos in -T .. T - 1, from the end where
//           below 0: of a token at any other only q is written, and the position is noted
// Grid      one warp per head of qkv, or as many lanes as it has vectors of 16 bytes; blocks of 128
//           threads, at most 2^30, the rest in strides
// Bytes     reads qkv twice (its pairs lie in other lanes; the second time from L1), the tables and
//           the positions, writes q and one row of each cache a token. One token is bound by latency:
//           the weights are asked for before the wait, all else of heads up to 1 vector a lane at
//           once behind it
// Numerics  fp32. The norm is rms_norm.cu's: its order where a warp takes the row there too (up to 64
//           vectors of 16 B), one rounding to the dtype of qkv. Both products of the turn and their sum
//           are rounded to the dtype of the tables, the result to that of qkv, as by ops of their
//           own. Two tokens at one position: either's row, by vectors. Int8: what would be written,
//           over its scale, the greatest |x| of the head / 127, rounded to even; a head with an
//           infinity or NaN gets a scale that is none or not finite
// Source    own
#include <type_traits>

#include "launch_dependent.cuh"
#include "norm_weight.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rope_append.cuh"

namespace cuda_int4 {

namespace {

constexpr int kHeld = 1;  // vectors of a head that a lane asks for at once; 2 take 186 registers
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

template <typename C>
__device__ __forceinline__ float rounded_to(float value) {
  return as_float(from_float<C>(value));
}

// Vector v of a head, and what turns it: element i pairs with element `other(i)`.
template <typename X, typename C, typename W, int kVec>
struct Piece {
  static constexpr int kTableVec = kVec == 1 ? 1 : kVec / 2;
  using Vector = Elems<X, kVec>;
  using Table = Elems<C, kTableVec>;
  static constexpr int kTables = kVec / kTableVec;
  Vector own, partner;
  NormWeight<W, kVec> own_weight, partner_weight;
  Table cos[kTables], sin[kTables];

  // Where the pairs of vector v lie.
  static __device__ __forceinline__ int64_t partner_of(const RopeAppendKernelArgs& p, int64_t v) {
    const int64_t half = p.D / kVec / 2;
    if (p.interleaved) return kVec == 1 ? v ^ 1 : v;
    return v < half ? v + half : v - half;
  }

  __device__ __forceinline__ void load_weights(const RopeAppendKernelArgs& p, const void* weight,
                                               DType dtype, int64_t v) {
    own_weight.load(weight, dtype, v);
    partner_weight.load(weight, dtype, partner_of(p, v));
  }

  __device__ __forceinline__ void load(const RopeAppendKernelArgs& p, const Vector* head,
                                       int64_t table_row, bool is_turned, int64_t v) {
    own = head[v];
    if (!is_turned) return;
    partner = head[partner_of(p, v)];
    // In table elements: those of the vector, those of its pairs, or of its place in its half.
    const bool is_whole = p.table_D == p.D;
    int64_t at = v * kVec;
    if (!is_whole) at = p.interleaved ? at / 2 : at % (p.D / 2);
    const Table* from_cos =
        reinterpret_cast<const Table*>(static_cast<const C*>(p.cos) + table_row * p.table_D + at);
    const Table* from_sin =
        reinterpret_cast<const Table*>(static_cast<const C*>(p.sin) + table_row * p.table_D + at);
    const bool is_pairs = !is_whole && p.interleaved;
#pragma unroll
    for (int i = 0; i < kTables; ++i) {
      if (i > 0 && is_pairs) break;  // one of the tables' elements is for two of the vector's
      cos[i] = from_cos[i];
      sin[i] = from_sin[i];
    }
  }

  __device__ __forceinline__ Vector turned(const RopeAppendKernelArgs& p, bool is_normed,
                                           float factor, int64_t v) const {
    float x[kVec], other[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = as_float(own.values[i]);
      other[i] = as_float(partner.values[i]);
      if (is_normed) {
        x[i] = rounded_to<X>(x[i] * factor * own_weight[i]);
        other[i] = rounded_to<X>(other[i] * factor * partner_weight[i]);
      }
    }
    const bool is_pairs = p.table_D != p.D && p.interleaved;
    Vector out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float partner_value = other[i];
      if constexpr (kVec > 1) {
        if (p.interleaved) partner_value = other[i ^ 1];
      }
      const bool is_first = p.interleaved ? (v * kVec + i) % 2 == 0 : v * kVec < p.D / 2;
      const float c = as_float(is_pairs ? cos[0].values[i / 2 % kTableVec]
                                        : cos[i / kTableVec].values[i % kTableVec]);
      const float d = as_float(is_pairs ? sin[0].values[i / 2 % kTableVec]
                                        : sin[i / kTableVec].values[i % kTableVec]);
      // Never contracted: an fma would leave one product unrounded.
      const float kept = rounded_to<C>(__fmul_rn(x[i], c));
      const float moved = rounded_to<C>(__fmul_rn(partner_value, d));
      out.values[i] =
          from_float<X>(rounded_to<C>(is_first ? __fsub_rn(kept, moved) : __fadd_rn(kept, moved)));
    }
    return out;
  }
};

// The greatest |x|, as bits: NaN is above infinity.
template <typename X, int kVec>
__device__ __forceinline__ uint32_t greatest_of(const Elems<X, kVec>& vector, uint32_t greatest) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    greatest = max(greatest, __float_as_uint(as_float(vector.values[i])) & 0x7fffffffu);
  }
  return greatest;
}

template <typename X, int kVec>
__device__ __forceinline__ Elems<int8_t, kVec> quantized(const Elems<X, kVec>& vector,
                                                         float scale) {
  Elems<int8_t, kVec> codes;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float code = rintf(__fdiv_rn(as_float(vector.values[i]), scale));
    const bool is_code = code >= -127.f && code <= 127.f;  // or NaN: 0 / 0
    codes.values[i] = is_code ? static_cast<int8_t>(code) : int8_t{0};
  }
  return codes;
}

// Over the lanes of a head, a power of two of them within a warp.
__device__ __forceinline__ float head_sum(float value, int lanes) {
  const int lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const uint32_t mask = lanes == 32 ? 0xffffffffu : ((1u << lanes) - 1) << (lane / lanes * lanes);
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(mask, value, offset);
  return value;
}

// kNormed: with a norm, or two. kIsOnePiece: a head has as many lanes as vectors. Without the code
// for other calls more warps are in flight: 512 tokens of Llama-3-8B take 8.6 us for 24.
template <typename X, typename C, typename W, int kVec, bool kNormed, bool kIsInt8,
          bool kIsOnePiece>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendKernelArgs p) {
  using Vector = Elems<X, kVec>;
  griddepcontrol_launch_dependents();
  const int64_t n_qk = p.n_heads + p.n_kv_heads;
  const int64_t n_given = p.values_are_keys ? n_qk : n_qk + p.n_kv_heads;
  const int64_t n_items = p.B * p.S * n_given, n_vectors = p.D / kVec;
  const int lane = threadIdx.x, lanes = blockDim.x;  // 32 where they exchange something
  bool is_first = true;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; item < n_items;
       item += int64_t{gridDim.x} * blockDim.y) {
    const int64_t head = item % n_given, token = item / n_given;
    const int64_t s = token % p.S, b = token / p.S;
    const bool is_query = head < p.n_heads, is_turned = head < n_qk;
    const void* weight = is_query ? p.q_norm : is_turned ? p.k_norm : nullptr;
    const DType weight_dtype = is_query ? p.q_norm_dtype : p.k_norm_dtype;
    const bool is_normed = kNormed && weight != nullptr;

    Piece<X, C, W, kVec> pieces[kHeld];
    const auto load_weights = [&] {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t v = lane + lanes * i;
        if (is_normed && v < n_vectors) pieces[i].load_weights(p, weight, weight_dtype, v);
      }
    };
    const bool is_early = is_first && p.constant_weights;
    if (is_early) load_weights();
    if (is_first) griddepcontrol_wait();
    if (!is_early) load_weights();
    is_first = false;

    const Vector* from = reinterpret_cast<const Vector*>(static_cast<const X*>(p.qkv) + item * p.D);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = lane + lanes * i;
      if (v < n_vectors) pieces[i].load(p, from, b * p.table_stride + s, is_turned, v);
    }
    Vector* to = nullptr;        // of the turned head
    Vector* to_value = nullptr;  // of the head as it is
    int64_t at_row = 0;          // of the caches
    if (is_query) {
      to = reinterpret_cast<Vector*>(static_cast<X*>(p.q) +
                                     ((b * p.n_heads + head) * p.S + s) * p.D);
    } else {
      const int64_t at_pos = b * p.pos_stride + s;
      const int64_t given = p.pos_is_int64 ? static_cast<const int64_t*>(p.input_pos)[at_pos]
                                           : static_cast<const int32_t*>(p.input_pos)[at_pos];
      const int64_t place = given < 0 ? given + p.T : given;
      if (place < 0 || place >= p.T) {
        if (lane == 0) note_fault(p.note, kIndexOutOfRange, given, p.T);
        continue;  // all lanes of the head
      }
      const int64_t kv_head = head - (is_turned ? p.n_heads : n_qk);
      at_row = (b * p.n_kv_heads + kv_head) * p.T + place;
      if constexpr (!kIsInt8) {
        const int64_t at = at_row * p.D;
        if (is_turned) to = reinterpret_cast<Vector*>(static_cast<X*>(p.k_cache) + at);
        if (!is_turned || p.values_are_keys)
          to_value = reinterpret_cast<Vector*>(static_cast<X*>(p.v_cache) + at);
      }
    }

    float factor = 1.f;
    if (is_normed) {
      float sum = 0.f;
      const auto add_squares = [&](const Vector& vector) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float value = as_float(vector.values[i]);
          sum = fmaf(value, value, sum);
        }
      };
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (lane + lanes * i < n_vectors) add_squares(pieces[i].own);
      }
      if constexpr (!kIsOnePiece) {
        for (int64_t v = lane + lanes * kHeld; v < n_vectors; v += lanes) add_squares(from[v]);
      }
      factor = 1.f / sqrtf(head_sum(sum, lanes) / static_cast<float>(p.D) + p.eps);
    }

    const auto for_each_piece = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (lane + lanes * i < n_vectors) f(pieces[i], lane + lanes * i);
      }
      if constexpr (!kIsOnePiece) {
        for (int64_t v = lane + lanes * kHeld; v < n_vectors; v += lanes) {
          Piece<X, C, W, kVec> piece;
          if (is_normed) piece.load_weights(p, weight, weight_dtype, v);
          piece.load(p, from, b * p.table_stride + s, is_turned, v);
          f(piece, v);
        }
      }
    };
    if (!kIsInt8 || is_query) {
      for_each_piece([&](const Piece<X, C, W, kVec>& piece, int64_t v) {
        if (to_value != nullptr) to_value[v] = piece.own;
        if (to != nullptr) to[v] = piece.turned(p, is_normed, factor, v);
      });
      continue;
    }
    // As int8: a look for the greatest, then the codes.
    const auto write_codes = [&](void* cache, float* scales, auto value_of) {
      uint32_t greatest = 0;
      for_each_piece([&](const Piece<X, C, W, kVec>& piece, int64_t v) {
        greatest = greatest_of(value_of(piece, v), greatest);
      });
      const float scale =
          __fdiv_rn(__uint_as_float(__reduce_max_sync(0xffffffffu, greatest)), 127.f);
      auto* codes =
          reinterpret_cast<Elems<int8_t, kVec>*>(static_cast<int8_t*>(cache) + at_row * p.D);
      for_each_piece([&](const Piece<X, C, W, kVec>& piece, int64_t v) {
        codes[v] = quantized(value_of(piece, v), scale);
      });
      if (lane == 0) scales[at_row] = scale;
    };
    if (is_turned) {
      write_codes(p.k_cache, p.k_scale, [&](const Piece<X, C, W, kVec>& piece, int64_t v) {
        return piece.turned(p, is_normed, factor, v);
      });
    }
    if (!is_turned || p.values_are_keys) {
      write_codes(p.v_cache, p.v_scale,
                  [](const Piece<X, C, W, kVec>& piece, int64_t) { return piece.own; });
    }
  }
}

template <typename X, typename C, typename W, int kVec, bool kNormed, bool kIsInt8,
          bool kIsOnePiece>
cudaError_t launch(const RopeAppendKernelArgs& args, int lanes, cudaStream_t stream) {
  const int heads = kThreads / lanes;
  const int64_t n_given = args.n_heads + (args.values_are_keys ? 1 : 2) * args.n_kv_heads;
  const int64_t blocks = (args.B * args.S * n_given + heads - 1) / heads;
  if (blocks == 0) return cudaSuccess;
  return launch_dependent(rope_append_kernel<X, C, W, kVec, kNormed, kIsInt8, kIsOnePiece>,
                          static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                          dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(heads)), 0,
                          stream, args);
}

template <typename X, typename C, typename W, int kVec, bool kNormed>
cudaError_t choose_lanes(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  if (args.k_scale != nullptr) return launch<X, C, W, kVec, kNormed, true, false>(args, 32, stream);
  if constexpr (kVec > 1) {
    int lanes = 1;
    while (lanes < args.D / kVec) lanes *= 2;
    if (lanes <= (kNormed ? 32 : kThreads))
      return launch<X, C, W, kVec, kNormed, false, true>(args, lanes, stream);
  }
  return launch<X, C, W, kVec, kNormed, false, false>(args, 32, stream);
}

template <typename X, typename C>
cudaError_t choose_weight(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  constexpr int kVec = kElemsPer16Bytes<X>;
  uintptr_t pointers = 0;
  for (const void* pointer :
       {args.qkv, args.cos, args.sin, args.q_norm, args.k_norm,
        static_cast<const void*>(args.k_cache), static_cast<const void*>(args.v_cache),
        static_cast<const void*>(args.q)})
    pointers |= reinterpret_cast<uintptr_t>(pointer);
  const auto weights_are = [&](DType dtype) {
    return (args.q_norm == nullptr || args.q_norm_dtype == dtype) &&
           (args.k_norm == nullptr || args.k_norm_dtype == dtype);
  };
  const bool is_normed = args.q_norm != nullptr || args.k_norm != nullptr;
  if (args.D % (2 * kVec) == 0 && pointers % 16 == 0) {
    if (!is_normed) return choose_lanes<X, C, X, kVec, false>(args, stream);
    if (weights_are(args.dtype)) return choose_lanes<X, C, X, kVec, true>(args, stream);
    if (weights_are(DType::kFloat32)) return choose_lanes<X, C, float, kVec, true>(args, stream);
  }
  return is_normed ? choose_lanes<X, C, AnyFloat, 1, true>(args, stream)
                   : choose_lanes<X, C, X, 1, false>(args, stream);
}

template <typename X>
cudaError_t choose(const RopeAppendKernelArgs& args, cudaStream_t stream) {
  return args.table_dtype == DType::kFloat32 ? choose_weight<X, float>(args, stream)
                                             : choose_weight<X, X>(args, stream);
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
