#include "parallel.h"

#include <executorch/runtime/kernel/thread_parallel_interface.h>

namespace cuda_int4 {

void parallel_for(int64_t n, int64_t grain, void (*fn)(void* context, int64_t begin, int64_t end),
                  void* context) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const auto run = [fn, context](int64_t begin, int64_t end) { fn(context, begin, end); };
  if (n <= grain || !executorch::extension::parallel_for(0, n, grain, run)) run(0, n);
}

}  // namespace cuda_int4
