// attention for one instruction set S -- y = softmax(cap(q @ k.T * scale) + mask) @ v
//
//   operand  dtype            shape             order in memory
//   q        f16, bf16, f32   [B, Hq, S, D]     last dimension contiguous
//   k, v     dtype of q | i8  [B, Hkv, T, D]    last dimension contiguous
//   k_scale, v_scale  f32     [B, Hkv, T]       contiguous; with i8: the value of a key is k * k_scale
//   mask     bool | of q      [B, Hq, S, T]     any strides, 0 where broadcast
//   input_pos  i32 | i64      [S] | [B, S]      contiguous; keys seen: pos - window < t <= pos
//   y (out)  dtype of q       [B, Hq, S, D]     last dimension contiguous
//
// One pass over the keys in tiles (online softmax): no score matrix, no scratch. The rows of all
// query heads that share a key head go together, so a tile is converted to float32 once for them.
// Numerics  float32 throughout, one rounding at the store. A row that may attend to nothing is 0,
//           as in torch. NaN and infinity in q, k, v spread to the rows that read them.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu_kernels.h"
#include "rowwise.h"
#include "simd_math.h"

namespace cuda_int4 {
namespace cpu {

constexpr int64_t kTileKeys = 16;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// The running softmax of up to kAttentionRows query rows; rows padded to `D_pad` floats.
struct AttentionState {
  alignas(64) float q[kAttentionRows * kMaxHeadDim];
  alignas(64) float sum_pv[kAttentionRows * kMaxHeadDim];  // sum of exp(score - top) * v
  alignas(64) float tile[kTileKeys * kMaxHeadDim];         // keys, then values, in float32
  alignas(64) float scores[kAttentionRows][kTileKeys];
  float top[kAttentionRows];    // greatest score so far
  float sum_p[kAttentionRows];  // sum of exp(score - top)
};

template <class S, class T>
static void load_rows(const T* from, int64_t row_stride, int64_t n_rows, int64_t D, int64_t D_pad,
                      float* to) {
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t d = 0; d < D; d += S::kLanes) {
      S::store(to + r * D_pad + d, load_partial<S>(from + r * row_stride + d, D - d));
    }
  }
}

// Rows t0 .. t0 + n_rows - 1 of keys or values; int8 ones times their scales.
template <class S, class T>
static void load_keys(const void* from, const int64_t* strides, const float* scale,
                      const AttentionJob& job, int64_t b, int64_t hkv, int64_t t0, int64_t n_rows,
                      int64_t D_pad, float* to) {
  const int64_t at = b * strides[0] + hkv * strides[1] + t0 * strides[2];
  if (scale == nullptr) {
    load_rows<S>(static_cast<const T*>(from) + at, strides[2], n_rows, job.D, D_pad, to);
    return;
  }
  const int8_t* bytes = static_cast<const int8_t*>(from) + at;
  scale += (b * job.Hkv + hkv) * job.T + t0;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t d = 0; d < job.D; ++d)
      to[r * D_pad + d] = static_cast<float>(bytes[r * strides[2] + d]) * scale[r];
    for (int64_t d = job.D; d < D_pad; ++d) to[r * D_pad + d] = 0.f;
  }
}

struct KeyRange {  // the keys begin .. end - 1
  int64_t begin, end;
};

// What query s of b sees as far as its position says.
static inline KeyRange key_range(const AttentionJob& job, int64_t b, int64_t s) {
  if (job.input_pos == nullptr) return {0, job.is_causal ? smaller(s + 1, job.T) : job.T};
  const int64_t at = b * job.pos_stride + s;
  const int64_t pos = job.pos_is_int64 ? static_cast<const int64_t*>(job.input_pos)[at]
                                       : static_cast<const int32_t*>(job.input_pos)[at];
  if (pos < 0) return {0, 0};
  const int64_t begin = job.window > 0 && pos >= job.window ? pos - job.window + 1 : 0;
  return {smaller(begin, job.T), pos < job.T ? pos + 1 : job.T};
}

template <class T>
static float mask_term(const AttentionJob& job, int64_t b, int64_t h, int64_t s, int64_t t) {
  if (job.mask == nullptr) return 0.f;
  const int64_t at = b * job.mask_strides[0] + h * job.mask_strides[1] + s * job.mask_strides[2] +
                     t * job.mask_strides[3];
  if (job.mask_is_bool) {
    return static_cast<const uint8_t*>(job.mask)[at] != 0 ? 0.f : kMinusInfinity;
  }
  return to_float(static_cast<const T*>(job.mask)[at]);
}

static inline float capped(float score, float softcap) {
  return softcap == 0.f ? score : softcap * std::tanh(score / softcap);
}

// Turns row r's scores into exp(score - top) and rescales what was summed under the old top.
template <class S>
static void softmax_step(AttentionState* state, int64_t r, int64_t D_pad) {
  using F = typename S::F;
  float* scores = state->scores[r];
  float top = state->top[r];
  for (int64_t t = 0; t < kTileKeys; ++t) top = scores[t] > top ? scores[t] : top;
  // A row with nothing to attend to so far keeps top at -inf; 0 stands in to avoid inf - inf.
  const float reference = top == kMinusInfinity ? 0.f : top;
  const float rescale = state->top[r] == kMinusInfinity ? 0.f : std::exp(state->top[r] - reference);
  F sum = S::zero();
  for (int64_t t = 0; t < kTileKeys; t += S::kLanes) {
    const F p = exp<S>(S::sub(S::load(scores + t), S::set1(reference)));
    S::store(scores + t, p);
    sum = S::add(sum, p);
  }
  state->sum_p[r] = state->sum_p[r] * rescale + S::sum(sum);
  state->top[r] = top;
  if (rescale == 1.f) return;
  float* sum_pv = state->sum_pv + r * D_pad;
  for (int64_t d = 0; d < D_pad; d += S::kLanes) {
    S::store(sum_pv + d, S::mul(S::load(sum_pv + d), S::set1(rescale)));
  }
}

template <class S, class T>
static void attention_rows(const AttentionJob& job, int64_t b, int64_t hkv, int64_t row_begin,
                           int64_t n_rows) {
  using F = typename S::F;
  const int64_t rep = job.Hq / job.Hkv, D = job.D;
  const int64_t D_pad = ceil_div(D, S::kLanes) * S::kLanes;
  AttentionState state;
  KeyRange seen[kAttentionRows],
      any = {job.T, 0};  // `any`: from the first key of a row to the last
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t h = hkv * rep + (row_begin + r) / job.S, s = (row_begin + r) % job.S;
    load_rows<S>(static_cast<const T*>(job.q) + b * job.q_strides[0] + h * job.q_strides[1] +
                     s * job.q_strides[2],
                 0, 1, D, D_pad, state.q + r * D_pad);
    for (int64_t d = 0; d < D_pad; ++d) state.sum_pv[r * D_pad + d] = 0.f;
    state.top[r] = kMinusInfinity;
    state.sum_p[r] = 0.f;
    seen[r] = key_range(job, b, s);
    if (seen[r].begin >= seen[r].end) continue;
    any = {smaller(any.begin, seen[r].begin), larger(any.end, seen[r].end)};
  }

  // Tiles begin at multiples of their size, so that a window adds in the order of a mask.
  for (int64_t t0 = any.begin / kTileKeys * kTileKeys; t0 < any.end; t0 += kTileKeys) {
    const int64_t n_keys = smaller(kTileKeys, any.end - t0);
    load_keys<S, T>(job.k, job.k_strides, job.k_scale, job, b, hkv, t0, n_keys, D_pad, state.tile);
    for (int64_t r = 0; r < n_rows; ++r) {
      const int64_t h = hkv * rep + (row_begin + r) / job.S, s = (row_begin + r) % job.S;
      const float* q = state.q + r * D_pad;
      for (int64_t t = 0; t < kTileKeys; ++t) {
        if (t0 + t < seen[r].begin || t0 + t >= seen[r].end) {
          state.scores[r][t] = kMinusInfinity;
          continue;
        }
        F dot = S::zero();
        for (int64_t d = 0; d < D_pad; d += S::kLanes) {
          dot = S::fma(S::load(q + d), S::load(state.tile + t * D_pad + d), dot);
        }
        const float score = capped(S::sum(dot) * job.scale, job.softcap);
        state.scores[r][t] = score + mask_term<T>(job, b, h, s, t0 + t);
      }
      softmax_step<S>(&state, r, D_pad);
    }
    load_keys<S, T>(job.v, job.v_strides, job.v_scale, job, b, hkv, t0, n_keys, D_pad, state.tile);
    for (int64_t r = 0; r < n_rows; ++r) {
      // Keys that a row does not see are left out, so that their values cannot spread NaN.
      const int64_t first = larger(seen[r].begin - t0, 0);
      const int64_t n_seen = smaller(n_keys, seen[r].end - t0);
      for (int64_t d = 0; d < D_pad; d += S::kLanes) {
        F sum = S::load(state.sum_pv + r * D_pad + d);
        for (int64_t t = first; t < n_seen; ++t) {
          sum = S::fma(S::set1(state.scores[r][t]), S::load(state.tile + t * D_pad + d), sum);
        }
        S::store(state.sum_pv + r * D_pad + d, sum);
      }
    }
  }

  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t h = hkv * rep + (row_begin + r) / job.S, s = (row_begin + r) % job.S;
    T* y =
        static_cast<T*>(job.y) + b * job.y_strides[0] + h * job.y_strides[1] + s * job.y_strides[2];
    const F factor = S::set1(state.sum_p[r] == 0.f ? 0.f : 1.f / state.sum_p[r]);
    for (int64_t d = 0; d < D; d += S::kLanes) {
      store_partial<S>(y + d, S::mul(S::load(state.sum_pv + r * D_pad + d), factor), D - d);
    }
  }
}

template <class S>
static void attention(const AttentionJob& job, int64_t item_begin, int64_t item_end) {
  const int64_t rows = job.Hq / job.Hkv * job.S;
  const int64_t row_blocks = ceil_div(rows, kAttentionRows);
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t row_begin = item % row_blocks * kAttentionRows;
    const int64_t hkv = item / row_blocks % job.Hkv, b = item / row_blocks / job.Hkv;
    with_type(job.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      attention_rows<S, T>(job, b, hkv, row_begin, smaller(kAttentionRows, rows - row_begin));
    });
  }
}

}  // namespace cpu
}  // namespace cuda_int4
