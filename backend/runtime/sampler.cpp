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
// Below this many natural units under the maximum a weight is 0: 40 * ln 2 = 27.73.
constexpr double kMinExponent = -27.75;
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

Status copy_as_float(const TensorView& logits, std::vector<float>* out) {
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
  out->resize(static_cast<size_t>(n));
  if (is_float32) {
    convert_to_float<float>(logits.data, out);
  } else if (logits.dtype == DType::kFloat16) {
    convert_to_float<cpu::Half>(logits.data, out);
  } else {
    convert_to_float<cpu::BFloat>(logits.data, out);
  }
  return {};
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
  const Status status = copy_as_float(logits, &logits_);
  if (!status.ok()) return status;
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
  *token = config_.temperature == 0 ? static_cast<int64_t>(best) : draw(logits_[best], position);
  return {};
}

int64_t Sampler::draw(float max_logit, int64_t position) {
  candidates_.reserve(logits_.size());
  candidates_.clear();
  const double max_value = max_logit;
  for (size_t i = 0; i < logits_.size(); ++i) {
    const double exponent = (logits_[i] - max_value) / config_.temperature;
    if (!(exponent > kMinExponent)) continue;
    const double weight = std::ldexp(std::exp(exponent), kWeightBits);
    candidates_.push_back({logits_[i], static_cast<uint32_t>(i), static_cast<uint64_t>(weight)});
  }
  const auto likelier = [](const Candidate& a, const Candidate& b) { return less_likely(b, a); };
  if (config_.top_k > 0 && static_cast<uint64_t>(config_.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + (config_.top_k - 1),
                     candidates_.end(), likelier);
    candidates_.resize(static_cast<size_t>(config_.top_k));
    // Which k are left is certain, their order is not: walk them by index, as if never filtered.
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
  }
  if (config_.top_p < 1) keep_top_p();

  uint64_t total = 0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const auto words =
      philox4x32({static_cast<uint32_t>(position),
                  static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32), 0, 0},
                 {static_cast<uint32_t>(config_.seed), static_cast<uint32_t>(config_.seed >> 32)});
  const uint64_t random = (static_cast<uint64_t>(words[1]) << 32) | words[0];
  // random / 2^64 * total, without losing bits: 0 <= threshold < total.
  uint64_t threshold =
      static_cast<uint64_t>((static_cast<unsigned __int128>(random) * total) >> 64);
  for (const Candidate& candidate : candidates_) {
    if (threshold < candidate.weight) return candidate.index;
    threshold -= candidate.weight;
  }
  return candidates_.back().index;  // not reached: threshold < total
}

void Sampler::keep_top_p() {
  uint64_t total = 0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double wanted = config_.top_p * static_cast<double>(total);
  // A heap and not a sort: the kept set is small as a rule. Its members gather at the back, the
  // likeliest last.
  std::make_heap(candidates_.begin(), candidates_.end(), less_likely);
  auto heap_end = candidates_.end();
  uint64_t kept = 0;
  while (heap_end != candidates_.begin() && static_cast<double>(kept) < wanted) {
    std::pop_heap(candidates_.begin(), heap_end, less_likely);
    --heap_end;
    kept += heap_end->weight;
  }
  candidates_.erase(candidates_.begin(), heap_end);
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
