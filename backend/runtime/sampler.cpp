#include "sampler.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>

#include "../kernels/cpu/numeric.h"

namespace cuda_int4 {
namespace {

template <typename... Args>
Status invalid(const char* format, Args... args) {
  Status status;
  status.code = StatusCode::kInvalidArgument;
  std::snprintf(status.message, sizeof(status.message), format, args...);
  return status;
}

template <typename T>
void convert_to_float(const void* data, std::vector<float>* out) {
  const T* values = static_cast<const T*>(data);
  for (size_t i = 0; i < out->size(); ++i) (*out)[i] = cpu::to_float(values[i]);
}

/// The bits of a float as an integer of the same order: -0 is 0, and what is no number lies above
/// +inf or below -inf.
template <typename Int>
Int ordered(Int bits) {
  const Int magnitude = std::numeric_limits<Int>::max();
  const auto key = Int(bits ^ ((bits >> (8 * sizeof(Int) - 1)) & magnitude));
  return Int(key + (key == Int(-1)));
}

/// The first of the greatest logits, by their bits: 128k of bf16 in 11 us, one by one as floats in 76.
/// -1 where one is NaN or +inf, or all are -inf.
template <typename Int>
int64_t greatest(const void* data, int64_t n, Int infinity) {
  constexpr int64_t kBlock = 4096;
  const Int* bits = static_cast<const Int*>(data);
  Int greatest = std::numeric_limits<Int>::min(), least = std::numeric_limits<Int>::max();
  int64_t begin = 0;  // of the block that holds it
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t end = std::min(n, at + kBlock);
    Int high = std::numeric_limits<Int>::min();
    for (int64_t i = at; i < end; ++i) {
      const Int key = ordered(bits[i]);
      high = std::max(high, key);
      least = std::min(least, key);
    }
    if (high > greatest) {
      greatest = high;
      begin = at;
    }
  }
  const auto negative_infinity = Int(-infinity - 1);
  if (greatest >= infinity || greatest <= negative_infinity || least < negative_infinity) return -1;
  while (ordered(bits[begin]) != greatest) ++begin;
  return begin;
}

int64_t greatest(const TensorView& logits, int64_t n) {
  switch (logits.dtype) {
    case DType::kFloat32:
      return greatest<int32_t>(logits.data, n, 0x7f800000);
    case DType::kFloat16:
      return greatest<int16_t>(logits.data, n, 0x7c00);
    default:
      return greatest<int16_t>(logits.data, n, 0x7f80);
  }
}

Status check_logits(const TensorView& logits, int64_t* n_logits) {
  if (!logits.present()) return invalid("sample: expected logits, got no tensor");
  int64_t n = 1;
  for (int i = 0; i < logits.ndim; ++i) {
    const int64_t size = logits.sizes[i];
    if (size < 1 || size > kMaxVocab / n) {
      return invalid("sample: expected 1 to %" PRId64 " logits, got %" PRId64 " times %" PRId64,
                     kMaxVocab, n, size);
    }
    n *= size;
  }
  const bool is_float32 = logits.dtype == DType::kFloat32;
  const uint64_t expected_nbytes = static_cast<uint64_t>(n) * (is_float32 ? 4 : 2);
  if (!is_float32 && logits.dtype != DType::kFloat16 && logits.dtype != DType::kBFloat16) {
    return invalid("sample: expected logits in float16, bfloat16 or float32, got dtype %d",
                   static_cast<int>(logits.dtype));
  }
  if (logits.data == nullptr || logits.nbytes < expected_nbytes) {
    return invalid("sample: expected %" PRIu64 " bytes of logits, got %" PRIu64, expected_nbytes,
                   logits.nbytes);
  }
  *n_logits = n;
  return {};
}

void copy_as_float(const TensorView& logits, int64_t n, std::vector<float>* out) {
  out->resize(static_cast<size_t>(n));
  if (logits.dtype == DType::kFloat32) {
    convert_to_float<float>(logits.data, out);
  } else if (logits.dtype == DType::kFloat16) {
    convert_to_float<cpu::Half>(logits.data, out);
  } else {
    convert_to_float<cpu::BFloat>(logits.data, out);
  }
}

}  // namespace

Status validate_sampler_config(const SamplerConfig& config) {
  if (!(config.temperature >= 0) || std::isinf(config.temperature)) {
    return invalid("temperature: expected a finite number >= 0 (0 is greedy), got %g",
                   config.temperature);
  }
  if (!(config.top_p > 0 && config.top_p <= 1)) {
    return invalid("top_p: expected 0 < top_p <= 1 (1 is off), got %g", config.top_p);
  }
  if (!(config.min_p >= 0 && config.min_p <= 1)) {
    return invalid("min_p: expected 0 <= min_p <= 1 (0 is off), got %g", config.min_p);
  }
  return {};
}

SampleRule sample_rule(const SamplerConfig& config) {
  constexpr double kLog2E = 1.4426950408889634;
  SampleRule rule = {};
  if (config.temperature > 0) {
    // At most: 0 times it is 0, so that the likeliest tokens stay so under any temperature.
    rule.scale = std::min(kLog2E * (1 << kDecayBits) / config.temperature,
                          std::numeric_limits<double>::max());
    // At least: a temperature that takes all differences away is no greedy one.
    rule.scale = std::max(rule.scale, std::numeric_limits<double>::min());
  }
  rule.top_k = config.top_k;
  rule.top_p = config.top_p;
  rule.min_weight = static_cast<uint64_t>(
      std::ceil(config.min_p * static_cast<double>(int64_t{1} << kWeightBits)));
  rule.seed = config.seed;
  rule.sequence = config.sequence;
  return rule;
}

Status sample_error(SampleStatus status, int64_t token, int64_t position) {
  if (status == SampleStatus::kNoToken) {
    return invalid("sample: every logit at position %" PRId64 " is -inf: no token can be chosen",
                   position);
  }
  return invalid("sample: the model gave %s as the logit of token %" PRId64 " at position %" PRId64
                 ": no token can be chosen from that; check the weights, or use a wider dtype",
                 status == SampleStatus::kNan ? "NaN" : "+inf", token, position);
}

Status Sampler::sample(const TensorView& logits, int64_t position, int64_t* token) {
  int64_t n = 0;
  const Status status = check_logits(logits, &n);
  if (!status.ok()) return status;
  int64_t chosen = 0;
  const SampleStatus sampled = choose(logits, position, &chosen);
  if (sampled != SampleStatus::kSampled) return sample_error(sampled, chosen, position);
  *token = chosen;
  return {};
}

SampleStatus Sampler::choose(const TensorView& logits, int64_t position, int64_t* token) {
  int64_t n = 1;
  for (int i = 0; i < logits.ndim; ++i) n *= logits.sizes[i];
  if (rule_.scale == 0) {
    *token = greatest(logits, n);
    if (*token >= 0) return SampleStatus::kSampled;
  }
  copy_as_float(logits, n, &logits_);  // to draw from, or to find what is wrong with them
  greatest_ = logits_[0];
  for (size_t i = 0; i < logits_.size(); ++i) {
    *token = static_cast<int64_t>(i);
    if (std::isnan(logits_[i])) return SampleStatus::kNan;
    if (logits_[i] == std::numeric_limits<float>::infinity()) return SampleStatus::kInfinity;
    greatest_ = std::max(greatest_, logits_[i]);
  }
  *token = 0;
  if (std::isinf(greatest_)) return SampleStatus::kNoToken;
  *token = draw(position);
  return SampleStatus::kSampled;
}

void sample_rows(const SampleArgs& args, std::vector<Sampler>* samplers) {
  const bool is_float32 = static_cast<DType>(args.dtype) == DType::kFloat32;
  for (int64_t row = 0; row < args.n_rows; ++row) {
    TensorView logits = {};
    logits.data = static_cast<char*>(const_cast<void*>(args.logits)) +
                  row * args.row_stride * (is_float32 ? 4 : 2);
    logits.dtype = static_cast<DType>(args.dtype);
    logits.ndim = 1;
    logits.sizes[0] = args.vocab_size;
    logits.strides[0] = 1;
    SampleRow& state = args.rows[row];
    const int64_t next = args.positions[row] + 1;
    int64_t token = 0;
    const SampleStatus status = (*samplers)[static_cast<size_t>(row)].choose(logits, next, &token);
    if (status == SampleStatus::kSampled && next < state.end_position) {
      args.tokens[row] = token;
      args.positions[row] = next;
    }
    const uint64_t slot = state.step++ % static_cast<uint64_t>(args.n_slots);
    args.words[slot * static_cast<uint64_t>(args.n_rows) + static_cast<uint64_t>(row)] =
        sample_word(static_cast<uint32_t>(token), status, state.step);
  }
}

template <typename Measure>
Sampler::Bound Sampler::least_kept(uint64_t wanted, const Measure& measure) {
  // Buckets by likelihood instead of a sort of all: top-p at a high temperature keeps tens of
  // thousands, and took 35 ms a token with a heap.
  sums_.fill(0);
  for (size_t i = 0; i < decays_.size(); ++i) {
    if (const uint64_t m = measure(i)) sums_[decays_[i] >> kBucketShift] += m;
  }
  size_t last = 0;  // the bucket in which the sum reaches `wanted`
  uint64_t sum = 0;
  while (last < sums_.size() && sum + sums_[last] < wanted) sum += sums_[last++];
  if (last == sums_.size()) return {kMaxDecay, UINT32_MAX};

  candidates_.clear();
  for (size_t i = 0; i < decays_.size(); ++i) {
    if (decays_[i] >> kBucketShift == last && measure(i) > 0) {
      candidates_.push_back(static_cast<uint32_t>(i));
    }
  }
  std::sort(candidates_.begin(), candidates_.end(), [this](uint32_t a, uint32_t b) {
    return decays_[a] != decays_[b] ? decays_[a] < decays_[b] : a < b;
  });
  size_t n = 0;
  while (sum < wanted) sum += measure(candidates_[n++]);
  return {decays_[candidates_[n - 1]], candidates_[n - 1]};
}

int64_t Sampler::draw(int64_t position) {
  candidates_.reserve(logits_.size());
  decays_.resize(logits_.size());
  weights_.resize(logits_.size());
  for (size_t i = 0; i < logits_.size(); ++i) {
    decays_[i] = decay_of(logits_[i], greatest_, rule_.scale);
  }
  Bound least = {kMaxDecay, UINT32_MAX};
  if (rule_.top_k > 0) {
    least = least_kept(static_cast<uint64_t>(rule_.top_k),
                       [this](size_t i) { return uint64_t{decays_[i] < kMaxDecay}; });
  }
  uint64_t total = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    weights_[i] = least.keeps(decays_[i], i) ? weight_of(decays_[i]) : 0;
    total += weights_[i];
  }
  if (rule_.top_p < 1) {
    const auto wanted = static_cast<uint64_t>(std::ceil(rule_.top_p * static_cast<double>(total)));
    least = least_kept(wanted, [this](size_t i) { return weights_[i]; });
  }
  total = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (!least.keeps(decays_[i], i) || weights_[i] < rule_.min_weight) weights_[i] = 0;
    total += weights_[i];
  }

  // random / 2^64 * total, without losing bits: 0 <= threshold < total.
  const uint64_t random = random_bits(rule_.seed, rule_.sequence, static_cast<uint64_t>(position));
  auto threshold = static_cast<uint64_t>((static_cast<unsigned __int128>(random) * total) >> 64);
  size_t i = 0;
  while (threshold >= weights_[i]) threshold -= weights_[i++];
  return static_cast<int64_t>(i);
}

}  // namespace cuda_int4
