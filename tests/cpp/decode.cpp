// decode PATH PROMPT N: the public Decoder, with a language model whose context holds 64 tokens and
// whose forward takes 16. Prints the N greedy tokens after the prompt (ids with commas between).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/c_api.h"
#include "runtime/decoder.h"
#include "runtime/model.h"
#include "runtime/report.h"
#include "runtime/sampler.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {

std::vector<int64_t> parse(const char* text) {
  std::vector<int64_t> tokens;
  for (char* end; *text != '\0'; text = *end == ',' ? end + 1 : end) {
    tokens.push_back(std::strtoll(text, &end, 10));
  }
  return tokens;
}

struct Result {
  Error error;
  std::vector<int64_t> tokens;
  GenerateStats stats;
};

// Stops the generation after `limit` tokens, by the callback; 0: never.
Result generate(Decoder& decoder, const std::vector<int64_t>& prompt, const GenerateConfig& config,
                size_t limit = 0) {
  Result result;
  GenerateCallbacks callbacks;
  callbacks.on_token = [&](int64_t token) {
    result.tokens.push_back(token);
    return limit == 0 || result.tokens.size() < limit;
  };
  result.error = decoder.generate(prompt.data(), static_cast<int64_t>(prompt.size()), config,
                                  callbacks, &result.stats);
  return result;
}

bool reason_has(const char* words) {
  const std::string reason = cuda_int4_last_error();
  if (reason.find(words) != std::string::npos) return true;
  std::fprintf(stderr, "expected '%s' in: %s\n", words, reason.c_str());
  return false;
}

void check_conversation(Decoder& decoder, const std::vector<int64_t>& prompt,
                        const std::vector<int64_t>& expected) {
  GenerateConfig config;
  config.max_new_tokens = static_cast<int64_t>(expected.size());
  const auto n_prompt = static_cast<int64_t>(prompt.size());

  // In two halves: the last token of the first is the first of the second's prompt.
  config.max_new_tokens = 3;
  CHECK(decoder.reset() == Error::Ok && decoder.position() == 0);
  Result half = generate(decoder, prompt, config);
  CHECK(decoder.position() == n_prompt + 2);
  config.max_new_tokens = static_cast<int64_t>(expected.size()) - 3;
  const Result rest = generate(decoder, {half.tokens.back()}, config);
  half.tokens.insert(half.tokens.end(), rest.tokens.begin(), rest.tokens.end());
  CHECK(half.tokens == expected);

  // Back to the end of the prompt: the same tokens again.
  CHECK(decoder.seek(n_prompt - 1) == Error::Ok);
  config.max_new_tokens = static_cast<int64_t>(expected.size());
  CHECK(generate(decoder, {prompt.back()}, config).tokens == expected);

  // Ended by the callback, and by a callback in prefill.
  CHECK(decoder.reset() == Error::Ok);
  const Result cut = generate(decoder, prompt, config, 2);
  CHECK(cut.error == Error::Ok && cut.tokens.size() == 2);
  CHECK(cut.stats.stop_reason == StopReason::kInterrupted && cut.stats.new_tokens == 2);
  CHECK(decoder.reset() == Error::Ok);
  GenerateCallbacks callbacks;
  callbacks.on_prefill = [](int64_t n_read) { return n_read < 2; };
  GenerateStats stats;
  config.prefill_chunk = 1;
  CHECK(decoder.generate(prompt.data(), n_prompt, config, callbacks, &stats) == Error::Ok);
  CHECK(stats.stop_reason == StopReason::kInterrupted && stats.prompt_tokens == 2);
  CHECK(stats.new_tokens == 0 && stats.time_to_first_token_s == 0 && decoder.position() == 2);
}

void check_refusals(Decoder& decoder, const std::vector<int64_t>& prompt) {
  GenerateConfig config;
  CHECK(decoder.reset() == Error::Ok);
  CHECK(generate(decoder, {}, config).error == Error::InvalidArgument);
  CHECK(reason_has("at least one token"));
  CHECK(generate(decoder, std::vector<int64_t>(65, 1), config).error == Error::InvalidArgument);
  CHECK(reason_has("65 tokens, the context holds 64"));
  CHECK(generate(decoder, {-1}, config).error == Error::InvalidArgument);
  CHECK(decoder.seek(65) == Error::InvalidArgument && decoder.seek(-1) == Error::InvalidArgument);
  config.sampler.top_p = 2;
  CHECK(generate(decoder, prompt, config).error == Error::InvalidArgument);
  CHECK(reason_has("top_p"));
  CHECK(decoder.position() == 0);  // a refusal moves nothing
}

void check_philox() {  // the known answers of the paper's own tests
  struct Case {
    uint32_t counter[4], key[2], expected[4];
  };
  const uint32_t ones = 0xFFFFFFFF;
  Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
      {{ones, ones, ones, ones}, {ones, ones}, {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
      {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
       {0xA4093822, 0x299F31D0},
       {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}};
  for (Case& one : cases) {
    philox4x32(one.counter, one.key[0], one.key[1]);
    CHECK(std::equal(one.counter, one.counter + 4, one.expected));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::unique_ptr<Model> model;
  std::unique_ptr<Decoder> decoder;
  if (Model::open(argv[1], nullptr, "cpu", true, &model) != Error::Ok ||
      Decoder::create(*model, &decoder) != Error::Ok) {
    std::fprintf(stderr, "%s\n", cuda_int4_last_error());
    return 1;
  }
  CHECK(decoder->info().max_context_len == 64 && decoder->info().max_seq_len == 16);

  const std::vector<int64_t> prompt = parse(argv[2]);
  GenerateConfig config;
  config.max_new_tokens = std::atoll(argv[3]);
  const Result result = generate(*decoder, prompt, config);
  CHECK(result.error == Error::Ok && result.stats.stop_reason == StopReason::kMaxNewTokens);
  for (const int64_t token : result.tokens) std::printf("%lld ", static_cast<long long>(token));
  std::printf("\n");
  CHECK(std::string(stop_reason_name(StopReason::kEndOfContext)) == "end_of_context");

  check_conversation(*decoder, prompt, result.tokens);
  check_refusals(*decoder, prompt);
  check_philox();
  return failures();
}
