// reduce_moments -- variance, and the mean beside it; the contract is in reduce.cuh.
#include <cmath>
#include <type_traits>

#include "reduce.cuh"

namespace cuda_int4 {

namespace {

template <typename V>
struct MomentsOp {
  struct Sum {
    V mean, squares;  // of the values so far; squares about their mean
    int64_t n;
  };
  __device__ static Sum empty(const ReduceArgs&) { return {V(0), V(0), 0}; }
  __device__ static void add(const ReduceArgs&, Sum& sum, V value, int64_t) {
    ++sum.n;
    const V delta = value - sum.mean;
    sum.mean += delta / static_cast<V>(sum.n);
    sum.squares += delta * (value - sum.mean);
  }
  __device__ static void combine(const ReduceArgs&, Sum& sum, const Sum& other) {
    if (other.n == 0) return;
    const int64_t n = sum.n + other.n;
    const V share = static_cast<V>(other.n) / static_cast<V>(n);
    const V delta = other.mean - sum.mean;
    sum.mean += delta * share;
    sum.squares += other.squares + delta * delta * static_cast<V>(sum.n) * share;
    sum.n = n;
  }
  __device__ static void finish(const ReduceArgs& p, const Sum& sum, int64_t o) {
    const double denominator = static_cast<double>(p.n_reduced) - p.correction;
    const bool defined = p.n_reduced > 0 && denominator > 0;
    const V nan = static_cast<V>(NAN);
    store_as(p.out, p.out_dtype, o, defined ? sum.squares / static_cast<V>(denominator) : nan);
    if (p.mean != nullptr) store_as(p.mean, p.out_dtype, o, p.n_reduced > 0 ? sum.mean : nan);
  }
};

}  // namespace

cudaError_t launch_reduce_moments(const ReduceArgs& args, void* scratch, cudaStream_t stream) {
  return with_reader(args.dtype, args.out_dtype, [&](auto reader) {
    using Reader = decltype(reader);
    if constexpr (std::is_same_v<Reader, ReadInt64>) {
      return cudaErrorInvalidValue;  // a variance is a float
    } else {
      return launch_reduce<MomentsOp<typename Reader::V>, Reader>(args, scratch, stream);
    }
  });
}

}  // namespace cuda_int4
