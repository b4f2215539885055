#include "shared_activation.h"

#include <cinttypes>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using executorch::runtime::EValue;

Error SharedActivation::give(const EValue* value, const LinearArgs& args,
                             ExecutionContext* execution) {
  const TensorView& x = args.x;
  if (x.nbytes == 0) return Error::Ok;
  if (of_ == value && of_data_ == x.data && of_nbytes_ == x.nbytes) {
    execution->quantized_x = memory_;
    return Error::Ok;
  }
  const int64_t K = x.sizes[x.ndim - 1];
  int64_t M = 1;
  for (int d = 0; d + 1 < x.ndim; ++d) M *= x.sizes[d];
  const uint64_t needed = quantized_activation_bytes(M, K);
  forget();
  if (needed > nbytes_) {
    void* larger = device_.allocate(needed);  // nullptr while capturing, too
    if (larger == nullptr)
      return fail(Error::MemoryAllocationFailed,
                  "device %s: out of memory for %" PRIu64 " bytes of a quantised activation",
                  device_.name(), needed);
    device_.free(memory_);
    memory_ = larger;
    nbytes_ = needed;
    ++generation_;
  }
  const Error error = fail(quantize_activation(x, memory_, *execution));
  if (error != Error::Ok) return error;
  of_ = value;
  of_data_ = x.data;
  of_nbytes_ = x.nbytes;
  execution->quantized_x = memory_;
  return Error::Ok;
}

}  // namespace cuda_int4
