// What the kernels for few queries share: 16 keys at a time, each warp its own tile of them.
//
// Transposed products, scores [keys, rows] = k @ q.T and y.T = v.T @ p.T, let 8 rows fill a tensor
// core instruction where the usual order wants 16, and halve the registers of the sums: 8 rows of
// D = 512 fit one warp. Lane (g, c) = (lane / 4, lane % 4) has the scores of keys g, g + 8 and rows
// 2c, 2c + 1 of each 8. `Shape` has kD, kRowTiles (of 8 rows), kParts (warps that share a tile),
// kColumns (of each), kHoldsQueries (in registers), and kPitch, kQueryPitch in elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace cuda_int4 {

constexpr int kTileKeys = 16;  // mma_m of the scores, mma_k of the sums

// The warp's columns of 16 keys and values, from k and v on; keys whose bit is 0 become zeros and
// are not read. A lane keeps its place d within rows and goes down them; columns from n_columns on
// are 0.
template <typename T, typename Shape>
__device__ __forceinline__ void load_tile(const T* k, const T* v, int64_t k_stride,
                                          int64_t v_stride, int n_columns, uint32_t bits,
                                          uint32_t tile) {
  constexpr int kLanesPerRow = Shape::kColumns / 8;  // 16 bytes each
  constexpr int kKeysPerStep = 32 / kLanesPerRow;
  const int first_key = threadIdx.x / kLanesPerRow, d = threadIdx.x % kLanesPerRow * 8;
  k += first_key * k_stride + d;
  v += first_key * v_stride + d;
  bits = d < n_columns ? bits >> first_key : 0;
  tile += (first_key * Shape::kPitch + d) * 2;
#pragma unroll
  for (int key = 0; key < kTileKeys; key += kKeysPerStep) {
    const bool copy = (bits >> key & 1) != 0;
    cp_async_16_or_zero(tile + key * Shape::kPitch * 2, k, copy);
    cp_async_16_or_zero(tile + (Shape::kTileElems + key * Shape::kPitch) * 2, v, copy);
    k += kKeysPerStep * k_stride;
    v += kKeysPerStep * v_stride;
  }
}

// The warp's columns of the queries, as fragments; empty where they stay in shared memory.
template <typename Shape>
struct Queries {
  uint32_t frag[Shape::kHoldsQueries ? Shape::kColumns / 16 : 1][2];
  uint32_t shared;  // address of the warp's first column

  __device__ explicit Queries(uint32_t shared) : shared(shared) {
    if constexpr (Shape::kHoldsQueries) {
      const int lane = threadIdx.x;
      const uint32_t at = shared + (lane % 8 * Shape::kQueryPitch + lane / 8 * 8) * 2;
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 16; i += 2) {
        uint32_t q[4];
        ldmatrix_x4(q, at + i * 32);
        frag[i][0] = q[0];
        frag[i][1] = q[1];
        frag[i + 1][0] = q[2];
        frag[i + 1][1] = q[3];
      }
    }
  }
};

// scores[keys g, g + 8][rows 8n + 2c, 8n + 2c + 1] of lane (g, c) = (lane / 4, lane % 4), summed
// over the warp's columns.
template <typename T, typename Shape>
__device__ __forceinline__ void mma_scores(uint32_t k_tile, const Queries<Shape>& queries,
                                           float (&scores)[Shape::kRowTiles][4]) {
  const int lane = threadIdx.x;
  const uint32_t k_at = k_tile + (lane % 16 * Shape::kPitch + lane / 16 * 8) * 2;
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
  }
  if constexpr (Shape::kHoldsQueries) {  // two sums, so that one product does not wait for the last
    float odd[4] = {};
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 16; i += 2) {
      uint32_t k0[4], k1[4];
      ldmatrix_x4(k0, k_at + i * 32);
      ldmatrix_x4(k1, k_at + i * 32 + 32);
      mma_m16n8k16(scores[0], k0, queries.frag[i], T{});
      mma_m16n8k16(odd, k1, queries.frag[i + 1], T{});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][i] += odd[i];
  } else {
    const uint32_t q_at =
        queries.shared + ((lane % 8 + lane / 16 * 8) * Shape::kQueryPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int d = 0; d < Shape::kColumns; d += 16) {
      uint32_t k[4];
      ldmatrix_x4(k, k_at + d * 2);
#pragma unroll
      for (int n = 0; n < Shape::kRowTiles; n += 2) {
        uint32_t q[4];
        ldmatrix_x4(q, q_at + (n * 8 * Shape::kQueryPitch + d) * 2);
        mma_m16n8k16(scores[n], k, {q[0], q[1]}, T{});
        mma_m16n8k16(scores[n + 1], k, {q[2], q[3]}, T{});
      }
    }
  }
}

// Adds up the scores of the group's warps, in their order, in all of them.
template <typename Shape>
__device__ __forceinline__ void add_parts(float4* turn, int part, int group,
                                          float (&scores)[Shape::kRowTiles][4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
    turn[(part * Shape::kRowTiles + n) * 32 + lane] = {scores[n][0], scores[n][1], scores[n][2],
                                                       scores[n][3]};
  }
  bar_sync(1 + group, 32 * Shape::kParts);
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
    float4 sum = turn[n * 32 + lane];
#pragma unroll
    for (int other = 1; other < Shape::kParts; ++other) {
      const float4 more = turn[(other * Shape::kRowTiles + n) * 32 + lane];
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    scores[n][0] = sum.x;
    scores[n][1] = sum.y;
    scores[n][2] = sum.z;
    scores[n][3] = sum.w;
  }
}

// sums[column 16m + g, g + 8][rows] += v.T @ p.T
template <typename T, typename Shape>
__device__ __forceinline__ void mma_sums(uint32_t v_tile, const uint32_t (&p)[Shape::kRowTiles][2],
                                         float (&sums)[Shape::kRowTiles][Shape::kColumns / 16][4]) {
  const int lane = threadIdx.x;
  const uint32_t v_at =
      v_tile + ((lane % 8 + lane / 16 * 8) * Shape::kPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int m = 0; m < Shape::kColumns / 16; ++m) {
    uint32_t v[4];
    ldmatrix_x4_trans(v, v_at + m * 32);
#pragma unroll
    for (int n = 0; n < Shape::kRowTiles; ++n) mma_m16n8k16(sums[n][m], v, p[n], T{});
  }
}

__device__ __forceinline__ float max_over_keys(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__device__ __forceinline__ float sum_over_keys(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Four sums over the sum of the probabilities, as elements of y.
template <typename T>
__device__ __forceinline__ void store_row(T* y, const float4& sums, float sum_p) {
  const float factor = sum_p == 0.f ? 0.f : 1.f / sum_p;
  *reinterpret_cast<uint2*>(y) = {pack_pair<T>(sums.x * factor, sums.y * factor),
                                  pack_pair<T>(sums.z * factor, sums.w * factor)};
}

}  // namespace cuda_int4
