// reduce_sums -- sum, mean, product and any; the contract is in reduce.cuh.
#include "reduce.cuh"

namespace cuda_int4 {

namespace {

template <typename V>
struct SumOp {
  using Sum = V;
  __device__ static V empty(const ReduceArgs&) { return V(0); }
  __device__ static void add(const ReduceArgs&, V& sum, V value, int64_t) { sum += value; }
  __device__ static void combine(const ReduceArgs&, V& sum, V other) { sum += other; }
  __device__ static void finish(const ReduceArgs& p, V sum, int64_t o) {
    if (p.reduction == Reduction::kMean) sum = sum / static_cast<V>(p.n_reduced);
    store_as(p.out, p.out_dtype, o, sum);
  }
};

template <typename V>
struct ProductOp {
  using Sum = V;
  __device__ static V empty(const ReduceArgs&) { return V(1); }
  __device__ static void add(const ReduceArgs&, V& product, V value, int64_t) { product *= value; }
  __device__ static void combine(const ReduceArgs&, V& product, V other) { product *= other; }
  __device__ static void finish(const ReduceArgs& p, V product, int64_t o) {
    store_as(p.out, p.out_dtype, o, product);
  }
};

struct AnyOp {
  using Sum = int;
  template <typename V>
  __device__ static void add(const ReduceArgs&, int& any, V value, int64_t) {
    any |= value != V(0);
  }
  __device__ static int empty(const ReduceArgs&) { return 0; }
  __device__ static void combine(const ReduceArgs&, int& any, int other) { any |= other; }
  __device__ static void finish(const ReduceArgs& p, int any, int64_t o) {
    store_as(p.out, p.out_dtype, o, static_cast<int64_t>(any));
  }
};

bool is_float_dtype(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32 ||
         dtype == DType::kFloat64;
}

}  // namespace

cudaError_t launch_reduce_sums(const ReduceArgs& args, void* scratch, cudaStream_t stream) {
  switch (args.reduction) {
    case Reduction::kAny:  // as floats lose no sign of life, nor does int64
      return is_float_dtype(args.dtype) ? launch_reduce<AnyOp, ReadDouble>(args, scratch, stream)
                                        : launch_reduce<AnyOp, ReadInt64>(args, scratch, stream);
    case Reduction::kProduct:
      return is_float_dtype(args.out_dtype)
                 ? launch_reduce<ProductOp<double>, ReadDouble>(args, scratch, stream)
                 : launch_reduce<ProductOp<int64_t>, ReadInt64>(args, scratch, stream);
    default:
      return with_reader(args.dtype, args.out_dtype, [&](auto reader) {
        using Reader = decltype(reader);
        return launch_reduce<SumOp<typename Reader::V>, Reader>(args, scratch, stream);
      });
  }
}

}  // namespace cuda_int4
