// Which kernel multiplies: a rule on the arguments and on whether the machine has cuBLASLt.
#include "matmul_kernels.cuh"

namespace cuda_int4 {

namespace {

enum class Kernel { kNothing, kMatvec16, kMatvec32, kCublasLt, kMma, kPlain };

Kernel choose(const MatmulArgs& args, uint64_t* scratch_bytes) {
  *scratch_bytes = 0;
  if (args.batch == 0 || args.M == 0 || args.N == 0) return Kernel::kNothing;
  if (matvec_w16a16_accepts(args)) return Kernel::kMatvec16;
  if (matvec_w32a32_accepts(args)) return Kernel::kMatvec32;
  if (cublaslt_accepts(args, scratch_bytes)) return Kernel::kCublasLt;
  return matmul_w16a16_accepts(args) ? Kernel::kMma : Kernel::kPlain;
}

}  // namespace

uint64_t matmul_scratch_bytes(const MatmulArgs& args) {
  uint64_t scratch_bytes = 0;
  choose(args, &scratch_bytes);
  return scratch_bytes;
}

cudaError_t launch_matmul(const MatmulArgs& args, void* scratch, uint64_t scratch_bytes,
                          cudaStream_t stream) {
  uint64_t needed = 0;
  switch (choose(args, &needed)) {
    case Kernel::kNothing:
      return cudaSuccess;
    case Kernel::kMatvec16:
      return launch_matvec_w16a16_mma(args, stream);
    case Kernel::kMatvec32:
      return launch_matvec_w32a32(args, stream);
    case Kernel::kCublasLt:
      return launch_matmul_cublaslt(args, scratch, scratch_bytes, stream);
    case Kernel::kMma:
      return launch_matmul_w16a16_mma(args, stream);
    case Kernel::kPlain:
      break;
  }
  return launch_matmul_plain(args, stream);
}

}  // namespace cuda_int4
