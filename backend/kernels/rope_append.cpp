// cuda_int4::rope_append: validation, and the kernel of the device.
#include <cinttypes>
#include <cmath>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/numeric.h"
#include "cuda/cuda_kernels.h"
#include "ops.h"
#include "parallel_ranges.h"

namespace cuda_int4 {

namespace {

constexpr char kOp[] = "cuda_int4::rope_append";

Status check_norm(const char* part, const TensorView& weight, int64_t D) {
  if (!weight.present()) return {};
  const TensorCheck check{kOp, part, "pass a contiguous weight of shape [D], the size of a head"};
  int64_t numel = 0;
  CUDA_INT4_RETURN_IF_ERROR(check_contiguous(check, weight, &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(check, weight));
  CUDA_INT4_RETURN_IF_ERROR(check_shape(check, weight, 1, &D));
  CUDA_INT4_RETURN_IF_ERROR(check_data(check, weight));
  return check_alignment(check, weight, dtype_bytes(weight.dtype));
}

Status check_dtype(const TensorCheck& check, const TensorView& view, DType expected) {
  if (view.dtype == expected) return {};
  return error(StatusCode::kInvalidArgument, "%s: expected %s of dtype %s, got %s; %s", check.who,
               check.part, dtype_name(expected), dtype_name(view.dtype), check.cure);
}

// The caches are int8 where there are scales, and only there.
Status check_scales(const RopeAppendArgs& args) {
  const bool is_int8 = args.k_cache.dtype == DType::kInt8;
  const TensorView* const views[] = {&args.k_scale, &args.v_scale};
  const char* const names[] = {"k_scale", "v_scale"};
  for (int i = 0; i < 2; ++i) {
    const TensorCheck check{kOp, names[i], "make float32 scales like the caches, but without D"};
    if (views[i]->present() != is_int8) {
      return error(StatusCode::kInvalidArgument,
                   "%s: expected %s with caches of int8 and with no others, got caches of %s %s "
                   "it; %s",
                   kOp, names[i], dtype_name(args.k_cache.dtype),
                   views[i]->present() ? "with" : "without", check.cure);
    }
    if (!is_int8) continue;
    int64_t numel = 0;
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(check, *views[i], &numel));
    CUDA_INT4_RETURN_IF_ERROR(check_dtype(check, *views[i], DType::kFloat32));
    CUDA_INT4_RETURN_IF_ERROR(check_shape(check, *views[i], 3, args.k_cache.sizes));
    CUDA_INT4_RETURN_IF_ERROR(check_data(check, *views[i]));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(check, *views[i], 4));
  }
  const int64_t D = args.k_cache.sizes[3];
  if (is_int8 && D > cpu::kMaxHeadDim) {
    return error(StatusCode::kUnsupported,
                 "%s: expected heads of at most %" PRId64 " with caches of int8, got %" PRId64
                 "; keep the caches in the dtype of qkv",
                 kOp, cpu::kMaxHeadDim, D);
  }
  return {};
}

}  // namespace

Status validate_rope_append(const RopeAppendArgs& args) {
  const bool is_int8 = args.k_cache.dtype == DType::kInt8;
  const TensorCheck qkv{kOp, "qkv", "pass qkv.contiguous(), [B, S, (n_heads + 2 * Hkv) * D]"};
  const TensorCheck k_cache{kOp, "k_cache", "make a cache [B or more, Hkv, T, D] with an even D"};
  const TensorCheck v_cache{kOp, "v_cache", "make both caches alike"};
  const TensorCheck cos{
      kOp, "cos",
      "pass tables [S, D], [S, D/2] or the like for each of B, of qkv's dtype or float32"};
  const TensorCheck sin{kOp, "sin", "make both tables alike"};
  const TensorCheck input_pos{kOp, "input_pos", "pass one int32 or int64 position per token"};
  const TensorCheck q{kOp, "q", "allocate a contiguous q [B, n_heads, S, D]"};
  const TensorCheck checks[] = {qkv, k_cache, v_cache, cos, sin, input_pos, q};
  const TensorView* const views[] = {&args.qkv, &args.k_cache,   &args.v_cache, &args.cos,
                                     &args.sin, &args.input_pos, &args.q};
  int64_t numel = 0;
  for (int i = 0; i < 7; ++i)
    CUDA_INT4_RETURN_IF_ERROR(check_contiguous(checks[i], *views[i], &numel));
  CUDA_INT4_RETURN_IF_ERROR(check_float_kind(qkv, args.qkv));
  if (!is_int8) CUDA_INT4_RETURN_IF_ERROR(check_dtype(k_cache, args.k_cache, args.qkv.dtype));
  CUDA_INT4_RETURN_IF_ERROR(check_dtype(v_cache, args.v_cache, args.k_cache.dtype));
  CUDA_INT4_RETURN_IF_ERROR(check_dtype(q, args.q, args.qkv.dtype));
  if (args.cos.dtype != DType::kFloat32)
    CUDA_INT4_RETURN_IF_ERROR(check_dtype(cos, args.cos, args.qkv.dtype));
  CUDA_INT4_RETURN_IF_ERROR(check_dtype(sin, args.sin, args.cos.dtype));
  if (args.input_pos.dtype != DType::kInt32)
    CUDA_INT4_RETURN_IF_ERROR(check_dtype(input_pos, args.input_pos, DType::kInt64));
  if (args.k_cache.ndim != 4 || args.k_cache.sizes[3] < 2 || args.k_cache.sizes[3] % 2 != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected k_cache [B or more, Hkv, T, D] with an even D, got %s; %s", kOp,
                 ShapeText(args.k_cache).text, k_cache.cure);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_same_shape(v_cache, args.v_cache, args.k_cache));
  const int64_t Hkv = args.k_cache.sizes[1], D = args.k_cache.sizes[3];
  if (args.n_heads < 1 || args.n_heads > kMaxDim) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected n_heads in 1..%" PRId64 ", got %" PRId64 "; fix the call", kOp,
                 kMaxDim, args.n_heads);
  }
  const int64_t n_qk = args.n_heads + Hkv, n_all = n_qk + Hkv;
  if (args.qkv.ndim != 3 || args.qkv.sizes[0] > args.k_cache.sizes[0] ||
      args.qkv.sizes[2] % D != 0 ||
      (args.qkv.sizes[2] / D != n_all && args.qkv.sizes[2] / D != n_qk)) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected qkv [%" PRId64 " or less, S, %" PRId64 " heads of %" PRId64
                 "] (or %" PRId64 ", where values are keys), got %s; %s",
                 kOp, args.k_cache.sizes[0], n_all, D, n_qk, ShapeText(args.qkv).text, qkv.cure);
  }
  const int64_t B = args.qkv.sizes[0], S = args.qkv.sizes[1];
  const int n_batch = args.input_pos.ndim == 2 ? 1 : 0;  // dimensions in front of S
  const int n_table = args.cos.ndim == 3 ? 1 : 0;
  const int64_t width = args.cos.sizes[1 + n_table] == D / 2 && args.cos.ndim >= 2 ? D / 2 : D;
  const int64_t table_sizes[] = {B, S, width};
  const int64_t* own_table_sizes = table_sizes + 1 - n_table;
  CUDA_INT4_RETURN_IF_ERROR(check_shape(cos, args.cos, 2 + n_table, own_table_sizes));
  CUDA_INT4_RETURN_IF_ERROR(check_shape(sin, args.sin, 2 + n_table, own_table_sizes));
  CUDA_INT4_RETURN_IF_ERROR(
      check_shape(input_pos, args.input_pos, 1 + n_batch, table_sizes + 1 - n_batch));
  const int64_t q_sizes[] = {B, args.n_heads, S, D};
  CUDA_INT4_RETURN_IF_ERROR(check_shape(q, args.q, 4, q_sizes));
  for (int i = 0; i < 7; ++i) {
    CUDA_INT4_RETURN_IF_ERROR(check_data(checks[i], *views[i]));
    CUDA_INT4_RETURN_IF_ERROR(check_alignment(checks[i], *views[i], dtype_bytes(views[i]->dtype)));
  }
  CUDA_INT4_RETURN_IF_ERROR(check_scales(args));
  CUDA_INT4_RETURN_IF_ERROR(check_norm("q_norm", args.q_norm, D));
  CUDA_INT4_RETURN_IF_ERROR(check_norm("k_norm", args.k_norm, D));
  if (!(args.eps >= 0)) {
    return error(StatusCode::kInvalidArgument,
                 "%s: expected eps of at least 0, got %f; fix the call", kOp, args.eps);
  }
  return {};
}

namespace cpu {

namespace {

// The place in the cache of token s of b; false: it is outside.
bool place_of(const RopeAppendArgs& args, int64_t b, int64_t s, int64_t* given, int64_t* place) {
  const bool is_int64 = args.input_pos.dtype == DType::kInt64;
  const int64_t at = (args.input_pos.ndim == 2 ? b * args.qkv.sizes[1] : 0) + s;
  *given = is_int64 ? static_cast<const int64_t*>(args.input_pos.data)[at]
                    : static_cast<const int32_t*>(args.input_pos.data)[at];
  const int64_t T = args.k_cache.sizes[2];
  if (*given < -T || *given >= T) return false;
  *place = *given < 0 ? *given + T : *given;
  return true;
}

template <class C>
float rounded_to(float value) {
  C rounded;
  from_float(value, &rounded);
  return to_float(rounded);
}

// Codes of -127 .. 127 and their scale, the greatest |x| over 127. Of a row with an infinity or NaN the
// scale is neither finite: so is what is read back.
template <class X>
void quantize_row(const X* row, int64_t D, int8_t* codes, float* scale) {
  uint32_t greatest = 0;  // as bits: NaN is above infinity
  for (int64_t d = 0; d < D; ++d) {
    const uint32_t bits = float_bits(to_float(row[d])) & 0x7fffffffu;
    greatest = bits > greatest ? bits : greatest;
  }
  *scale = bits_float(greatest) / 127.f;
  for (int64_t d = 0; d < D; ++d) {
    const float code = std::nearbyint(to_float(row[d]) / *scale);
    codes[d] = code >= -127.f && code <= 127.f ? static_cast<int8_t>(code) : int8_t{0};  // or NaN
  }
}

// Heads of X, tables of C. This file is compiled without contraction: the two products are rounded
// before their sum, as by ops of their own.
template <class X, class C>
void turn_heads(const CpuKernels& kernels, const RopeAppendArgs& args, int64_t begin, int64_t end) {
  const int64_t S = args.qkv.sizes[1], Hkv = args.k_cache.sizes[1];
  const int64_t T = args.k_cache.sizes[2], D = args.k_cache.sizes[3], half = D / 2;
  const int64_t n_all = args.n_heads + 2 * Hkv, n_given = args.qkv.sizes[2] / D;
  const int64_t width = args.cos.sizes[args.cos.ndim - 1];
  const bool is_int8 = args.k_cache.dtype == DType::kInt8;
  X row[kMaxHeadDim];  // what becomes int8
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % n_all, token = item / n_all, s = token % S, b = token / S;
    const int64_t given_head = head < n_given ? head : head - Hkv;  // values that are keys
    const X* from = static_cast<const X*>(args.qkv.data) + (token * n_given + given_head) * D;
    X* to = static_cast<X*>(args.q.data) + ((b * args.n_heads + head) * S + s) * D;
    const bool is_key = head >= args.n_heads && head < args.n_heads + Hkv;
    int64_t at = 0;  // the row of the cache
    if (head >= args.n_heads) {
      int64_t given = 0, place = 0;
      place_of(args, b, s, &given, &place);  // rope_append_on has looked at all of them
      const int64_t kv_head = head - args.n_heads - (is_key ? 0 : Hkv);
      void* cache = is_key ? args.k_cache.data : args.v_cache.data;
      at = (b * Hkv + kv_head) * T + place;
      to = is_int8 ? row : static_cast<X*>(cache) + at * D;
      if (!is_key) {
        if (is_int8) {
          quantize_row(from, D, static_cast<int8_t*>(cache) + at * D,
                       static_cast<float*>(args.v_scale.data) + at);
        } else {
          for (int64_t d = 0; d < D; ++d) to[d] = from[d];
        }
        continue;
      }
    }
    const TensorView& norm = head < args.n_heads ? args.q_norm : args.k_norm;
    if (norm.present()) {
      RmsNormJob job = {};
      job.x = from;
      job.weight = norm.data;
      job.y = to;
      job.dtype = args.qkv.dtype;
      job.weight_dtype = norm.dtype;
      job.D = D;
      job.eps = static_cast<float>(args.eps);
      kernels.rms_norm(job, 0, 1);
      from = to;  // a pair is read before it is written
    }
    const int64_t table_row = (args.cos.ndim == 3 ? b * S : 0) + s;
    const C* cos = static_cast<const C*>(args.cos.data) + table_row * width;
    const C* sin = static_cast<const C*>(args.sin.data) + table_row * width;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = args.interleaved ? 2 * i : i;
      const int64_t second = args.interleaved ? 2 * i + 1 : i + half;
      const int64_t at_first = width == D ? first : i, at_second = width == D ? second : i;
      const float a = to_float(from[first]), b_value = to_float(from[second]);
      const float a_cos = rounded_to<C>(a * to_float(cos[at_first]));
      const float b_sin = rounded_to<C>(b_value * to_float(sin[at_first]));
      const float b_cos = rounded_to<C>(b_value * to_float(cos[at_second]));
      const float a_sin = rounded_to<C>(a * to_float(sin[at_second]));
      from_float(rounded_to<C>(a_cos - b_sin), &to[first]);
      from_float(rounded_to<C>(b_cos + a_sin), &to[second]);
    }
    if (is_key && is_int8) {
      quantize_row(row, D, static_cast<int8_t*>(args.k_cache.data) + at * D,
                   static_cast<float*>(args.k_scale.data) + at);
    }
  }
}

template <class X>
void turn(const CpuKernels& kernels, const RopeAppendArgs& args, int64_t begin, int64_t end) {
  if (args.cos.dtype == DType::kFloat32) {
    turn_heads<X, float>(kernels, args, begin, end);
  } else {
    turn_heads<X, X>(kernels, args, begin, end);
  }
}

}  // namespace

Status rope_append_on(const CpuKernels& kernels, const RopeAppendArgs& args,
                      const ExecutionContext& context) {
  const int64_t S = args.qkv.sizes[1], T = args.k_cache.sizes[2], D = args.k_cache.sizes[3];
  const int64_t n_positions = args.input_pos.ndim == 2 ? args.qkv.sizes[0] * S : S;
  for (int64_t i = 0; i < n_positions; ++i) {  // before anything is written
    int64_t given = 0, place = 0;
    if (!place_of(args, i / S, i % S, &given, &place)) {
      return error(StatusCode::kInvalidArgument,
                   "%s: expected input_pos in 0..%" PRId64 ", got %" PRId64 " for token %" PRId64
                   "; make the cache longer, or the context shorter",
                   kOp, T - 1, given, i % S);
    }
  }
  const int64_t n_items = args.qkv.sizes[0] * S * (args.n_heads + 2 * args.k_cache.sizes[1]);
  parallel_ranges(context, n_items, ceil_div(int64_t{1} << 14, D), [&](int64_t begin, int64_t end) {
    if (args.qkv.dtype == DType::kFloat16) {
      turn<Half>(kernels, args, begin, end);
    } else if (args.qkv.dtype == DType::kBFloat16) {
      turn<BFloat>(kernels, args, begin, end);
    } else {
      turn<float>(kernels, args, begin, end);
    }
  });
  return {};
}

}  // namespace cpu

Status rope_append(const RopeAppendArgs& args, const ExecutionContext& context) {
  CUDA_INT4_RETURN_IF_ERROR(validate_rope_append(args));
  if (context.device == DeviceKind::kCuda) {
    // The int8 form of the kernel has no check against the CPU's.
    if (args.k_cache.dtype == DType::kInt8) {
      return error(
          StatusCode::kUnsupported,
          "%s: expected caches of float16, bfloat16 or float32 on CUDA, got int8; export with "
          "kv_cache=\"none\", or run with device=\"cpu\"",
          kOp);
    }
    const CudaKernels* kernels = cuda_kernels();
    return kernels == nullptr ? built_without_cuda(kOp) : kernels->math->rope_append(args, context);
  }
  CUDA_INT4_RETURN_IF_ERROR(check_cpu_device(kOp, context));
  return cpu::rope_append_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
