#include "threads.h"

#include "errors.h"

// executorch/extension/threadpool/threadpool.h, which the wheel does not install although its
// library exports what it declares. The wheel's version is pinned, so these cannot drift unseen: a
// change of a name or an argument fails at link time.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace cuda_int4 {

using executorch::runtime::Error;

Error set_num_threads(uint32_t n_threads) {
  constexpr uint32_t kMaxThreads = 1024;
  if (n_threads < 1 || n_threads > kMaxThreads) {
    return fail(Error::InvalidArgument, "threads: expected 1 to %u, got %u", kMaxThreads,
                n_threads);
  }
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) return fail(Error::Internal, "threads: ExecuTorch has no thread pool");
  if (pool->get_thread_count() == n_threads) return Error::Ok;
  if (!pool->_unsafe_reset_threadpool(n_threads)) {
    return fail(Error::OutOfResources, "threads: could not start %u threads", n_threads);
  }
  return Error::Ok;
}

}  // namespace cuda_int4
