// Sampler -- one row of logits to one token: greedy, or drawn after temperature, top-k, top-p and min-p.
//
// Knows tensors (kernels/tensor_view.h) and nothing of models. What a draw depends on: the logits,
// the configuration and `position`, and nothing else -- not on what was drawn before, nor in which
// batch. Likelihoods are integers (kernels/sampling.h), so that a seed gives the same tokens on every
// platform and device.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../kernels/sampling.h"
#include "../kernels/tensor_view.h"
#include "visibility.h"

namespace cuda_int4 {

// Filters apply in the order of the fields, each to what the one before it left.
struct SamplerConfig {
  double temperature = 0;  // 0: greedy, the filters are moot; else logits are divided by it
  int64_t top_k = 0;       // > 0: only the k likeliest tokens; of equally likely the lower indices
  double top_p = 1;        // < 1: the smallest set of likeliest tokens that hold this probability
  double min_p = 0;        // > 0: only tokens at least this times as likely as the likeliest
  uint64_t seed = 0;
  uint64_t sequence = 0;  // draws of one seed are independent from one number to another
};

// Says which field is out of range, and its range.
CUDA_INT4_EXPORT Status validate_sampler_config(const SamplerConfig& config);
// The same for kernels; of a valid configuration.
SampleRule sample_rule(const SamplerConfig& config);
// What is wrong with logits at `position` that gave `status`, not kSampled, at `token`.
Status sample_error(SampleStatus status, int64_t token, int64_t position);

class Sampler;
// What the kernel of a decode loop on the device does, on the CPU; samplers: one for each row.
void sample_rows(const SampleArgs& args, std::vector<Sampler>* samplers);

class CUDA_INT4_EXPORT Sampler {
 public:
  // `config` has passed validate_sampler_config.
  explicit Sampler(const SamplerConfig& config) : rule_(sample_rule(config)) {}
  explicit Sampler(const SampleRule& rule) : rule_(rule) {}

  // logits: contiguous float16 | bfloat16 | float32, at least one value; -inf excludes a token.
  // position: the token's place in the conversation, the counter of the random number generator.
  // An error, and *token untouched: a NaN or +inf, all of them -inf, another dtype.
  // Allocates on the first call for a vocabulary size, never again.
  Status sample(const TensorView& logits, int64_t position, int64_t* token);
  // The same of logits that have passed its checks of them as a tensor. For another status than
  // kSampled *token is the first that is wrong.
  SampleStatus choose(const TensorView& logits, int64_t position, int64_t* token);

 private:
  // The least likely token that is kept.
  struct Bound {
    uint32_t decay, index;
    bool keeps(uint32_t other_decay, size_t i) const {
      return other_decay < decay || (other_decay == decay && i <= index);
    }
  };

  // The bound behind which the sum of measure(i), going from the likeliest token on, has reached
  // `wanted`; that of all tokens if it does not.
  template <typename Measure>
  Bound least_kept(uint64_t wanted, const Measure& measure);
  // The draw among all but greedily.
  int64_t draw(int64_t position);

  static constexpr int kBucketShift = 18;  // of a decay
  static constexpr int kBuckets = kMaxDecay >> kBucketShift;

  SampleRule rule_;
  float greatest_ = 0;
  std::vector<float> logits_;
  std::vector<uint32_t> decays_;
  std::vector<uint64_t> weights_;        // 0 where filtered out
  std::array<uint64_t, kBuckets> sums_;  // of measure over tokens of nearly one likelihood
  std::vector<uint32_t> candidates_;     // the tokens of one bucket
};

}  // namespace cuda_int4
