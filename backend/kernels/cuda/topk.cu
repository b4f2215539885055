// topk -- the k largest (or smallest) of x[o, :, i] in order, with their indices
//
//   operand        dtype       shape                  order in memory    align
//   x              any of ten  [n_outer, n, n_inner]  row-major          dtype
//   values (out)   of x        [n_outer, k, n_inner]  row-major          dtype
//   indices (out)  i64         [n_outer, k, n_inner]  row-major          8 B
//   candidates     key, index  [n_rows, n]            row-major scratch  16 B
//
// Requires  k <= n
// Grid      (n / 1024, n_rows) blocks of 256 threads per round
// Bytes     reads x once; the keys of a chunk are compared in shared memory
// Numerics  values are copied. Keys are uint64 in the order of the values, with NaN on top and
//           -0 equal to 0; of equal keys the lower index comes first
// Source    own. A candidate's rank in its chunk is the number of candidates that beat it; those of
//           rank < k are written where the rank says. Rounds on chunks of 1024 leave k a chunk, until
//           one chunk is left, or k is more than half a chunk: then a candidate is compared with all
#include <cuda_runtime.h>

#include "any_dtype.cuh"
#include "row_kernels.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 1024;
constexpr int64_t kMaxGridY = 65535;

struct Candidate {
  uint64_t key;
  int64_t index;  // along the row; -1: none
};

struct Round {
  const Candidate* from;  // nullptr: from x
  Candidate* to;          // nullptr: to values and indices
  int64_t n_rows, n;      // of candidates in a row
  int64_t n_chunks;
  int64_t chunk;  // candidates that are compared with one another: kChunk, or n
};

// Unsigned integers in the order of the values.
__device__ uint64_t key_of(const TopkArgs& p, int64_t at) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  uint64_t key;
  const bool is_float = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
                        p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64;
  if (is_float) {
    const double value = load_double(p.x, p.dtype, at);
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
    key = value != value   ? ~uint64_t{0}
          : value == 0     ? kSign
          : (bits & kSign) ? ~bits
                           : bits | kSign;
  } else {
    key = static_cast<uint64_t>(load_int64(p.x, p.dtype, at)) ^ kSign;
  }
  return p.is_largest ? key : ~key;
}

__device__ int64_t address(const TopkArgs& p, int64_t row, int64_t length, int64_t j) {
  return (row / p.n_inner * length + j) * p.n_inner + row % p.n_inner;
}

__device__ Candidate candidate(const TopkArgs& p, const Round& round, int64_t row, int64_t j) {
  if (j >= round.n) return {0, -1};
  if (round.from != nullptr) return round.from[row * round.n + j];
  return {key_of(p, address(p, row, p.n, j)), j};
}

__global__ void __launch_bounds__(kThreads) topk_kernel(TopkArgs p, Round round) {
  __shared__ Candidate others[kChunk];
  constexpr int kOwn = kChunk / kThreads;
  for (int64_t row = blockIdx.y; row < round.n_rows; row += gridDim.y) {
    const int64_t begin = int64_t{blockIdx.x} * kChunk;
    const int64_t chunk = begin / round.chunk;
    const int64_t chunk_begin = chunk * round.chunk;
    const int64_t chunk_end = min(chunk_begin + round.chunk, round.n);
    Candidate own[kOwn];
    int64_t ranks[kOwn];
    for (int i = 0; i < kOwn; ++i) {
      own[i] = candidate(p, round, row, begin + threadIdx.x + i * kThreads);
      ranks[i] = 0;
    }
    for (int64_t first = chunk_begin; first < chunk_end; first += kChunk) {
      __syncthreads();
      for (int i = 0; i < kOwn; ++i) {
        const int at = threadIdx.x + i * kThreads;
        others[at] = candidate(p, round, row, first + at);
      }
      __syncthreads();
      const int n_others = static_cast<int>(min(int64_t{kChunk}, chunk_end - first));
      for (int at = 0; at < n_others; ++at) {
        const Candidate other = others[at];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          ranks[i] += other.index >= 0 && (other.key > own[i].key ||
                                           (other.key == own[i].key && other.index < own[i].index));
        }
      }
    }
    for (int i = 0; i < kOwn; ++i) {
      if (own[i].index < 0 || ranks[i] >= p.k) continue;
      if (round.to != nullptr) {
        round.to[(row * round.n_chunks + chunk) * p.k + ranks[i]] = own[i];
        continue;
      }
      const int64_t from = address(p, row, p.n, own[i].index);
      const int64_t to = address(p, row, p.k, ranks[i]);
      p.indices[to] = own[i].index;
      switch (p.elem_bytes) {
        case 1:
          static_cast<uint8_t*>(p.values)[to] = static_cast<const uint8_t*>(p.x)[from];
          break;
        case 2:
          static_cast<uint16_t*>(p.values)[to] = static_cast<const uint16_t*>(p.x)[from];
          break;
        case 4:
          static_cast<uint32_t*>(p.values)[to] = static_cast<const uint32_t*>(p.x)[from];
          break;
        default:
          static_cast<uint64_t*>(p.values)[to] = static_cast<const uint64_t*>(p.x)[from];
      }
    }
    // A last chunk of fewer than k candidates leaves the rest of its places empty.
    if (round.to != nullptr && begin == chunk_begin) {
      for (int64_t rank = chunk_end - chunk_begin + threadIdx.x; rank < p.k; rank += kThreads)
        round.to[(row * round.n_chunks + chunk) * p.k + rank] = {0, -1};
    }
  }
}

}  // namespace

uint64_t topk_scratch_bytes(const TopkArgs& args) {
  if (args.n <= kChunk || args.k > kChunk / 2) return 0;
  const uint64_t n_rows = static_cast<uint64_t>(args.n_outer * args.n_inner);
  const uint64_t n_chunks = static_cast<uint64_t>((args.n + kChunk - 1) / kChunk);
  return 2 * n_rows * n_chunks * static_cast<uint64_t>(args.k) * sizeof(Candidate);
}

cudaError_t launch_topk(const TopkArgs& args, void* scratch, cudaStream_t stream) {
  Round round = {};
  round.n_rows = args.n_outer * args.n_inner;
  round.n = args.n;
  if (round.n_rows == 0 || args.k == 0) return cudaSuccess;
  const bool in_rounds = args.k <= kChunk / 2;
  Candidate* turns[2] = {static_cast<Candidate*>(scratch), nullptr};
  turns[1] = turns[0] + topk_scratch_bytes(args) / 2 / sizeof(Candidate);
  for (int turn = 0;; turn ^= 1) {
    const int64_t n_blocks = (round.n + kChunk - 1) / kChunk;
    const bool is_last = !in_rounds || n_blocks == 1;
    round.chunk = in_rounds ? kChunk : round.n;
    round.n_chunks = in_rounds ? n_blocks : 1;
    round.to = is_last ? nullptr : turns[turn];
    const dim3 grid(static_cast<unsigned>(n_blocks),
                    static_cast<unsigned>(round.n_rows < kMaxGridY ? round.n_rows : kMaxGridY));
    topk_kernel<<<grid, kThreads, 0, stream>>>(args, round);
    if (is_last) return cudaGetLastError();
    round.from = round.to;
    round.n = round.n_chunks * args.k;
  }
}

}  // namespace cuda_int4
