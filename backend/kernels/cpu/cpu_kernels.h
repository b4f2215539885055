// The CPU kernels of one instruction set, and the plain-data jobs they run.
//
// Each job is a validated op boiled down to pointers and sizes. A kernel runs a range of it, so
// that any thread pool can cut the work; a result never depends on where the cuts are.
#pragma once

#include <cstdint>

#include "../tensor_view.h"

namespace cuda_int4 {
namespace cpu {

// coalesced.v1: y[m, n] = sum_k x[m, k] * (q[n, k] - zero_point[n, g]) * scale[n, g] + bias[n]
struct LinearJob {
  const void* x;           // [M, K] of dtype
  const uint8_t* qdata;    // [N, K/2]
  const void* scale;       // [N, n_groups] of scale_dtype
  const void* zero_point;  // [N, n_groups] of zero_point_dtype; nullptr: 8.0
  const void* bias;        // [N] of dtype; nullptr: 0
  void* y;                 // [M, N] of dtype, rows y_stride elements apart
  DType dtype, scale_dtype, zero_point_dtype;
  int64_t M, N, K, group_size, y_stride;
  bool int8_activation;
  void* scratch;  // 64-byte aligned: the activations as the kernel wants them
};

// One way to do a LinearJob: first stage() over all rows m, then run() over all units of n.
struct LinearKernel {
  const char* name;
  int64_t n_unit;                                   // output columns in one unit of run()
  int64_t max_rows;                                 // rows that scratch holds; more go in turns
  uint64_t (*scratch_bytes)(const LinearJob& job);  // for M = min(M, max_rows)
  void (*stage)(const LinearJob& job, int64_t m_begin, int64_t m_end);
  void (*run)(const LinearJob& job, int64_t unit_begin, int64_t unit_end);
};

// A weight in marlin.v1, or in marlin24.v1 where it has meta: ../marlin.h.
struct MarlinJob {
  const uint8_t* qdata;
  const uint16_t* meta;    // nullptr: dense
  const void* scale;       // [n_groups, Np] of scale_dtype
  const void* zero_point;  // [n_groups, Np] of zero_point_dtype; nullptr: 8.0
  DType scale_dtype, zero_point_dtype;
  int64_t Np, K, group_size;
};

// 64 rows of such a weight as coalesced.v1 has them.
struct MarlinTile {
  uint8_t* codes;    // [64, K/2]
  void* scale;       // [64, n_groups]
  void* zero_point;  // [64, n_groups]; not written where the weight has none
};

constexpr int64_t kMaxHeadDim = 512;   // bounds the stack buffers of attention
constexpr int64_t kAttentionRows = 8;  // query rows that share one pass over keys and values

// Rows of queries that share keys: row r of (b, hkv) is head hkv * rep + r / S, position r % S.
struct AttentionJob {
  const void* q;
  const void* k;
  const void* v;
  const void* mask;  // nullptr, or bool (uint8) or dtype
  void* y;
  DType dtype;  // of q and y
  bool mask_is_bool, is_causal;
  int64_t B, Hq, Hkv, S, T, D;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of [B, H, S or T]; that of D is 1
  int64_t y_strides[3];                              // of [B, Hq, S]
  int64_t mask_strides[4];                           // of [B, Hq, S, T]; 0 where broadcast
  float scale;
  float softcap;          // 0: none
  const void* input_pos;  // nullptr, or int32 | int64: of query s of b at b * pos_stride + s
  bool pos_is_int64;
  int64_t pos_stride, window;
  const float* k_scale;  // nullptr, or [B, Hkv, T]: k and v are int8
  const float* v_scale;
};

struct RmsNormJob {
  const void* x;
  const void* weight;  // nullptr: 1
  void* y;
  DType dtype, weight_dtype;
  int64_t D;
  float eps;
};

struct SiluJob {
  const void* x;
  void* y;
  DType dtype;
};

struct CpuKernels {
  const char* isa;
  const LinearKernel* (*choose_linear)(const LinearJob& job);
  // Rows 64 * tile .. + 63, padding included.
  void (*unpack_marlin)(const MarlinJob& job, int64_t tile, const MarlinTile& to);
  // One item: up to kAttentionRows rows of one (b, hkv); items are numbered b, hkv, block of rows.
  void (*attention)(const AttentionJob& job, int64_t item_begin, int64_t item_end);
  void (*rms_norm)(const RmsNormJob& job, int64_t row_begin, int64_t row_end);
  void (*silu)(const SiluJob& job, int64_t begin, int64_t end);
};

extern const CpuKernels kScalarKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;

}  // namespace cpu
}  // namespace cuda_int4
