// A C++ callable on the thread pool, through ExecutionContext's function pointer.
#pragma once

#include "tensor_view.h"

namespace cuda_int4 {

// f(begin, end) over ranges that cover [0, n), on the caller's thread where there is no pool or too
// little for two ranges of `grain`.
template <class Function>
void parallel_ranges(const ExecutionContext& context, int64_t n, int64_t grain, const Function& f) {
  if (n <= 0) return;
  if (context.parallel_for == nullptr || n < 2 * grain) {
    f(int64_t{0}, n);
    return;
  }
  context.parallel_for(
      n, grain,
      [](void* function, int64_t begin, int64_t end) {
        (*static_cast<const Function*>(function))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace cuda_int4
