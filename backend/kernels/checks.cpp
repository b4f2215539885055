#include "checks.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace cuda_int4 {

Status error(StatusCode code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(status.message, sizeof(status.message), format, arguments);
  va_end(arguments);
  return status;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBool:
      return "bool";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "an unknown dtype";
}

int64_t dtype_bytes(DType dtype) {
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
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

bool is_float_kind(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32;
}

namespace {

void print_shape(int ndim, const int64_t* sizes, char* text, size_t capacity) {
  size_t used = static_cast<size_t>(snprintf(text, capacity, "["));
  for (int d = 0; d < ndim && used < capacity; ++d) {
    used += static_cast<size_t>(
        snprintf(text + used, capacity - used, d == 0 ? "%" PRId64 : ", %" PRId64, sizes[d]));
  }
  if (used < capacity) snprintf(text + used, capacity - used, "]");
}

}  // namespace

ShapeText::ShapeText(const TensorView& view) {
  if (!view.present()) {
    snprintf(text, sizeof(text), "none");
  } else if (view.ndim > kMaxDims) {
    snprintf(text, sizeof(text), "%d dimensions", view.ndim);
  } else {
    print_shape(view.ndim, view.sizes, text, sizeof(text));
  }
}

Status check_sizes(const TensorCheck& check, const TensorView& view, int64_t* numel) {
  if (!view.present()) {
    return error(StatusCode::kInvalidArgument, "%.200s: expected a tensor as %s, got none; %s",
                 check.who, check.part, check.cure);
  }
  if (view.ndim > kMaxDims) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected %s with at most %d dimensions, got %d; %s", check.who,
                 check.part, kMaxDims, view.ndim, check.cure);
  }
  if (dtype_bytes(view.dtype) == 0) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected %s of a known dtype, got ScalarType number %d; %s", check.who,
                 check.part, static_cast<int>(view.dtype), check.cure);
  }
  int64_t count = 1;
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t size = view.sizes[d];
    // count <= kMaxElems (2^48) and size < 2^31: the product could pass int64, so divide first.
    if (size < 0 || size > kMaxDim || (size > 0 && count > kMaxElems / size)) {
      return error(StatusCode::kInvalidArgument,
                   "%.200s: expected each size of %s in 0..%" PRId64 " and at most %" PRId64
                   " elements, got %s; %s",
                   check.who, check.part, kMaxDim, kMaxElems, ShapeText(view).text, check.cure);
    }
    count *= size;
  }
  *numel = count;
  return {};
}

Status check_strided(const TensorCheck& check, const TensorView& view, int64_t* numel) {
  CUDA_INT4_RETURN_IF_ERROR(check_sizes(check, view, numel));
  if (*numel == 0) return {};
  int64_t last = 0;  // index of the last element
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t steps = view.sizes[d] - 1, stride = view.strides[d];
    if (steps == 0) continue;
    if (stride < 0 || stride > (kMaxElems - last) / steps) {
      return error(StatusCode::kInvalidArgument,
                   "%.200s: expected strides of %s that are not negative and stay within %" PRId64
                   " elements, got stride %" PRId64 " in dimension %d; %s",
                   check.who, check.part, kMaxElems, stride, d, check.cure);
    }
    last += steps * stride;
  }
  const uint64_t needed_bytes = static_cast<uint64_t>((last + 1) * dtype_bytes(view.dtype));
  if (view.nbytes < needed_bytes) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected %s %s %s with its strides to have at least %" PRIu64
                 " bytes, got %" PRIu64 "; %s",
                 check.who, check.part, dtype_name(view.dtype), ShapeText(view).text, needed_bytes,
                 view.nbytes, check.cure);
  }
  return {};
}

Status check_contiguous(const TensorCheck& check, const TensorView& view, int64_t* numel) {
  CUDA_INT4_RETURN_IF_ERROR(check_sizes(check, view, numel));
  int64_t expected_stride = 1;
  for (int d = view.ndim - 1; d >= 0 && *numel > 0; --d) {  // without elements it could overflow
    if (view.sizes[d] != 1 && view.strides[d] != expected_stride) {
      return error(StatusCode::kInvalidArgument,
                   "%.200s: expected %s %s contiguous (stride %" PRId64
                   " in dimension %d), got stride %" PRId64 "; %s",
                   check.who, check.part, ShapeText(view).text, expected_stride, d, view.strides[d],
                   check.cure);
    }
    expected_stride *= view.sizes[d];
  }
  const uint64_t needed_bytes = static_cast<uint64_t>(*numel * dtype_bytes(view.dtype));
  if (view.nbytes != needed_bytes) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected %s %s %s to have %" PRIu64 " bytes, got %" PRIu64 "; %s",
                 check.who, check.part, dtype_name(view.dtype), ShapeText(view).text, needed_bytes,
                 view.nbytes, check.cure);
  }
  return {};
}

Status check_float_kind(const TensorCheck& check, const TensorView& view) {
  if (is_float_kind(view.dtype)) return {};
  return error(StatusCode::kInvalidArgument,
               "%.200s: expected %s of dtype float16, bfloat16 or float32, got %s; %s", check.who,
               check.part, dtype_name(view.dtype), check.cure);
}

Status check_shape(const TensorCheck& check, const TensorView& view, int ndim,
                   const int64_t* sizes) {
  bool same = view.ndim == ndim;
  for (int d = 0; same && d < ndim; ++d) same = view.sizes[d] == sizes[d];
  if (same) return {};
  char expected[192];
  print_shape(ndim, sizes, expected, sizeof(expected));
  return error(StatusCode::kInvalidArgument, "%.200s: expected %s of shape %s, got %s; %s",
               check.who, check.part, expected, ShapeText(view).text, check.cure);
}

Status check_same_shape(const TensorCheck& check, const TensorView& view,
                        const TensorView& expected) {
  return check_shape(check, view, expected.ndim, expected.sizes);
}

Status check_alignment(const TensorCheck& check, const TensorView& view, int64_t alignment) {
  const uintptr_t rest = reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(alignment);
  if (rest == 0) return {};
  return error(StatusCode::kInvalidArgument,
               "%.200s: expected %s at an address that is a multiple of %" PRId64
               " bytes, got one %d past it; %s",
               check.who, check.part, alignment, static_cast<int>(rest), check.cure);
}

Status check_data(const TensorCheck& check, const TensorView& view) {
  if (view.data != nullptr || view.nbytes == 0) return {};
  return error(StatusCode::kInvalidArgument,
               "%.200s: expected %s to have data, got a null pointer; %s", check.who, check.part,
               check.cure);
}

Status check_scratch(const char* who, const ExecutionContext& context, uint64_t needed_bytes) {
  if (needed_bytes == 0) return {};
  if (context.scratch == nullptr || context.scratch_bytes < needed_bytes ||
      reinterpret_cast<uintptr_t>(context.scratch) % 64 != 0) {
    return error(StatusCode::kInvalidArgument,
                 "%.200s: expected %" PRIu64 " bytes of scratch at a multiple of 64, got %" PRIu64
                 " at %p; allocate what the op's *_scratch_bytes function says",
                 who, needed_bytes, context.scratch_bytes, context.scratch);
  }
  return {};
}

Status check_cpu_device(const char* who, const ExecutionContext& context) {
  if (context.device == DeviceKind::kCpu) return {};
  return error(
      StatusCode::kUnsupported,
      "%s: expected device cpu, the only one this op has a kernel for, got device %d; move "
      "the tensors to the CPU",
      who, static_cast<int>(context.device));
}

}  // namespace cuda_int4
