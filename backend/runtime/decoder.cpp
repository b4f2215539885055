#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <initializer_list>
#include <numeric>

#include "errors.h"
#include "tensor_bridge.h"

namespace cuda_int4 {

using executorch::runtime::Error;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

bool contains(const std::vector<int64_t>& values, int64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

bool is_logits_dtype(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32;
}

TensorView int64_view(int64_t* data, std::initializer_list<int64_t> sizes) {
  TensorView view = {};
  view.data = data;
  view.dtype = DType::kInt64;
  view.ndim = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view.sizes);
  make_contiguous(&view);
  return view;
}

// Appends what a constant method gives: ints and bools, each alone or in tensors.
Error read_ints(Model& model, const char* method, std::vector<int64_t>* values) {
  size_t n_outputs = 0;
  const Error error = model.forward(method, nullptr, 0, &n_outputs);
  if (error != Error::Ok) return error;
  for (size_t i = 0; i < n_outputs; ++i) {
    TensorView view;
    const Error no_output = model.output(i, &view);
    if (no_output != Error::Ok) return no_output;
    const bool is_bool = view.dtype == DType::kBool;
    if (!is_bool && view.dtype != DType::kInt64) {
      return fail(Error::InvalidProgram, "%s: expected integers, got dtype %d", method,
                  static_cast<int>(view.dtype));
    }
    const uint64_t n = view.nbytes / (is_bool ? sizeof(bool) : sizeof(int64_t));
    for (uint64_t j = 0; j < n; ++j) {
      values->push_back(is_bool ? static_cast<const bool*>(view.data)[j]
                                : static_cast<const int64_t*>(view.data)[j]);
    }
  }
  return Error::Ok;
}

// One value out of a constant method; *value stays as it is where there is no such method.
Error read_int(Model& model, const char* method, int64_t* value) {
  if (!model.has_method(method)) return Error::Ok;
  std::vector<int64_t> values;
  const Error error = read_ints(model, method, &values);
  if (error != Error::Ok) return error;
  if (values.size() != 1) {
    return fail(Error::InvalidProgram, "%s: expected one integer, got %zu", method, values.size());
  }
  *value = values[0];
  return Error::Ok;
}

}  // namespace

Error Decoder::create(Model& model, std::unique_ptr<Decoder>* out) {
  std::unique_ptr<Decoder> decoder(new Decoder(model));
  Error error = decoder->check_signature();
  if (error == Error::Ok) error = decoder->read_metadata();
  if (error != Error::Ok) return error;
  *out = std::move(decoder);
  return Error::Ok;
}

Error Decoder::check_signature() {
  if (!model_.has_method("forward")) {
    return fail(Error::InvalidProgram,
                "decode: expected a method 'forward', the model has none of that name");
  }
  const size_t n_inputs = model_.n_inputs("forward");
  if (n_inputs != 2 || model_.n_outputs("forward") < 1) {
    return fail(Error::InvalidProgram,
                "decode: expected forward(tokens, input_pos) -> logits, got %zu inputs and %zu "
                "outputs; a language model is exported with its KV cache as buffers (in "
                "executorch's own exporter: use_kv_cache)",
                n_inputs, model_.n_outputs("forward"));
  }
  TensorView tokens, positions, logits;
  Error error = model_.input_info("forward", 0, &tokens);
  if (error == Error::Ok) error = model_.input_info("forward", 1, &positions);
  if (error == Error::Ok) error = model_.output_info("forward", 0, &logits);
  if (error != Error::Ok) return error;
  if (tokens.dtype != DType::kInt64 || tokens.ndim != 2 || tokens.sizes[0] != 1 ||
      tokens.sizes[1] < 1) {
    return fail(Error::InvalidProgram,
                "decode: expected tokens [1, S] int64 as the first input of forward, got %d "
                "dimensions, dtype %d; export with a batch of one",
                tokens.ndim, static_cast<int>(tokens.dtype));
  }
  info_.max_seq_len = tokens.sizes[1];
  const bool positions_fit = positions.dtype == DType::kInt64 && positions.ndim == 1 &&
                             (positions.sizes[0] == 1 || positions.sizes[0] == info_.max_seq_len);
  if (!positions_fit) {
    return fail(Error::InvalidProgram,
                "decode: expected input_pos [S] or [1] int64 as the second input of forward with S "
                "<= %" PRId64 ", got %d dimensions, the first of %" PRId64 ", dtype %d",
                info_.max_seq_len, positions.ndim, positions.ndim > 0 ? positions.sizes[0] : 0,
                static_cast<int>(positions.dtype));
  }
  one_position_ = positions.sizes[0] == 1;
  const bool logits_fit = (logits.ndim == 2 || logits.ndim == 3) && logits.sizes[0] == 1 &&
                          logits.sizes[logits.ndim - 1] >= 1 && is_logits_dtype(logits.dtype);
  if (!logits_fit) {
    return fail(Error::InvalidProgram,
                "decode: expected logits [1, S, V] or [1, V] in float16, bfloat16 or float32 as "
                "the first output of forward, got %d dimensions, dtype %d",
                logits.ndim, static_cast<int>(logits.dtype));
  }
  info_.vocab_size = logits.sizes[logits.ndim - 1];
  return Error::Ok;
}

Error Decoder::read_metadata() {
  int64_t use_kv_cache = 1, dynamic_shape = info_.max_seq_len > 1;
  int64_t max_seq_len = 0, max_context_len = 0, vocab_size = info_.vocab_size;
  Error error = read_int(model_, "use_kv_cache", &use_kv_cache);
  if (error == Error::Ok) error = read_int(model_, "enable_dynamic_shape", &dynamic_shape);
  if (error == Error::Ok) error = read_int(model_, "get_max_seq_len", &max_seq_len);
  if (error == Error::Ok) error = read_int(model_, "get_max_context_len", &max_context_len);
  if (error == Error::Ok) error = read_int(model_, "get_vocab_size", &vocab_size);
  if (error == Error::Ok) error = read_int(model_, "get_bos_id", &info_.bos_id);
  if (error == Error::Ok && model_.has_method("get_eos_ids")) {
    error = read_ints(model_, "get_eos_ids", &info_.eos_ids);
  }
  if (error != Error::Ok) return error;
  if (!use_kv_cache) {
    return fail(Error::NotSupported,
                "decode: expected a model with a KV cache, use_kv_cache says false; export it "
                "again with one");
  }
  if (!dynamic_shape && info_.max_seq_len != 1) {
    return fail(
        Error::InvalidProgram,
        "decode: enable_dynamic_shape says false, so tokens must be [1, 1], got [1, %" PRId64
        "]; export with a dynamic sequence length, or one token at a time",
        info_.max_seq_len);
  }
  if (max_context_len == 0) max_context_len = max_seq_len;
  if (max_context_len == 0) {
    return fail(Error::InvalidProgram,
                "decode: the length of the context is not known: expected a constant method "
                "get_max_context_len or get_max_seq_len; give one at export "
                "(constant_methods={\"get_max_context_len\": N})");
  }
  if (max_context_len < 1 || max_seq_len < 0 || vocab_size < 1 || vocab_size > info_.vocab_size) {
    return fail(Error::InvalidProgram,
                "decode: expected get_max_context_len and get_max_seq_len >= 1 and get_vocab_size "
                "in 1..%" PRId64 " (the logits'), got %" PRId64 ", %" PRId64 " and %" PRId64,
                info_.vocab_size, max_context_len, max_seq_len, vocab_size);
  }
  if (info_.bos_id < -1 || info_.bos_id >= vocab_size) {
    return fail(Error::InvalidProgram,
                "decode: expected get_bos_id in 0..%" PRId64 ", got %" PRId64, vocab_size - 1,
                info_.bos_id);
  }
  info_.vocab_size = vocab_size;
  info_.max_context_len = max_context_len;
  if (max_seq_len > 0) info_.max_seq_len = std::min(info_.max_seq_len, max_seq_len);
  info_.max_seq_len = std::min(info_.max_seq_len, max_context_len);
  return Error::Ok;
}

Error Decoder::seek(int64_t position) {
  if (position < 0 || position > info_.max_context_len) {
    return fail(Error::InvalidArgument,
                "decode: expected a start position in 0..%" PRId64 ", got %" PRId64,
                info_.max_context_len, position);
  }
  position_ = position;
  return Error::Ok;
}

Error Decoder::reset() {
  position_ = 0;
  return model_.reset();
}

Error Decoder::check_prompt(const int64_t* prompt, int64_t n_prompt) const {
  if (n_prompt < 1) {
    return fail(Error::InvalidArgument,
                "decode: expected a prompt of at least one token, got none");
  }
  if (n_prompt > info_.max_context_len - position_) {
    return fail(Error::InvalidArgument,
                "decode: the prompt has %" PRId64 " tokens, the context holds %" PRId64
                " and %" PRId64
                " of them are taken; shorten the prompt, or export with a longer context",
                n_prompt, info_.max_context_len, position_);
  }
  for (int64_t i = 0; i < n_prompt; ++i) {
    if (prompt[i] < 0 || prompt[i] >= info_.vocab_size) {
      return fail(Error::InvalidArgument,
                  "decode: expected prompt tokens in 0..%" PRId64 ", got %" PRId64
                  " at index %" PRId64 "; is this the model's tokenizer?",
                  info_.vocab_size - 1, prompt[i], i);
    }
  }
  return Error::Ok;
}

Error Decoder::forward(const int64_t* tokens, int64_t n, TensorView* logits) {
  tokens_.assign(tokens, tokens + n);
  positions_.resize(static_cast<size_t>(one_position_ ? 1 : n));
  std::iota(positions_.begin(), positions_.end(), position_);
  const TensorView inputs[2] = {int64_view(tokens_.data(), {1, n}),
                                int64_view(positions_.data(), {int64_t(positions_.size())})};
  Error error = model_.forward("forward", inputs, 2, nullptr);
  if (error == Error::Ok) error = model_.output(0, logits);
  if (error != Error::Ok) return error;
  const int64_t row = logits->ndim > 0 ? logits->sizes[logits->ndim - 1] : 0;
  const uint64_t element_nbytes = logits->dtype == DType::kFloat32 ? 4 : 2;
  if (!is_logits_dtype(logits->dtype) || row < info_.vocab_size ||
      logits->nbytes < static_cast<uint64_t>(row) * element_nbytes) {
    return fail(Error::InvalidState,
                "decode: expected at least %" PRId64 " logits from forward, got %" PRId64
                " in %" PRIu64 " bytes",
                info_.vocab_size, row, logits->nbytes);
  }
  // The last row of a contiguous tensor; columns behind the vocabulary are padding.
  const uint64_t row_nbytes = static_cast<uint64_t>(row) * element_nbytes;
  logits->data = static_cast<char*>(logits->data) + (logits->nbytes - row_nbytes);
  logits->ndim = 1;
  logits->sizes[0] = info_.vocab_size;
  logits->strides[0] = 1;
  logits->nbytes = static_cast<uint64_t>(info_.vocab_size) * element_nbytes;
  position_ += n;
  return Error::Ok;
}

Error Decoder::generate(const int64_t* prompt, int64_t n_prompt, const GenerateConfig& config,
                        const GenerateCallbacks& callbacks, GenerateStats* stats) {
  *stats = GenerateStats();
  const Error error = generate_tokens(prompt, n_prompt, config, callbacks, stats);
  stats->peak_device_memory_bytes = model_.device_use().peak_device_bytes;
  return error;
}

Error Decoder::generate_tokens(const int64_t* prompt, int64_t n_prompt,
                               const GenerateConfig& config, const GenerateCallbacks& callbacks,
                               GenerateStats* stats) {
  Error error = fail(validate_sampler_config(config.sampler));
  if (error == Error::Ok) error = check_prompt(prompt, n_prompt);
  if (error != Error::Ok) return error;
  const Clock::time_point start = Clock::now();

  TensorView logits;
  int64_t chunk = info_.max_seq_len;
  if (config.prefill_chunk > 0) chunk = std::min(chunk, config.prefill_chunk);
  while (stats->prompt_tokens < n_prompt) {
    const int64_t n = std::min(chunk, n_prompt - stats->prompt_tokens);
    error = forward(prompt + stats->prompt_tokens, n, &logits);
    if (error != Error::Ok) return error;
    stats->prompt_tokens += n;
    stats->prefill_s = seconds_between(start, Clock::now());
    if (callbacks.on_prefill && !callbacks.on_prefill(stats->prompt_tokens)) {
      stats->stop_reason = StopReason::kInterrupted;
      return Error::Ok;
    }
  }

  Sampler sampler(config.sampler);
  Clock::time_point first_token;
  while (true) {
    int64_t token = 0;
    error = fail(sampler.sample(logits, position_, &token));
    if (error != Error::Ok) return error;
    const Clock::time_point now = Clock::now();
    if (stats->new_tokens++ == 0) {
      first_token = now;
      stats->time_to_first_token_s = seconds_between(start, now);
    }
    stats->decode_s = seconds_between(first_token, now);
    const bool go_on = !callbacks.on_token || callbacks.on_token(token);
    if (contains(info_.eos_ids, token) || contains(config.stop_tokens, token)) {
      stats->stop_reason = StopReason::kStopToken;
      return Error::Ok;
    }
    if (!go_on) {
      stats->stop_reason = StopReason::kInterrupted;
      return Error::Ok;
    }
    if (stats->new_tokens == config.max_new_tokens) {
      stats->stop_reason = StopReason::kMaxNewTokens;
      return Error::Ok;
    }
    if (position_ == info_.max_context_len) {
      stats->stop_reason = StopReason::kEndOfContext;
      return Error::Ok;
    }
    error = forward(&token, 1, &logits);
    if (error != Error::Ok) return error;
  }
}

}  // namespace cuda_int4
