// reduce_extremes -- maximum and minimum with their index; the contract is in reduce.cuh.
//
// A NaN wins over everything, the first of several too; of equal values the first wins: a total
// order, so the answer does not depend on how the work is cut.
#include "reduce.cuh"

namespace cuda_int4 {

namespace {

template <typename V>
struct ExtremeOp {
  struct Sum {
    V value;
    int64_t index;  // -1: nothing yet
  };
  __device__ static Sum empty(const ReduceArgs&) { return {V(0), -1}; }
  __device__ static bool beats(const ReduceArgs& p, V value, int64_t index, const Sum& best) {
    if (best.index < 0) return true;
    const bool value_is_nan = value != value, best_is_nan = best.value != best.value;
    if (value_is_nan || best_is_nan) return value_is_nan && (!best_is_nan || index < best.index);
    if (value == best.value) return index < best.index;
    return (value < best.value) == (p.reduction == Reduction::kMinimum);
  }
  __device__ static void add(const ReduceArgs& p, Sum& best, V value, int64_t index) {
    if (beats(p, value, index, best)) {
      best.value = value;
      best.index = index;
    }
  }
  __device__ static void combine(const ReduceArgs& p, Sum& best, const Sum& other) {
    if (other.index >= 0 && beats(p, other.value, other.index, best)) best = other;
  }
  __device__ static void finish(const ReduceArgs& p, const Sum& best, int64_t o) {
    if (p.out != nullptr) store_as(p.out, p.out_dtype, o, best.value);
    if (p.index != nullptr) static_cast<int64_t*>(p.index)[o] = best.index;
  }
};

}  // namespace

cudaError_t launch_reduce_extremes(const ReduceArgs& args, void* scratch, cudaStream_t stream) {
  return with_reader(args.dtype, args.dtype, [&](auto reader) {  // compared as they are
    using Reader = decltype(reader);
    return launch_reduce<ExtremeOp<typename Reader::V>, Reader>(args, scratch, stream);
  });
}

}  // namespace cuda_int4
