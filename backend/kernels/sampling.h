// How a row of logits becomes a token: what the CPU's sampler (runtime/sampler.cpp) and the GPU's kernel
// (cuda/sample.cu) compute alike, to the last bit.
//
//   decay    how much less likely than the likeliest token, in octaves under the temperature, as an
//            integer in units of 2^-24; kMaxDecay or more: never drawn. Equal decay is equally likely,
//            and of equals the lower index comes first.
//   weight   2^40 * 2^-decay, an integer: sums of weights are the same in any order
//   draw     random * total >> 64, walked by index; random from Philox4x32-10
//
// The one product that rounds is in decay_of, and nothing is added to it: no compiler can fuse it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CUDA_INT4_ON_BOTH __host__ __device__ __forceinline__
#else
#define CUDA_INT4_ON_BOTH inline
#endif

namespace cuda_int4 {

// The configuration of one row; sampler.h SamplerConfig says what it means.
struct SampleRule {
  double scale;         // log2(e) / temperature * 2^24, finite; 0: greedy, the rest is moot
  int64_t top_k;        // <= 0: off
  double top_p;         // 1: off
  uint64_t min_weight;  // min_p * 2^40; 0: off
  uint64_t seed;        // the generator's key
  uint64_t sequence;    // its counter, together with the position
};

constexpr int kDecayBits = 24;                     // of an octave
constexpr uint32_t kMaxDecay = 40u << kDecayBits;  // 2^-40 of the likeliest: counts as 0
constexpr int kWeightBits = 40;
constexpr int64_t kMaxVocab = int64_t{1} << 23;  // keeps the sum of weights inside 64 bits

CUDA_INT4_ON_BOTH uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

CUDA_INT4_ON_BOTH uint32_t decay_of(float logit, float greatest, double scale) {
  const double octaves = (static_cast<double>(greatest) - static_cast<double>(logit)) * scale;
  return octaves < static_cast<double>(kMaxDecay) ? static_cast<uint32_t>(octaves) : kMaxDecay;
}

// 1 - f * q(f) for 2^-f, 0 <= f < 1, with q of the 6th degree: 1.5e-9 off where it is worst, exact at 0.
CUDA_INT4_ON_BOTH uint64_t weight_of(uint32_t decay) {
  if (decay >= kMaxDecay) return 0;
  const uint32_t f = decay << (32 - kDecayBits);  // in units of 2^-32, as the coefficients
  uint32_t q = 639488u - high_product(48550u, f);
  q = 5712048u - high_product(q, f);
  q = 41304489u - high_product(q, f);
  q = 238387495u - high_product(q, f);
  q = 1031764939u - high_product(q, f);
  q = 2977044471u - high_product(q, f);
  const uint64_t power = (uint64_t{1} << 32) - high_product(q, f);
  return (power << (kWeightBits - 32)) >> (decay >> kDecayBits);
}

// Philox4x32-10: four random words from a counter and a key, without state. Source: Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.
CUDA_INT4_ON_BOTH void philox4x32(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, counter[0]);
    const uint32_t high1 = high_product(0xCD9E8D57u, counter[2]);
    const uint32_t low0 = 0xD2511F53u * counter[0], low1 = 0xCD9E8D57u * counter[2];
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

CUDA_INT4_ON_BOTH uint64_t random_bits(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint32_t words[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                       static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)};
  philox4x32(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (static_cast<uint64_t>(words[1]) << 32) | words[0];
}

// What a kernel that samples says of a row, in one 64-bit word: bits 0..31 the token, 32..39 the
// status, 40..63 the number of the step. For another status than kSampled the token is the first that
// is wrong.
enum class SampleStatus : uint32_t { kSampled = 0, kNan = 1, kInfinity = 2, kNoToken = 3 };
constexpr int kStepBits = 24;

CUDA_INT4_ON_BOTH uint64_t sample_word(uint32_t token, SampleStatus status, uint64_t step) {
  return token | (static_cast<uint64_t>(status) << 32) | (step << 40);
}
inline uint32_t sampled_token(uint64_t word) { return static_cast<uint32_t>(word); }
inline SampleStatus sample_status(uint64_t word) {
  return static_cast<SampleStatus>((word >> 32) & 0xff);
}
inline uint64_t sampled_step(uint64_t word) { return word >> 40; }

// A row of a decode loop that runs on the device, in device memory.
struct SampleRow {
  SampleRule rule;
  // The row goes on while the position behind its token is below; at the end it repeats its last token
  // at its last position, which writes again what is there.
  int64_t end_position;
  uint64_t step;  // taken so far
};

// One step's end: a token for each row of logits, which becomes its next input.
struct SampleArgs {
  const void* logits;                      // [n_rows, row_stride], of each row the first vocab_size
  int64_t n_rows, vocab_size, row_stride;  // 1 <= vocab_size <= kMaxVocab, a token fits 24 bits
  int32_t dtype;                           // DType: float16 | bfloat16 | float32
  int32_t is_greedy;                       // 1: no row of it draws
  SampleRow* rows;                         // [n_rows]
  int64_t* tokens;                         // [n_rows]: the token read, then the one to read next
  int64_t* positions;                      // [n_rows]: its position, then the next
  uint64_t* words;  // [n_slots, n_rows], host memory that the device sees; slot step % n_slots
  int64_t n_slots;
};

}  // namespace cuda_int4
