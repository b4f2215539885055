// sample -- of each row of logits a token: the likeliest, or one drawn after temperature, top-k, top-p
//           and min-p (sampling.h); the token becomes the row's next input, its position advances
//
//   operand          dtype             shape                 order in memory  align
//   logits           f16 | bf16 | f32  [n_rows, row_stride]  row-major        dtype (16 B: fast)
//   rows (in, out)   SampleRow         [n_rows]              contiguous       8 B
//   tokens (out)     i64               [n_rows]              contiguous       8 B
//   positions (in, out)  i64           [n_rows]              contiguous       8 B
//   words (out)      u64               [n_slots, n_rows]     host memory      8 B; slot step % n_slots
//
// Requires  1 <= vocab_size <= 2^23, vocab_size <= row_stride
// Grid      a cluster of 8 blocks of 1024 threads per row, which share the row; 1 block for up to 8192
//           logits and below sm_90
// Bytes     reads the logits once; those of a row that draws stay in shared memory as decays (up to
//           32768 a block, else they are read and worked out again in each pass); writes 8 * n_rows
//           over the bus and as much on the device
// Numerics  integers but for one product per logit: every sum is exact, the token that of the CPU
// Source    own. Bounds by radix selection over the 30 bits of a decay, 3 passes of 10: sums of
//           likelihood by digit in shared memory, added over the blocks of the row
#include <cuda_runtime.h>

#include "../sampling.h"
#include "../tensor_view.h"
#include "launch_status.cuh"
#include "multiprocessors.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "sample.cuh"

namespace cuda_int4 {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRanks = 8;  // blocks of a row: the largest portable cluster
// Up to here a row has one block, which waits for no other: 15 us for 27 with 256 logits and top-p, 26
// for 28 with 8192, 39 for 30 with 16384 on an H200.
constexpr int64_t kOwnBlockVocab = 8192;
constexpr int kDigits = 1024;
constexpr int kDigitBits = 10;
constexpr int kStagedDecays = 32768;  // of a block: 128 KB
static_assert(kDigits == kThreads, "a thread adds one digit up");
constexpr int kChunk = 8;  // blocks begin at multiples of it
constexpr uint32_t kAll = 0xffffffffu;

// NaN and +inf, which no token can be chosen from, are above all; -0 is 0.
constexpr uint32_t kBadKey = 0xffffffffu;
constexpr uint32_t kNegativeInfinityKey = 0x007fffffu;

__device__ __forceinline__ uint32_t key_of(float logit) {
  if (!(logit < __int_as_float(0x7f800000))) return kBadKey;
  const uint32_t bits = __float_as_uint(logit + 0.f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Of the greater key, of equals the lower index.
__device__ __forceinline__ uint64_t candidate(uint32_t key, uint32_t index) {
  return (static_cast<uint64_t>(key) << 32) | (kAll - index);
}
__device__ __forceinline__ uint32_t candidate_key(uint64_t candidate) { return candidate >> 32; }
__device__ __forceinline__ uint32_t candidate_index(uint64_t candidate) {
  return kAll - static_cast<uint32_t>(candidate);
}

__device__ __forceinline__ uint64_t warp_best(uint32_t key, uint32_t index) {
  const uint32_t greatest = __reduce_max_sync(kAll, key);
  return candidate(greatest, __reduce_min_sync(kAll, key == greatest ? index : kAll));
}

__device__ __forceinline__ uint64_t best_of(uint64_t a, uint64_t b) { return a > b ? a : b; }

__device__ __forceinline__ uint64_t warp_total(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// The sum of this lane's value and those of the lanes before it.
__device__ __forceinline__ uint64_t warp_running(uint64_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t before = __shfl_up_sync(kAll, value, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) value += before;
  }
  return value;
}

// ---- the blocks of a row ----

template <int kRanks>
struct Row {
  static __device__ __forceinline__ int rank() {
    return kRanks == 1 ? 0 : static_cast<int>(blockIdx.x % kRanks);
  }
  static __device__ __forceinline__ void sync() {
    if constexpr (kRanks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      cluster_arrive();
      cluster_wait();
#endif
    }
  }
  // What lies at the same place in the shared memory of block `from`.
  static __device__ __forceinline__ uint64_t read(const uint64_t* shared, int from) {
    if constexpr (kRanks == 1) return *shared;
#if __CUDA_ARCH__ >= 900
    return load_cluster_u64(address_in_rank(shared_address(shared), static_cast<uint32_t>(from)));
#else
    return *shared;
#endif
  }
};

// Of the row the indices [begin, end), a rank's or a warp's.
struct Range {
  int begin, end;
};

__device__ __forceinline__ Range part(Range of, int n_parts, int i) {
  const int length = (of.end - of.begin + n_parts * kChunk - 1) / (n_parts * kChunk) * kChunk;
  const int begin = min(of.end, of.begin + i * length);
  return {begin, min(of.end, begin + length)};
}

template <typename T>
__device__ __forceinline__ const T* row_logits(const SampleArgs& p, int row) {
  return static_cast<const T*>(p.logits) + row * p.row_stride;
}

// take(index, logit), ascending within a thread; 16 bytes at a time where the row lies so.
template <typename T, typename Take>
__device__ __forceinline__ void each_logit(const T* logits, Range range, const Take& take) {
  constexpr int kVec = kElemsPer16Bytes<T>;
  int at = range.begin + static_cast<int>(threadIdx.x) * kVec;
  if (reinterpret_cast<uintptr_t>(logits + range.begin) % 16 == 0) {
#pragma unroll 4
    for (; at + kVec <= range.end; at += kThreads * kVec) {
      const Elems<T, kVec> vector = *reinterpret_cast<const Elems<T, kVec>*>(logits + at);
#pragma unroll
      for (int j = 0; j < kVec; ++j) take(at + j, as_float(vector.values[j]));
    }
  }
  for (; at < range.end; at += kThreads * kVec)
    for (int j = 0; j < kVec && at + j < range.end; ++j) take(at + j, as_float(logits[at + j]));
}

// The best candidate of the block, in all threads of warp 0.
__device__ __forceinline__ uint64_t block_best(uint32_t key, uint32_t index, uint64_t* warp_bests) {
  const uint64_t best = warp_best(key, index);
  if (threadIdx.x % 32 == 0) warp_bests[threadIdx.x / 32] = best;
  __syncthreads();
  const uint64_t other = warp_bests[threadIdx.x % 32];
  return warp_best(candidate_key(other), candidate_index(other));
}

// Where a row stands, read while the logits are on their way: 0.2 us of 3.4 less on an H200.
struct Standing {
  int64_t position, end_position;
  uint64_t step;
  uint64_t* word;  // of this step
};

__device__ __forceinline__ Standing standing_of(const SampleArgs& p, int row) {
  const SampleRow& state = p.rows[row];
  const auto slot = static_cast<int64_t>(state.step % static_cast<uint64_t>(p.n_slots));
  return {p.positions[row], state.end_position, state.step, p.words + slot * p.n_rows + row};
}

// One thread of the row: what was chosen, to the host and to the next step.
__device__ void finish(const SampleArgs& p, int row, const Standing& standing, uint32_t token,
                       SampleStatus status) {
  const int64_t next = standing.position + 1;
  if (status == SampleStatus::kSampled && next < standing.end_position) {
    p.tokens[row] = token;
    p.positions[row] = next;
  }
  p.rows[row].step = standing.step + 1;
  // One store: the host sees all of it or nothing.
  *reinterpret_cast<volatile uint64_t*>(standing.word) =
      sample_word(token, status, standing.step + 1);
}

template <typename T>
__device__ void finish_greedily(const SampleArgs& p, int row, const Standing& standing,
                                uint64_t best) {
  const uint32_t key = candidate_key(best), index = candidate_index(best);
  SampleStatus status = SampleStatus::kSampled;
  if (key == kBadKey) {
    const float logit = as_float(row_logits<T>(p, row)[index]);
    status = logit == logit ? SampleStatus::kInfinity : SampleStatus::kNan;
  } else if (key == kNegativeInfinityKey) {
    status = SampleStatus::kNoToken;
  }
  finish(p, row, standing, index, status);
}

// ---- greedy rows only ----

template <typename T, int kRanks>
__global__ void __launch_bounds__(kThreads) sample_greedy_kernel(SampleArgs p) {
  __shared__ uint64_t warp_bests[kWarps];
  [[maybe_unused]] __shared__ uint64_t rank_bests[kMaxRanks];  // read in rank 0
#if __CUDA_ARCH__ >= 900
  if constexpr (kRanks > 1) cluster_arrive_relaxed();
#endif
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int row = static_cast<int>(blockIdx.x) / kRanks;
  const Range range = part({0, static_cast<int>(p.vocab_size)}, kRanks, Row<kRanks>::rank());
  Standing standing = {};
  if (threadIdx.x == 0 && Row<kRanks>::rank() == 0) standing = standing_of(p, row);
  uint32_t key = 0, index = kAll;  // key 0 is no logit's
  each_logit(row_logits<T>(p, row), range, [&](int i, float logit) {
    const uint32_t other = key_of(logit);
    if (other > key) {
      key = other;
      index = static_cast<uint32_t>(i);
    }
  });
  uint64_t best = block_best(key, index, warp_bests);
#if __CUDA_ARCH__ >= 900
  if constexpr (kRanks > 1) {
    cluster_wait();  // rank 0 has started
    if (threadIdx.x == 0)
      store_cluster(address_in_rank(shared_address(rank_bests + Row<kRanks>::rank()), 0), best);
    cluster_arrive();
    if (Row<kRanks>::rank() != 0) return;
    cluster_wait();
    best = rank_bests[0];
#pragma unroll
    for (int r = 1; r < kRanks; ++r) best = best_of(best, rank_bests[r]);
  }
#endif
  if (threadIdx.x == 0) finish_greedily<T>(p, row, standing, best);
}

// ---- any rows ----

// What the blocks of a row share with each other.
struct Shared {
  uint64_t digits[2][kDigits];  // [parity]: sums of a selection's measure by digit
  uint64_t warp_sums[kWarps];
  uint64_t own[2];  // a rank's sum, or its best; two, so that one is read while the next is written
  uint64_t before;  // of a selection: the sum of the digits in front
  uint32_t digit;
  uint32_t found;
};

// Tokens up to the bound are kept.
struct Bound {
  uint32_t decay, index;
  __device__ __forceinline__ bool keeps(uint32_t other_decay, uint32_t i) const {
    return other_decay < decay || (other_decay == decay && i <= index);
  }
};

template <typename T, int kRanks>
class Chooser {
 public:
  __device__ Chooser(const SampleArgs& p, int row, Shared& shared, uint32_t* staged)
      : logits_(row_logits<T>(p, row)),
        shared_(shared),
        staged_(staged),
        range_(part({0, static_cast<int>(p.vocab_size)}, kRanks, Row<kRanks>::rank())),
        warp_range_(part(range_, kWarps, static_cast<int>(threadIdx.x / 32))) {}

  // The row's best, in all threads.
  __device__ uint64_t load() {
    uint32_t key = 0, index = kAll;
    each_logit(logits_, range_, [&](int i, float logit) {
      const uint32_t other = key_of(logit);
      if (staged_ != nullptr) staged_[i - range_.begin] = other;
      if (other > key) {
        key = other;
        index = static_cast<uint32_t>(i);
      }
    });
    uint64_t best = block_best(key, index, shared_.warp_sums);
    uint64_t* own = next_own();
    if (threadIdx.x == 0) *own = best;
    Row<kRanks>::sync();
    for (int r = 0; r < kRanks; ++r) best = best_of(best, Row<kRanks>::read(own, r));
    return best;
  }

  __device__ uint32_t choose(const SampleRule& rule, float greatest, int64_t position) {
    scale_ = rule.scale;
    greatest_ = greatest;
    if (staged_ != nullptr) {
      each_index([&](int i) {
        uint32_t& value = staged_[i - range_.begin];
        value = decay_of(logit_of(value), greatest, scale_);
      });
    }
    if (rule.top_k > 0) {
      bound_ = least_kept([](uint32_t decay) { return uint64_t{decay < kMaxDecay}; },
                          [&](uint64_t) { return static_cast<uint64_t>(rule.top_k); });
    }
    if (rule.top_p < 1) {
      bound_ = least_kept([](uint32_t decay) { return weight_of(decay); },
                          [&](uint64_t total) {
                            return __double2ull_ru(__dmul_rn(rule.top_p, __ull2double_rn(total)));
                          });
    }
    const uint64_t random = random_bits(rule.seed, rule.sequence, static_cast<uint64_t>(position));
    return locate(
        [&](uint32_t decay, uint32_t i) {
          const uint64_t weight = bound_.keeps(decay, i) ? weight_of(decay) : 0;
          return weight < rule.min_weight ? 0 : weight;
        },
        [&](uint64_t total) { return __umul64hi(random, total); });
  }

 private:
  __device__ __forceinline__ uint64_t* next_own() { return &shared_.own[n_own_++ % 2]; }

  template <typename Take>
  __device__ __forceinline__ void each_index(const Take& take) {
    for (int i = warp_range_.begin + static_cast<int>(threadIdx.x % 32); i < warp_range_.end;
         i += 32)
      take(i);
  }
  __device__ __forceinline__ uint32_t decay_at(int i) const {
    if (staged_ != nullptr) return staged_[i - range_.begin];
    return decay_of(as_float(logits_[i]), greatest_, scale_);
  }

  // The bound behind which the sum of measure(decay) over what is kept, going from the likeliest token
  // on, has reached wanted(its total); the present one where it does not.
  template <typename Measure, typename Wanted>
  __device__ Bound least_kept(const Measure& measure, const Wanted& wanted_of) {
    uint64_t wanted = 0, before = 0;
    uint32_t prefix = 0;  // the digits so far
    for (int shift = 2 * kDigitBits; shift >= 0; shift -= kDigitBits) {
      uint64_t* digits = shared_.digits[n_passes_++ % 2];
      digits[threadIdx.x] = 0;
      __syncthreads();
      each_index([&](int i) {
        const uint32_t decay = decay_at(i);
        if (decay >= kMaxDecay || (decay >> shift) >> kDigitBits != prefix ||
            !bound_.keeps(decay, static_cast<uint32_t>(i)))
          return;
        const uint64_t m = measure(decay);
        const uint32_t digit = (decay >> shift) % kDigits, low = static_cast<uint32_t>(m);
        // In halves: shared memory adds those up by itself, whole sums only by trying again.
        uint32_t* halves = reinterpret_cast<uint32_t*>(digits + digit);
        const uint32_t was = atomicAdd(halves, low);
        const uint32_t high = static_cast<uint32_t>(m >> 32) + (was + low < was);
        if (high != 0) atomicAdd(halves + 1, high);
      });
      Row<kRanks>::sync();
      uint64_t sum = 0;
#pragma unroll
      for (int r = 0; r < kRanks; ++r) sum += Row<kRanks>::read(digits + threadIdx.x, r);
      const uint64_t running = before + block_running(sum);  // ends with a barrier
      if (shift == 2 * kDigitBits) wanted = wanted_of(total_);
      if (total_ + before < wanted) return bound_;  // only in the first pass
      if (running >= wanted && running - sum < wanted) {
        shared_.digit = threadIdx.x;
        shared_.before = running - sum;
      }
      __syncthreads();
      prefix = prefix * kDigits + shared_.digit;
      before = shared_.before;
    }
    // Of those of this decay so many are needed, the lower indices first.
    const uint64_t each = measure(prefix);
    const uint64_t needed = (wanted - before + each - 1) / each;
    const uint32_t last = locate(
        [&](uint32_t decay, uint32_t i) {
          return static_cast<uint64_t>(decay == prefix && bound_.keeps(decay, i));
        },
        [&](uint64_t) { return needed - 1; });
    return {prefix, last};
  }

  // The sum of this thread's value and those of the threads before it; total_ of all.
  __device__ uint64_t block_running(uint64_t value) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    uint64_t running = warp_running(value);
    if (threadIdx.x % 32 == 31) shared_.warp_sums[warp] = running;
    __syncthreads();
    total_ = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) running += total_;
      total_ += shared_.warp_sums[w];
    }
    __syncthreads();
    return running;
  }

  // The index at which the sum of measure(decay, index), walked by index, exceeds target(its total).
  template <typename Measure, typename Target>
  __device__ uint32_t locate(const Measure& measure, const Target& target_of) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const auto measure_at = [&](int i) { return measure(decay_at(i), static_cast<uint32_t>(i)); };
    uint64_t sum = 0;
    each_index([&](int i) { sum += measure_at(i); });
    sum = warp_total(sum);
    if (lane == 0) shared_.warp_sums[warp] = sum;
    __syncthreads();
    uint64_t* own = next_own();
    uint64_t before = 0, block = 0;  // the warp's place in the block
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = block;
      block += shared_.warp_sums[w];
    }
    if (threadIdx.x == 0) *own = block;
    Row<kRanks>::sync();
    uint64_t total = 0;
    for (int r = 0; r < kRanks; ++r) {
      if (r == Row<kRanks>::rank()) before += total;
      total += Row<kRanks>::read(own, r);
    }
    const uint64_t target = target_of(total);
    if (before <= target && target < before + sum) {  // the same in all lanes of a warp
      for (int first = warp_range_.begin; first < warp_range_.end; first += 32) {
        const int i = first + lane;
        const uint64_t running =
            before + warp_running(i < warp_range_.end ? measure_at(i) : uint64_t{0});
        const uint32_t reached = __ballot_sync(kAll, running > target);
        if (reached != 0) {
          if (lane == 0) {
            const uint32_t index =
                static_cast<uint32_t>(first + __ffs(static_cast<int>(reached)) - 1);
            for (int r = 0; r < kRanks; ++r) write_found(r, index);
          }
          break;
        }
        before = __shfl_sync(kAll, running, 31);
      }
    }
    Row<kRanks>::sync();
    return shared_.found;
  }
  __device__ __forceinline__ void write_found(int to, uint32_t index) {
    if constexpr (kRanks == 1) {
      shared_.found = index;
    } else {
#if __CUDA_ARCH__ >= 900
      store_cluster(address_in_rank(shared_address(&shared_.found), static_cast<uint32_t>(to)),
                    index);
#endif
    }
  }

  const T* const logits_;
  Shared& shared_;
  uint32_t* const staged_;  // keys, then decays, of range_; nullptr: there is no room for them
  const Range range_, warp_range_;
  Bound bound_ = {kMaxDecay, kAll};
  float greatest_ = 0;
  double scale_ = 0;
  uint64_t total_ = 0;
  int n_own_ = 0, n_passes_ = 0;
};

template <typename T, int kRanks, bool kStaged>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs p) {
  extern __shared__ uint32_t decays[];
  __shared__ Shared shared;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int row = static_cast<int>(blockIdx.x) / kRanks;
  Chooser<T, kRanks> chooser(p, row, shared, kStaged ? decays : nullptr);
  const uint64_t best = chooser.load();
  const uint32_t key = candidate_key(best);
  const SampleRule rule = p.rows[row].rule;
  const bool draws = rule.scale != 0 && key != kBadKey && key != kNegativeInfinityKey;
  uint32_t token = 0;
  if (draws) token = chooser.choose(rule, logit_of(key), p.positions[row] + 1);
  Row<kRanks>::sync();  // no block ends while another reads its shared memory
  if (Row<kRanks>::rank() != 0 || threadIdx.x != 0) return;
  const Standing standing = standing_of(p, row);
  if (draws) {
    finish(p, row, standing, token, SampleStatus::kSampled);
  } else {
    finish_greedily<T>(p, row, standing, best);
  }
}

// ---- launches ----

template <int kRanks>
cudaError_t launch(void (*kernel)(SampleArgs), const SampleArgs& args, int shared_bytes,
                   cudaStream_t stream) {
  if (shared_bytes > 0) {
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kRanks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(args.n_rows * kRanks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kRanks > 1 ? 2 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, int kRanks>
cudaError_t choose(const SampleArgs& args, cudaStream_t stream) {
  if (args.is_greedy != 0) return launch<kRanks>(sample_greedy_kernel<T, kRanks>, args, 0, stream);
  const int64_t per_rank = (args.vocab_size + kRanks * kChunk - 1) / (kRanks * kChunk) * kChunk;
  if (per_rank > kStagedDecays)
    return launch<kRanks>(sample_kernel<T, kRanks, false>, args, 0, stream);
  int device = 0, most = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return code;
  const int64_t shared_bytes = per_rank * static_cast<int64_t>(sizeof(uint32_t));
  if (shared_bytes + static_cast<int64_t>(sizeof(Shared)) > most)
    return launch<kRanks>(sample_kernel<T, kRanks, false>, args, 0, stream);
  return launch<kRanks>(sample_kernel<T, kRanks, true>, args, static_cast<int>(shared_bytes),
                        stream);
}

template <typename T>
cudaError_t choose(const SampleArgs& args, cudaStream_t stream) {
  const bool is_shared = args.vocab_size > kOwnBlockVocab && hopper_multiprocessors() > 0;
  return is_shared ? choose<T, kMaxRanks>(args, stream) : choose<T, 1>(args, stream);
}

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.n_rows == 0) return cudaSuccess;
  switch (static_cast<DType>(args.dtype)) {
    case DType::kFloat16:
      return choose<__half>(args, stream);
    case DType::kBFloat16:
      return choose<__nv_bfloat16>(args, stream);
    case DType::kFloat32:
      return choose<float>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

Status cuda_sample(const SampleArgs& args, const ExecutionContext& context) {
  return launch_status("sample", launch_sample(args, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace cuda_int4
