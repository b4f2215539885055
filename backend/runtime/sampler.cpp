#include "sampler.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>

#include "../kernels/cpu/numeric.h"

namespace cuda_int4 {
namespace {

constexpr int kWeightBits = 40;
constexpr double kMinExponent = -27.5;  // weights below 2^-40 * e^0.2 count as 0: 40 ln 2 = 27.73
constexpr int64_t kMaxVocab = int64_t{1} << 23;  // keeps the sum of weights inside 64 bits

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

constexpr double kInverseFactorials[14] = {1.0,
                                           1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800};

// 2^40 * e^exponent, rounded down; 0 for what is not above kMinExponent. exponent <= 0.
// Not libm's exp, which differs from platform to platform. Taylor's series to the 13th power is 7e-14
// off where it is worst: the weight is off by one at most.
uint64_t weight_of(double exponent) {
  if (!(exponent > kMinExponent)) return 0;
  constexpr double kLn2 = 0.6931471805599453;
  const int halvings = static_cast<int>(exponent * (-1 / kLn2));       // 0..39
  const double x = exponent + halvings * kLn2;                         // -ln 2 .. 0
  double even = kInverseFactorials[12], odd = kInverseFactorials[13];  // two chains run abreast
  for (int n = 10; n >= 0; n -= 2) {
    even = even * (x * x) + kInverseFactorials[n];
    odd = odd * (x * x) + kInverseFactorials[n + 1];
  }
  const double sum = even + x * odd;
  return static_cast<uint64_t>(
      static_cast<int64_t>(sum * static_cast<double>(int64_t{1} << (kWeightBits - halvings))));
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
  return {};
}

Status Sampler::sample(const TensorView& logits, int64_t position, int64_t* token) {
  int64_t n = 0;
  const Status status = check_logits(logits, &n);
  if (!status.ok()) return status;
  if (config_.temperature == 0) {
    const int64_t likeliest = greatest(logits, n);
    if (likeliest >= 0) {
      *token = likeliest;
      return {};
    }
  }
  copy_as_float(logits, n, &logits_);  // to draw from, or to say what is wrong with them
  size_t best = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (std::isnan(logits_[i]) || logits_[i] == std::numeric_limits<float>::infinity()) {
      return invalid("sample: the model gave %s as the logit of token %zu at position %" PRId64
                     ": no token can be chosen from that; check the weights, or use a wider dtype",
                     std::isnan(logits_[i]) ? "NaN" : "+inf", i, position);
    }
    if (logits_[i] > logits_[best]) best = i;
  }
  if (std::isinf(logits_[best])) {
    return invalid("sample: every logit at position %" PRId64 " is -inf: no token can be chosen",
                   position);
  }
  max_logit_ = logits_[best];
  *token = draw(position);
  return {};
}

template <typename Measure>
Sampler::Candidate Sampler::least_kept(uint64_t wanted, const Measure& measure) {
  // Buckets by likelihood instead of a sort of all: top-p at a high temperature keeps tens of
  // thousands, and took 35 ms a token with a heap.
  const auto bucket_of = [this](size_t i) {
    const int bucket = static_cast<int>(exponent(i) * (kBuckets / kMinExponent));
    return static_cast<size_t>(std::min(bucket, kBuckets - 1));
  };
  sums_.fill(0);
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (const uint64_t m = measure(i)) sums_[bucket_of(i)] += m;
  }
  int last = 0;  // the bucket in which the sum reaches `wanted`
  uint64_t sum = 0;
  while (last < kBuckets && sum + sums_[last] < wanted) sum += sums_[last++];
  if (last == kBuckets) return {-std::numeric_limits<float>::infinity(), UINT32_MAX};

  candidates_.clear();
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (measure(i) > 0 && bucket_of(i) == static_cast<size_t>(last)) {
      candidates_.push_back({logits_[i], static_cast<uint32_t>(i)});
    }
  }
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return less_likely(b, a); });
  size_t n = 0;
  while (sum < wanted) sum += measure(candidates_[n++].index);
  return candidates_[n - 1];
}

int64_t Sampler::draw(int64_t position) {
  candidates_.reserve(logits_.size());
  weights_.resize(logits_.size());
  Candidate least = {-std::numeric_limits<float>::infinity(), UINT32_MAX};
  const auto is_kept = [&](size_t i) {
    return !less_likely({logits_[i], static_cast<uint32_t>(i)}, least);
  };
  if (config_.top_k > 0) {
    least = least_kept(static_cast<uint64_t>(config_.top_k), [this](size_t i) {
      return static_cast<uint64_t>(exponent(i) > kMinExponent);
    });
  }
  uint64_t total = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    weights_[i] = is_kept(i) ? weight_of(exponent(i)) : 0;
    total += weights_[i];
  }
  if (config_.top_p < 1) {
    const auto wanted =
        static_cast<uint64_t>(std::ceil(config_.top_p * static_cast<double>(total)));
    least = least_kept(wanted, [this](size_t i) { return weights_[i]; });
    total = 0;
    for (size_t i = 0; i < logits_.size(); ++i) {
      if (!is_kept(i)) weights_[i] = 0;
      total += weights_[i];
    }
  }

  const auto words =
      philox4x32({static_cast<uint32_t>(position),
                  static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32), 0, 0},
                 {static_cast<uint32_t>(config_.seed), static_cast<uint32_t>(config_.seed >> 32)});
  const uint64_t random = (static_cast<uint64_t>(words[1]) << 32) | words[0];
  // random / 2^64 * total, without losing bits: 0 <= threshold < total.
  auto threshold = static_cast<uint64_t>((static_cast<unsigned __int128>(random) * total) >> 64);
  size_t i = 0;
  while (threshold >= weights_[i]) threshold -= weights_[i++];
  return static_cast<int64_t>(i);
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

}  // namespace cuda_int4
