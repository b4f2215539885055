// The plain reference of every CPU kernel, for machines with nothing better and for tests.
//
// Linear is written from the formula with float64 sums and nothing staged; the other ops are the
// templates of the vector files with one lane.
#include <cmath>

#include "attention_kernel.h"
#include "cpu_kernels.h"
#include "rowwise.h"
#include "simd_scalar.h"
#include "unpack_marlin.h"

namespace cuda_int4 {
namespace cpu {

namespace {

float element(const void* base, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) return to_float(static_cast<const Half*>(base)[index]);
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat*>(base)[index]);
  return static_cast<const float*>(base)[index];
}

void set_element(void* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat16) return from_float(value, static_cast<Half*>(base) + index);
  if (dtype == DType::kBFloat16) return from_float(value, static_cast<BFloat*>(base) + index);
  from_float(value, static_cast<float*>(base) + index);
}

int code(const LinearJob& job, int64_t n, int64_t k) {
  const int pair = job.qdata[n * (job.K / 2) + k / 2];
  return k % 2 == 0 ? pair & 15 : pair >> 4;
}

struct Group {
  float scale, zero_point;
};

Group group_of(const LinearJob& job, int64_t n, int64_t k) {
  const int64_t at = n * (job.K / job.group_size) + k / job.group_size;
  return {element(job.scale, job.scale_dtype, at),
          job.zero_point == nullptr ? 8.f : element(job.zero_point, job.zero_point_dtype, at)};
}

// sum_k x[k] * (q[k] - zero_point) * scale
double dot_w4a16(const LinearJob& job, int64_t m, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < job.K; ++k) {
    const Group group = group_of(job, n, k);
    const float w = (static_cast<float>(code(job, n, k)) - group.zero_point) * group.scale;
    sum += static_cast<double>(element(job.x, job.dtype, m * job.K + k)) * w;
  }
  return sum;
}

// The same with x rounded to s_x * int8 per 32 values: s_x = max|x| / 127, ties to even.
double dot_w4a8(const LinearJob& job, int64_t m, int64_t n) {
  double sum = 0;
  for (int64_t k0 = 0; k0 < job.K; k0 += 32) {
    float largest = 0.f;
    for (int64_t k = k0; k < k0 + 32; ++k) {
      const float magnitude = std::fabs(element(job.x, job.dtype, m * job.K + k));
      if (!(magnitude <= largest)) largest = magnitude;  // also takes NaN, and keeps it
      if (largest != largest) break;
    }
    const float s_x = largest / 127.f;
    int64_t dot = 0, a_sum = 0;
    for (int64_t k = k0; k < k0 + 32; ++k) {
      const float ratio = element(job.x, job.dtype, m * job.K + k) / s_x;
      // Not finite: s_x is 0 (so is x), or s_x itself is infinite or NaN and makes y NaN.
      const float bounded = ratio > 127.f ? 127.f : ratio < -127.f ? -127.f : ratio;
      const int64_t a = bounded == bounded ? std::llrint(bounded) : 0;
      dot += a * code(job, n, k);
      a_sum += a;
    }
    const Group group = group_of(job, n, k0);
    const double zero_point = group.zero_point, scale = group.scale;
    sum += s_x * scale * (static_cast<double>(dot) - zero_point * static_cast<double>(a_sum));
  }
  return sum;
}

void stage_nothing(const LinearJob&, int64_t, int64_t) {}
uint64_t no_scratch(const LinearJob&) { return 0; }

void linear_scalar(const LinearJob& job, int64_t n_begin, int64_t n_end) {
  for (int64_t n = n_begin; n < n_end; ++n) {
    for (int64_t m = 0; m < job.M; ++m) {
      double y = job.int8_activation ? dot_w4a8(job, m, n) : dot_w4a16(job, m, n);
      if (job.bias != nullptr) y += element(job.bias, job.dtype, n);
      set_element(job.y, job.dtype, m * job.y_stride + n, static_cast<float>(y));
    }
  }
}

const LinearKernel kLinearScalar = {
    "linear_coalesced_scalar", 1, INT32_MAX, no_scratch, stage_nothing, linear_scalar};

const LinearKernel* choose_linear(const LinearJob&) { return &kLinearScalar; }

}  // namespace

const CpuKernels kScalarKernels = {
    "scalar",        choose_linear, unpack_marlin, attention<ScalarSimd>, rms_norm<ScalarSimd>,
    silu<ScalarSimd>};

}  // namespace cpu
}  // namespace cuda_int4
