// The decode loop's part of c_api.h: structs of C to and from decoder.h and sampler.h.
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <cstdio>

#include "../kernels/cuda/cuda_kernels.h"
#include "c_api_internal.h"
#include "decoder.h"
#include "report.h"
#include "sampler.h"
#include "threads.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {

SamplerConfig sampler_config(const cuda_int4_generate_config& config) {
  return {config.temperature, config.top_k, config.top_p,
          config.min_p,       config.seed,  config.sequence};
}

Error create_decoder(cuda_int4_model* model, std::unique_ptr<Decoder>* decoder) {
  if (model == nullptr) return fail(Error::InvalidArgument, "decode: model is nullptr");
  return Decoder::create(*model->model, decoder);
}

void copy_stats(const GenerateStats& from, const Model& model, cuda_int4_generate_stats* to) {
  to->load_s = model.load_seconds();
  to->prefill_s = from.prefill_s;
  to->decode_s = from.decode_s;
  to->time_to_first_token_s = from.time_to_first_token_s;
  to->prompt_tokens = from.prompt_tokens;
  to->new_tokens = from.new_tokens;
  to->peak_memory_bytes = peak_memory_bytes();
  to->peak_device_memory_bytes = from.peak_device_memory_bytes;
  to->stop_reason = int32_t(from.stop_reason);
  to->n_sequences = from.n_sequences;
}

bool is_complete(const int64_t* prompt, uint64_t n_prompt,
                 const cuda_int4_generate_config& config) {
  return (prompt != nullptr || n_prompt == 0) &&
         (config.stop_tokens != nullptr || config.n_stop_tokens == 0);
}

GenerateRequest request_of(const int64_t* prompt, uint64_t n_prompt,
                           const cuda_int4_generate_config& config,
                           cuda_int4_token_callback callback, void* user) {
  GenerateRequest request;
  request.prompt = prompt;
  request.n_prompt = int64_t(n_prompt);
  request.config.sampler = sampler_config(config);
  request.config.max_new_tokens = config.max_new_tokens;
  request.config.prefill_chunk = config.prefill_chunk;
  if (config.n_stop_tokens > 0)
    request.config.stop_tokens.assign(config.stop_tokens,
                                      config.stop_tokens + config.n_stop_tokens);
  if (callback != nullptr)
    request.callbacks.on_token = [=](int64_t token) { return callback(token, user) == 0; };
  if (const auto on_prefill = config.on_prefill)
    request.callbacks.on_prefill = [=](int64_t n_read) { return on_prefill(n_read, user) == 0; };
  return request;
}

}  // namespace

int32_t cuda_int4_set_num_threads(uint32_t n_threads) {
  return guarded([&] { return set_num_threads(n_threads); });
}

void cuda_int4_keep_log_quiet(void) {
  using executorch::runtime::PalImpl;
  const auto emit = [](et_timestamp_t, et_pal_log_level_t level, const char* file, const char*,
                       size_t line, const char* message, size_t length) {
    if (level != kFatal) return;
    std::fprintf(stderr, "%s:%zu: %.*s\n", file, line, static_cast<int>(length), message);
  };
  executorch::runtime::register_pal(PalImpl::create(emit, __FILE__));
}

int32_t cuda_int4_sample(const TensorView* logits, const cuda_int4_generate_config* config,
                         int64_t position, int64_t* token) {
  return guarded([&]() -> Error {
    if (logits == nullptr || config == nullptr || token == nullptr)
      return fail(Error::InvalidArgument, "sample: an argument is nullptr");
    const SamplerConfig sampling = sampler_config(*config);
    const Error invalid = fail(validate_sampler_config(sampling));
    if (invalid != Error::Ok) return invalid;
    return fail(Sampler(sampling).sample(*logits, position, token));
  });
}

int32_t cuda_int4_sample_rule(const cuda_int4_generate_config* config, SampleRule* rule) {
  return guarded([&]() -> Error {
    if (config == nullptr || rule == nullptr)
      return fail(Error::InvalidArgument, "sample: an argument is nullptr");
    const SamplerConfig sampling = sampler_config(*config);
    const Error invalid = fail(validate_sampler_config(sampling));
    if (invalid == Error::Ok) *rule = sample_rule(sampling);
    return invalid;
  });
}

int32_t cuda_int4_sample_rows(const SampleArgs* args, void* stream) {
  return guarded([&]() -> Error {
    if (args == nullptr) return fail(Error::InvalidArgument, "sample: args is nullptr");
    if (cuda_kernels() == nullptr)
      return fail(Error::NotSupported, "sample: this library was built without CUDA kernels");
    if (args->n_rows < 0 || args->n_rows > INT32_MAX / 8 || args->vocab_size < 1 ||
        args->vocab_size > kMaxVocab || args->row_stride < args->vocab_size || args->n_slots < 1)
      return fail(
          Error::InvalidArgument,
          "sample: expected 0 to %d rows of 1 to %lld logits, row_stride at least as many, and a "
          "slot or more, got %lld rows of %lld, row_stride %lld, %lld slots; fix the call",
          INT32_MAX / 8, static_cast<long long>(kMaxVocab), static_cast<long long>(args->n_rows),
          static_cast<long long>(args->vocab_size), static_cast<long long>(args->row_stride),
          static_cast<long long>(args->n_slots));
    if (args->n_rows > 0 &&
        (args->logits == nullptr || args->rows == nullptr || args->tokens == nullptr ||
         args->positions == nullptr || args->words == nullptr))
      return fail(Error::InvalidArgument,
                  "sample: expected memory in logits, rows, tokens, positions and words, got "
                  "nullptr; pass all five");
    ExecutionContext context = {};
    context.device = DeviceKind::kCuda;
    context.stream = stream;
    return fail(cuda_kernels()->sample(*args, context));
  });
}

int32_t cuda_int4_model_decode_info(cuda_int4_model* model, cuda_int4_decode_info* out) {
  return guarded([&]() -> Error {
    if (out == nullptr) return fail(Error::InvalidArgument, "decode: out is nullptr");
    std::unique_ptr<Decoder> decoder;
    const Error error = create_decoder(model, &decoder);
    if (error != Error::Ok) return error;
    const DecodeInfo& info = decoder->info();
    constexpr size_t kMaxEosIds = sizeof(out->eos_ids) / sizeof(out->eos_ids[0]);
    if (info.eos_ids.size() > kMaxEosIds) {
      return fail(Error::NotSupported, "get_eos_ids: expected at most %zu ids, got %zu", kMaxEosIds,
                  info.eos_ids.size());
    }
    *out = {info.max_context_len,
            info.max_seq_len,
            info.vocab_size,
            info.bos_id,
            info.max_sequences,
            info.eos_ids.size(),
            {0}};
    std::copy(info.eos_ids.begin(), info.eos_ids.end(), out->eos_ids);
    return Error::Ok;
  });
}

int32_t cuda_int4_generate(cuda_int4_model* model, const int64_t* prompt, uint64_t n_prompt,
                           int64_t start_pos, const cuda_int4_generate_config* config,
                           cuda_int4_token_callback callback, void* user,
                           cuda_int4_generate_stats* stats) {
  return guarded([&]() -> Error {
    if (stats != nullptr) *stats = {};
    if (config == nullptr || !is_complete(prompt, n_prompt, *config))
      return fail(Error::InvalidArgument, "decode: prompt, config or stop_tokens is nullptr");
    std::unique_ptr<Decoder> decoder;
    Error error = create_decoder(model, &decoder);
    if (error == Error::Ok) error = start_pos == 0 ? decoder->reset() : decoder->seek(start_pos);
    if (error != Error::Ok) return error;
    const GenerateRequest request = request_of(prompt, n_prompt, *config, callback, user);
    GenerateStats result;
    error = decoder->generate(request.prompt, request.n_prompt, request.config, request.callbacks,
                              &result);
    if (stats != nullptr) copy_stats(result, *model->model, stats);
    return error;
  });
}

int32_t cuda_int4_generate_several(cuda_int4_model* model, cuda_int4_generate_request* requests,
                                   uint64_t n_requests, cuda_int4_generate_stats* total) {
  return guarded([&]() -> Error {
    if (total != nullptr) *total = {};
    if (requests == nullptr && n_requests > 0)
      return fail(Error::InvalidArgument, "decode: requests is nullptr");
    std::vector<GenerateRequest> all;
    bool go_on = n_requests > 0;
    for (uint64_t i = 0; i < n_requests; ++i) {
      cuda_int4_generate_request& one = requests[i];
      one.stats = {};
      if (!is_complete(one.prompt, one.n_prompt, one.config))
        return fail(Error::InvalidArgument,
                    "decode: prompt or stop_tokens of number %llu is nullptr",
                    static_cast<unsigned long long>(i));
      go_on = go_on && one.start_pos != 0;
      all.push_back(request_of(one.prompt, one.n_prompt, one.config, one.callback, one.user));
    }
    std::unique_ptr<Decoder> decoder;
    Error error = create_decoder(model, &decoder);
    if (error == Error::Ok && !go_on) error = decoder->reset();
    for (uint64_t i = 0; error == Error::Ok && i < n_requests; ++i) {
      if (go_on) error = decoder->seek(requests[i].start_pos, i);
      if (!go_on && requests[i].start_pos != 0)
        error =
            fail(Error::InvalidArgument,
                 "decode: expected start_pos 0 of all conversations, or of none, got %lld of "
                 "number %llu; begin those that are new on their own",
                 static_cast<long long>(requests[i].start_pos), static_cast<unsigned long long>(i));
    }
    if (error != Error::Ok) return error;
    std::vector<GenerateStats> stats(all.size());
    GenerateStats sum;
    error = decoder->generate(all.data(), all.size(), stats.data(), &sum);
    for (size_t i = 0; i < all.size(); ++i) copy_stats(stats[i], *model->model, &requests[i].stats);
    if (total != nullptr) copy_stats(sum, *model->model, total);
    return error;
  });
}
