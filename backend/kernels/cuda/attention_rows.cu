// attention_rows -- y = softmax(cap(q @ k.T * scale) + mask) @ v, one block to a query row
//
//   operand  dtype            shape             order in memory                  align
//   q        f16, bf16, f32   [B, Hq, S, D]     last dimension contiguous        dtype
//   k, v     dtype of q       [B, Hkv, T, D]    last dimension contiguous        dtype
//   mask     bool | of q      [B, Hq, S, T]     any strides, 0 where broadcast   dtype
//   input_pos  i32 | i64      [S] | [B, S]      contiguous                       dtype
//   y (out)  dtype of q       [B, Hq, S, D]     last dimension contiguous        dtype
//
// Requires  Hq % Hkv == 0 (checked by validate_attention), D <= 512
// Grid      blocks of (32, kWarps) threads; a block takes a row (b, hq, s), rows in strides of the
//           grid; a warp takes 32 keys of each 32 * kWarps, and the block adds up its warps
// Bytes     a row reads its keys and values itself: B * Hq * S * T * D * 2 elements, mostly from L2
// Numerics  fp32 throughout, online softmax over 4 keys at a time, one rounding at the store. Keys
//           that a row does not see (mask false or -inf, position) are not read: what lies there, NaN
//           too, is without effect. A row that sees nothing is 0
// Source    direct from the formula; takes what the faster kernels do not, and measures them
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_parts.cuh"
#include "numeric.cuh"

namespace cuda_int4 {

namespace {

constexpr int kWarps = 8;
constexpr int kKeys = 4;  // scored together, for loads that do not wait for each other
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

// Whether the row sees key t, and what the mask adds to its score.
template <typename T>
__device__ bool sees_key(const AttentionKernelArgs& p, const void* mask_row, int64_t t,
                         const KeyRange& range, float* added) {
  if (t < range.begin || t >= range.end) return false;
  if (mask_row == nullptr) return true;
  if (p.mask_is_bool) return static_cast<const uint8_t*>(mask_row)[t * p.mask_strides[3]] != 0;
  *added = as_float(static_cast<const T*>(mask_row)[t * p.mask_strides[3]]);
  return *added != -INFINITY;
}

template <typename T, int kPerLane>  // lane holds elements lane, lane + 32, ...
__device__ void load_lane(const T* row, int64_t D, float (&out)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t d = threadIdx.x + 32 * i;
    out[i] = d < D ? as_float(row[d]) : 0.f;
  }
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps) attention_rows_kernel(AttentionKernelArgs p) {
  __shared__ float warp_sums[kWarps][32 * kPerLane];
  __shared__ float2 warp_stats[kWarps];  // top, sum of the probabilities
  const int64_t n_rows = p.B * p.Hq * p.S;
  for (int64_t row = blockIdx.x; row < n_rows; row += gridDim.x) {
    const int64_t s = row % p.S, h = row / p.S % p.Hq, b = row / p.S / p.Hq;
    const int64_t h_kv = h / (p.Hq / p.Hkv);
    const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + h_kv * p.k_strides[1];
    const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + h_kv * p.v_strides[1];
    const void* mask_row = find_mask_row<T>(p, b, h, s);
    const KeyRange range = key_range(p, b, s);

    float q[kPerLane], sum_pv[kPerLane] = {}, sum_p = 0.f, top = -INFINITY;
    load_lane<T, kPerLane>(
        static_cast<const T*>(p.q) + b * p.q_strides[0] + h * p.q_strides[1] + s * p.q_strides[2],
        p.D, q);
    for (int64_t t0 = range.begin / 32 * 32 + 32 * threadIdx.y; t0 < range.end; t0 += 32 * kWarps) {
      float added = 0.f;
      unsigned seen =
          __ballot_sync(0xffffffffu, sees_key<T>(p, mask_row, t0 + threadIdx.x, range, &added));
      while (seen != 0) {  // the next kKeys of them
        int n_keys = 0, at[kKeys];
        float score[kKeys];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          if (seen != 0) ++n_keys;
          at[i] = seen != 0 ? __ffs(static_cast<int>(seen)) - 1 : at[0];
          seen &= seen - 1;
          float k_row[kPerLane];
          load_lane<T, kPerLane>(k + (t0 + at[i]) * p.k_strides[2], p.D, k_row);
          score[i] = 0.f;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) score[i] += q[j] * k_row[j];
        }
        float new_top = top;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          score[i] = warp_sum(score[i]) * p.scale;
          if (p.softcap != 0.f) score[i] = p.softcap * tanhf(score[i] / p.softcap);
          score[i] += __shfl_sync(0xffffffffu, added, at[i]);
          if (i < n_keys) new_top = fmaxf(new_top, score[i]);
        }
        const float reference = new_top == -INFINITY ? 0.f : new_top;  // not inf - inf
        const float rescale = expf(top - reference);
        top = new_top;
        sum_p *= rescale;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sum_pv[j] *= rescale;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          if (i >= n_keys) break;
          const float probability = expf(score[i] - reference);
          sum_p += probability;
          float v_row[kPerLane];
          load_lane<T, kPerLane>(v + (t0 + at[i]) * p.v_strides[2], p.D, v_row);
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) sum_pv[j] += probability * v_row[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) warp_sums[threadIdx.y][threadIdx.x + 32 * j] = sum_pv[j];
    if (threadIdx.x == 0) warp_stats[threadIdx.y] = {top, sum_p};
    __syncthreads();
    top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_stats[w].x);
    for (int64_t d = threadIdx.y * 32 + threadIdx.x; d < p.D; d += 32 * kWarps) {
      float total = 0.f, total_p = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        const float weight = expf(warp_stats[w].x - (top == -INFINITY ? 0.f : top));
        total += weight * warp_sums[w][d];
        total_p += weight * warp_stats[w].y;
      }
      find_y_row<T>(p, row)[d] = from_float<T>(total_p == 0.f ? 0.f : total / total_p);
    }
    __syncthreads();  // the next row writes there
  }
}

template <typename T, int kPerLane>
cudaError_t launch(const AttentionKernelArgs& args, cudaStream_t stream) {
  const int64_t n_rows = args.B * args.Hq * args.S;
  const unsigned grid = static_cast<unsigned>(n_rows < kMaxBlocks ? n_rows : kMaxBlocks);
  attention_rows_kernel<T, kPerLane><<<grid, dim3(32, kWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t choose_per_lane(const AttentionKernelArgs& args, cudaStream_t stream) {
  if (args.D <= 64) return launch<T, 2>(args, stream);
  if (args.D <= 128) return launch<T, 4>(args, stream);
  if (args.D <= 256) return launch<T, 8>(args, stream);
  if (args.D <= kMaxCudaHeadDim) return launch<T, 16>(args, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_attention_rows(const AttentionKernelArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return choose_per_lane<__half>(args, stream);
    case DType::kBFloat16:
      return choose_per_lane<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose_per_lane<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda_int4
