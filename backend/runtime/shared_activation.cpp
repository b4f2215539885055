#include "shared_activation.h"

#include <cinttypes>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;

/// Memory for the int8 form of x.
Error SharedActivation::reserve(const TensorView& x) {
  const int64_t K = x.sizes[x.ndim - 1];
  int64_t M = 1;
  for (int d = 0; d + 1 < x.ndim; ++d) M *= x.sizes[d];
  const uint64_t needed = quantized_activation_bytes(M, K);
  forget();
  if (needed <= nbytes_) return Error::Ok;
  void* larger = device_.allocate(needed);  // nullptr while capturing, too
  if (larger == nullptr)
    return fail(Error::MemoryAllocationFailed,
                "device %s: out of memory for %" PRIu64 " bytes of a quantised activation",
                device_.name(), needed);
  device_.free(memory_);
  memory_ = larger;
  nbytes_ = needed;
  ++generation_;
  return Error::Ok;
}

void SharedActivation::now_of(const EValue* value, const TensorView& x) {
  of_ = value;
  of_data_ = x.data;
  of_nbytes_ = x.nbytes;
}

Error SharedActivation::give(const EValue* value, const LinearArgs& args,
                             ExecutionContext* execution) {
  const TensorView& x = args.x;
  if (x.nbytes == 0) return Error::Ok;
  read_.insert(value);
  if (of_ != value || of_data_ != x.data || of_nbytes_ != x.nbytes) {
    Error error = reserve(x);
    if (error == Error::Ok) error = fail(quantize_activation(x, memory_, *execution));
    if (error != Error::Ok) return error;
    now_of(value, x);
  }
  execution->quantized_x = memory_;
  return Error::Ok;
}

Error SharedActivation::take(const EValue* value, const TensorView& y,
                             ExecutionContext* execution) {
  if (y.nbytes == 0 || read_.count(value) == 0) return Error::Ok;
  const Error error = reserve(y);
  if (error != Error::Ok) return error;
  now_of(value, y);
  execution->quantized_y = memory_;
  return Error::Ok;
}

}  // namespace cuda_int4
