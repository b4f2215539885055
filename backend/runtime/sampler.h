// Sampler -- one row of logits to one token: greedy, or drawn after temperature, top-k and top-p.
//
// Knows tensors (kernels/tensor_view.h) and nothing of models. What a draw depends on: the logits,
// the configuration, the seed and `position`, and nothing else -- not on what was drawn before.
// Probabilities are integers in units of 2^-40 of the likeliest token's: their sums are exact in any
// order, and exp is our own, so that a seed gives the same tokens on every platform.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../kernels/tensor_view.h"
#include "visibility.h"

namespace cuda_int4 {

// Filters apply in the order of the fields, each to what the one before it left.
struct SamplerConfig {
  double temperature = 0;  // 0: greedy, the filters are moot; else logits are divided by it
  int64_t top_k = 0;       // > 0: only the k likeliest tokens; on equal logits the lower indices
  double top_p = 1;        // < 1: the smallest set of likeliest tokens that hold this probability
  uint64_t seed = 0;
};

// Says which field is out of range, and its range.
CUDA_INT4_EXPORT Status validate_sampler_config(const SamplerConfig& config);

class CUDA_INT4_EXPORT Sampler {
 public:
  // `config` has passed validate_sampler_config.
  explicit Sampler(const SamplerConfig& config) : config_(config) {}

  // logits: contiguous float16 | bfloat16 | float32, at least one value; -inf excludes a token.
  // position: the token's place in the conversation, the counter of the random number generator.
  // An error, and *token untouched: a NaN or +inf, all of them -inf, another dtype.
  // Allocates on the first call for a vocabulary size, never again.
  Status sample(const TensorView& logits, int64_t position, int64_t* token);

 private:
  struct Candidate {
    float logit;
    uint32_t index;
  };
  // True if `a` is less likely than `b`; of equals the higher index is. A total order.
  static bool less_likely(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit < b.logit : a.index > b.index;
  }

  // log(p / p_max) under the temperature.
  double exponent(size_t i) const {
    return (logits_[i] - static_cast<double>(max_logit_)) / config_.temperature;
  }
  // The least likely of the likeliest tokens whose sum of measure(i) reaches `wanted`; of all of
  // them if that does not.
  template <typename Measure>
  Candidate least_kept(uint64_t wanted, const Measure& measure);
  // The draw among all but greedily.
  int64_t draw(int64_t position);

  static constexpr int kBuckets = 4096;

  SamplerConfig config_;
  float max_logit_ = 0;
  std::vector<float> logits_;
  std::vector<uint64_t> weights_;        // 2^40 * exp(exponent(i)), 0 where filtered out
  std::array<uint64_t, kBuckets> sums_;  // of measure over tokens of nearly one likelihood
  std::vector<Candidate> candidates_;    // the tokens of one bucket
};

// Philox4x32-10: four random words from a counter and a key, without state. Source: Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.
CUDA_INT4_EXPORT std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                                    std::array<uint32_t, 2> key);

}  // namespace cuda_int4
