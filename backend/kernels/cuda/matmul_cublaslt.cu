// matmul_cublaslt -- y[i, m, n] = alpha * sum_k a[i, m, k] * b[i, k, n] + beta * c[i, m, n]
//
//   operand  dtype             shape          order in memory                        align
//   a, b     f16 | bf16 | f32  [batch, M, K]  one of k and the other size inside     dtype
//   c        of a              [batch, M, N]  any strides, 0 repeats; or absent      dtype
//   y (out)  of a              [batch, M, N]  row-major                              dtype
//
// Requires  cuBLASLt on the machine, and an algorithm of its for the shape   (cublaslt_accepts)
// Grid      cuBLASLt's; a kernel of ours first where c is neither absent nor a bias
// Bytes     as cuBLASLt; workspace of at most 32 MiB from scratch
// Numerics  fp32 sums (no tf32), split sums added in fp32; one rounding at the store, but some of
//           cuBLASLt's kernels for small shapes round before they add c, and once more after
// Source    calls NVIDIA's library. Its matrices are column-major: it computes y^T = b^T a^T
//
// A handle per device is made once and shared: cuBLASLt allows that. What it recommends for a shape
// is asked once a thread and kept in a small table of the thread's own.
#include <array>
#include <mutex>

#include "cublaslt.h"
#include "matmul_kernels.cuh"

namespace cuda_int4 {

namespace {

using namespace cublaslt;

constexpr uint64_t kMaxWorkspaceBytes = uint64_t{32} << 20;
constexpr uint64_t kWorkspaceAlignment = 256;  // bytes; cuBLASLt asks for it
constexpr int kMaxDevices = 64;
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

// The handle of the current device; nullptr where it cannot be had.
Handle handle_of(const Library& lib, int device) {
  static std::mutex mutex;
  static std::array<Handle, kMaxDevices> handles{};
  if (device < 0 || device >= kMaxDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (handles[device] == nullptr && lib.create(&handles[device]) != 0) handles[device] = nullptr;
  return handles[device];
}

enum class Addend : int { kNone, kBias, kMatrix };

// All that cuBLASLt's answer hangs on.
struct Problem {
  int device;
  DType dtype;
  Addend addend;
  bool a_is_turned, b_is_turned;              // k is not inside; n is inside
  int a_alignment, b_alignment, y_alignment;  // bytes, up to 256
  int64_t batch, M, N, K, a_line, b_line, a_batch, b_batch;

  bool operator==(const Problem& o) const {
    return device == o.device && dtype == o.dtype && addend == o.addend &&
           a_is_turned == o.a_is_turned && b_is_turned == o.b_is_turned &&
           a_alignment == o.a_alignment && b_alignment == o.b_alignment &&
           y_alignment == o.y_alignment && batch == o.batch && M == o.M && N == o.N && K == o.K &&
           a_line == o.a_line && b_line == o.b_line && a_batch == o.a_batch && b_batch == o.b_batch;
  }
  size_t hash() const {
    uint64_t h = 0;
    for (const int64_t value : {int64_t(dtype), int64_t(addend), batch, M, N, K, a_line, b_line})
      h = (h ^ uint64_t(value)) * 0x9E3779B97F4A7C15u;
    return size_t(h >> 32);
  }
};

int alignment_of(const void* pointer) {
  int alignment = 256;
  while (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) alignment /= 2;
  return alignment;
}

// A matrix whose lines (k inside, or not) lie at a stride; false: neither size is inside.
bool lines_of(int64_t rows, int64_t row_stride, int64_t K, int64_t k_stride, bool* is_turned,
              int64_t* line) {
  if (k_stride == 1 && (row_stride >= K || rows == 1)) {
    *is_turned = false;
    *line = rows == 1 ? K : row_stride;
    return true;
  }
  if (row_stride == 1 && (k_stride >= rows || K == 1)) {
    *is_turned = true;
    *line = K == 1 ? rows : k_stride;
    return true;
  }
  return false;
}

bool problem_of(const MatmulArgs& args, Problem* p) {
  *p = Problem{};
  if (args.dtype != DType::kFloat16 && args.dtype != DType::kBFloat16 &&
      args.dtype != DType::kFloat32)
    return false;
  if (args.batch < 1 || args.M < 1 || args.N < 1 || args.K < 1) return false;
  if (!lines_of(args.M, args.a_m, args.K, args.a_k, &p->a_is_turned, &p->a_line) ||
      !lines_of(args.N, args.b_n, args.K, args.b_k, &p->b_is_turned, &p->b_line))
    return false;
  if (cudaGetDevice(&p->device) != cudaSuccess) return false;
  p->dtype = args.dtype;
  const bool is_bias = args.c != nullptr && args.c_m == 0 && args.c_n == 1 && args.beta == 1 &&
                       args.batch == 1 && alignment_of(args.c) >= 16;
  p->addend = args.c == nullptr ? Addend::kNone : is_bias ? Addend::kBias : Addend::kMatrix;
  p->a_alignment = alignment_of(args.a);
  p->b_alignment = alignment_of(args.b);
  p->y_alignment = alignment_of(args.y);
  p->batch = args.batch;
  p->M = args.M;
  p->N = args.N;
  p->K = args.K;
  p->a_batch = args.a_batch;
  p->b_batch = args.b_batch;
  return true;
}

// cuBLASLt's description of a problem; its A is our b, its B our a, its D our y.
struct Description {
  const Library& lib;
  MatmulDesc desc = nullptr;
  MatrixLayout a = nullptr, b = nullptr, y = nullptr;
  bool ok = false;

  Description(const Library& library, const Problem& p, const void* bias) : lib(library) {
    const DataType type = p.dtype == DType::kFloat16    ? kR16F
                          : p.dtype == DType::kBFloat16 ? kR16BF
                                                        : kR32F;
    const Operation turn_b = p.b_is_turned ? kNormal : kTransposed;
    const Operation turn_a = p.a_is_turned ? kTransposed : kNormal;
    ok = lib.desc_create(&desc, kCompute32F, kR32F) == 0 && set(kDescTransA, turn_b) &&
         set(kDescTransB, turn_a);
    if (p.addend == Addend::kBias)
      ok = ok && set(kDescEpilogue, kEpilogueBias) && set(kDescBias, bias);
    ok = ok &&
         layout(&b, type, p.b_is_turned ? p.N : p.K, p.b_is_turned ? p.K : p.N, p.b_line, p.b_batch,
                p.batch) &&
         layout(&a, type, p.a_is_turned ? p.M : p.K, p.a_is_turned ? p.K : p.M, p.a_line, p.a_batch,
                p.batch) &&
         layout(&y, type, p.N, p.M, p.N, p.M * p.N, p.batch);
  }
  ~Description() {
    if (desc != nullptr) lib.desc_destroy(desc);
    for (const MatrixLayout matrix : {a, b, y})
      if (matrix != nullptr) lib.layout_destroy(matrix);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  template <typename Value>
  bool set(int attribute, const Value& value) {
    return lib.desc_set(desc, attribute, &value, sizeof(value)) == 0;
  }
  bool layout(MatrixLayout* matrix, DataType type, int64_t rows, int64_t columns, int64_t line,
              int64_t batch_stride, int64_t batch) {
    if (lib.layout_create(matrix, type, uint64_t(rows), uint64_t(columns), line) != 0) return false;
    const int32_t count = static_cast<int32_t>(batch);
    return batch == 1 ||
           (count == batch &&
            lib.layout_set(*matrix, kLayoutBatchCount, &count, sizeof(count)) == 0 &&
            lib.layout_set(*matrix, kLayoutBatchStride, &batch_stride, sizeof(batch_stride)) == 0);
  }
};

// Its first recommendation; state != 0: it has none.
Heuristic ask(const Library& lib, Handle handle, const Problem& p, const void* bias) {
  Heuristic best{};
  best.state = -1;
  const Description description(lib, p, bias);
  Preference preference = nullptr;
  if (!description.ok || lib.preference_create(&preference) != 0) return best;
  const auto set = [&](int attribute, auto value) {
    return lib.preference_set(preference, attribute, &value, sizeof(value)) == 0;
  };
  const uint32_t alignments[] = {uint32_t(p.b_alignment), uint32_t(p.a_alignment),
                                 uint32_t(p.y_alignment), uint32_t(p.y_alignment)};
  bool ok = set(kPreferenceMaxWorkspaceBytes, kMaxWorkspaceBytes) &&
            set(kPreferenceReductionSchemes, uint32_t{kReduceInComputeType});
  for (int i = 0; i < 4; ++i) ok = ok && set(kPreferenceMinAlignmentA + i, alignments[i]);
  int n_found = 0;
  Heuristic found{};
  if (ok &&
      lib.get_heuristic(handle, description.desc, description.b, description.a, description.y,
                        description.y, preference, 1, &found, &n_found) == 0 &&
      n_found == 1 && found.state == 0)
    best = found;
  lib.preference_destroy(preference);
  return best;
}

// The same, remembered by the thread.
const Heuristic& recommended(const Library& lib, Handle handle, const Problem& p,
                             const void* bias) {
  struct Entry {
    Problem problem;
    Heuristic heuristic;
  };
  static thread_local std::array<Entry, 128> table{};
  Entry& entry = table[p.hash() % table.size()];
  if (!(entry.problem == p)) entry = {p, ask(lib, handle, p, bias)};
  return entry.heuristic;
}

// c to y, element by element.
template <typename Word>
__global__ void __launch_bounds__(kThreads) repeat_kernel(MatmulArgs p) {
  const Word* c = static_cast<const Word*>(p.c);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < p.batch * p.M * p.N;
       at += int64_t{gridDim.x} * kThreads) {
    const int64_t n = at % p.N, m = at / p.N % p.M, i = at / p.N / p.M;
    static_cast<Word*>(p.y)[at] = c[i * p.c_batch + m * p.c_m + n * p.c_n];
  }
}

}  // namespace

bool cublaslt_accepts(const MatmulArgs& args, uint64_t* scratch_bytes) {
  *scratch_bytes = 0;
  const Library* lib = library();
  Problem problem;
  if (lib == nullptr || !problem_of(args, &problem)) return false;
  const Handle handle = handle_of(*lib, problem.device);
  if (handle == nullptr) return false;
  const Heuristic& heuristic = recommended(*lib, handle, problem, args.c);
  if (heuristic.workspace_bytes > 0)
    *scratch_bytes = heuristic.workspace_bytes + kWorkspaceAlignment;
  return heuristic.state == 0;
}

cudaError_t launch_matmul_cublaslt(const MatmulArgs& args, void* scratch, uint64_t scratch_bytes,
                                   cudaStream_t stream) {
  const Library* lib = library();
  Problem problem;
  if (lib == nullptr || !problem_of(args, &problem)) return cudaErrorNotSupported;
  const Handle handle = handle_of(*lib, problem.device);
  const Heuristic& heuristic = recommended(*lib, handle, problem, args.c);
  const uintptr_t scratch_begin = reinterpret_cast<uintptr_t>(scratch);
  const uintptr_t workspace =
      (scratch_begin + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  if (heuristic.state != 0 ||
      (heuristic.workspace_bytes > 0 &&
       workspace - scratch_begin + heuristic.workspace_bytes > scratch_bytes))
    return cudaErrorInvalidValue;
  if (problem.addend == Addend::kMatrix && args.c != args.y) {
    const int64_t blocks = (args.batch * args.M * args.N + kThreads - 1) / kThreads;
    const unsigned grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
    if (args.dtype == DType::kFloat32) {
      repeat_kernel<uint32_t><<<grid, kThreads, 0, stream>>>(args);
    } else {
      repeat_kernel<uint16_t><<<grid, kThreads, 0, stream>>>(args);
    }
  }
  const Description description(*lib, problem, args.c);
  if (!description.ok) return cudaErrorInvalidValue;
  const float alpha = static_cast<float>(args.alpha);
  const float beta = problem.addend == Addend::kMatrix ? static_cast<float>(args.beta) : 0.f;
  const cublaslt::Status status =
      lib->matmul(handle, description.desc, &alpha, args.b, description.b, args.a, description.a,
                  &beta, args.y, description.y, args.y, description.y, &heuristic.algorithm,
                  reinterpret_cast<void*>(workspace), heuristic.workspace_bytes, stream);
  const cudaError_t code = cudaGetLastError();
  return code != cudaSuccess ? code : status == 0 ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace cuda_int4
