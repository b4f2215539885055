// matmul_marlin_wgmma (matmul_marlin_wgmma.cuh) on marlin.v1: which tiles for which shape.
#include "matmul_marlin_wgmma.cuh"

namespace cuda_int4 {

namespace {

// Calls f with the configuration for this shape. What each is worth: kernels/README.md.
template <typename F>
auto with_config(const MatmulMarlinArgs& args, F f) {
  const bool is_wide = args.N >= 8192;
  if (args.M <= 32) {
    if (is_wide) return f(MarlinConfig<false, 4, 1, 2, 32, 8, 1>());
    return args.K > 8192 ? f(MarlinConfig<false, 4, 1, 1, 32, 8, 4>())
                         : f(MarlinConfig<false, 2, 1, 1, 32, 8, 4>());
  }
  if (args.M <= 64) {
    return is_wide || args.K > 8192 ? f(MarlinConfig<false, 2, 1, 2, 64, 8, 2>())
                                    : f(MarlinConfig<false, 2, 1, 1, 64, 8, 2>());
  }
  const bool is_small = args.N <= 4096 && args.K <= 8192 && args.M <= 256;
  if (is_small || (!is_wide && args.M <= 128)) {
    return f(MarlinConfig<false, 2, 1, 1, 128, 8, 2>());
  }
  // Zero points are turned into offsets once a tile: half as often in tiles of 256, where these waste no
  // more than a tenth.
  const int64_t tokens_128 = (args.M + 127) / 128 * 128, tokens_256 = (args.M + 255) / 256 * 256;
  if (args.zero_point != nullptr && 10 * tokens_256 <= 11 * tokens_128) {
    return f(MarlinConfig<false, 2, 1, 1, 256, 4, 2>());
  }
  return f(MarlinConfig<false, 2, 1, 2, 128, 8, 1>());
}

}  // namespace

bool can_matmul_marlin_wgmma(const MatmulMarlinArgs& args) {
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.M < INT32_MAX &&
         args.N < INT32_MAX - 512 && args.K < INT32_MAX &&
         (args.M / 32 + 1) * (args.N / 64 + 1) < INT32_MAX && encode_tiled() != nullptr;
}

uint64_t matmul_marlin_wgmma_scratch_bytes(const MatmulMarlinArgs& args, int n_multiprocessors) {
  return with_config(args, [&](auto config) {
    using C = decltype(config);
    return tile_scratch_bytes(marlin_plan<C>(args, n_multiprocessors), C::kTokens, C::kRows);
  });
}

cudaError_t launch_matmul_marlin_wgmma(const MatmulMarlinArgs& args, void* scratch,
                                       int n_multiprocessors, cudaStream_t stream) {
  return with_config(args, [&](auto config) {
    using C = decltype(config);
    return args.dtype == DType::kFloat16
               ? launch_marlin_scales<__half, C>(args, scratch, n_multiprocessors, stream)
               : launch_marlin_scales<__nv_bfloat16, C>(args, scratch, n_multiprocessors, stream);
  });
}

}  // namespace cuda_int4
