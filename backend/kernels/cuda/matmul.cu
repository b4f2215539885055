// Which kernel multiplies: a rule on the arguments and on whether the machine has cuBLASLt.
#include "matmul_kernels.cuh"

namespace cuda_int4 {

namespace {

enum class Kernel { kNothing, kMatvecDense, kMatvecMma, kCublasLt, kMma, kPlain };

// Where rows of y are not of whole 16 bytes cuBLASLt is up to 4 times slower than a mat-vec.
bool suits_cublaslt(const MatmulArgs& args) { return args.N % 8 == 0; }

Kernel choose(const MatmulArgs& args, uint64_t* scratch_bytes) {
  *scratch_bytes = 0;
  if (args.batch == 0 || args.M == 0 || args.N == 0) return Kernel::kNothing;
  if (matvec_dense_accepts(args)) return Kernel::kMatvecDense;
  const bool few_rows = matvec_w16a16_accepts(args);
  if (few_rows && !suits_cublaslt(args)) return Kernel::kMatvecMma;
  if (cublaslt_accepts(args, scratch_bytes)) return Kernel::kCublasLt;
  if (few_rows) return Kernel::kMatvecMma;
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
    case Kernel::kMatvecDense:
      return launch_matvec_dense(args, stream);
    case Kernel::kMatvecMma:
      return launch_matvec_w16a16_mma(args, stream);
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
