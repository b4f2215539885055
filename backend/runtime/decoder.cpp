#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <initializer_list>

#include "decode_steps.h"
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
  takes_rows_ = positions.ndim == 2;
  if (tokens.dtype != DType::kInt64 || tokens.ndim != 2 || tokens.sizes[0] < 1 ||
      (tokens.sizes[0] != 1 && !takes_rows_) || tokens.sizes[1] < 1) {
    return fail(Error::InvalidProgram,
                "decode: expected tokens [1, S] int64 as the first input of forward, got %d "
                "dimensions, dtype %d; export with a batch of one, or with input_pos [B, S]",
                tokens.ndim, static_cast<int>(tokens.dtype));
  }
  info_.max_sequences = tokens.sizes[0];
  info_.max_seq_len = tokens.sizes[1];
  const int64_t length = positions.ndim > 0 ? positions.sizes[positions.ndim - 1] : 0;
  const bool positions_fit =
      positions.dtype == DType::kInt64 &&
      (takes_rows_ ? positions.sizes[0] == info_.max_sequences && length == info_.max_seq_len
                   : positions.ndim == 1 && (length == 1 || length == info_.max_seq_len));
  if (!positions_fit) {
    return fail(
        Error::InvalidProgram,
        "decode: expected input_pos [S] or [1] int64 (or, like tokens, [B, S]) as the second "
        "input of forward with S <= %" PRId64 ", got %d dimensions, the last of %" PRId64
        ", dtype %d",
        info_.max_seq_len, positions.ndim, length, static_cast<int>(positions.dtype));
  }
  one_position_ = !takes_rows_ && length == 1;
  const bool logits_fit = (logits.ndim == 2 || logits.ndim == 3) &&
                          logits.sizes[0] == info_.max_sequences &&
                          logits.sizes[logits.ndim - 1] >= 1 && is_logits_dtype(logits.dtype);
  if (!logits_fit) {
    return fail(
        Error::InvalidProgram,
        "decode: expected logits [1, S, V] or [1, V] in float16, bfloat16 or float32 (or a "
        "row for each of tokens) as the first output of forward, got %d dimensions, dtype %d",
        logits.ndim, static_cast<int>(logits.dtype));
  }
  positions_.assign(static_cast<size_t>(info_.max_sequences), 0);
  info_.vocab_size = logits.sizes[logits.ndim - 1];
  return Error::Ok;
}

Error Decoder::read_metadata() {
  int64_t use_kv_cache = 1, dynamic_shape = info_.max_seq_len > 1;
  int64_t max_seq_len = 0, max_context_len = 0, vocab_size = info_.vocab_size;
  int64_t max_sequences = info_.max_sequences;
  Error error = read_int(model_, "use_kv_cache", &use_kv_cache);
  if (error == Error::Ok) error = read_int(model_, "enable_dynamic_shape", &dynamic_shape);
  if (error == Error::Ok) error = read_int(model_, "get_max_seq_len", &max_seq_len);
  if (error == Error::Ok) error = read_int(model_, "get_max_context_len", &max_context_len);
  if (error == Error::Ok) error = read_int(model_, "get_vocab_size", &vocab_size);
  if (error == Error::Ok) error = read_int(model_, "get_max_batch", &max_sequences);
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
  if (max_sequences < 1 || max_sequences > info_.max_sequences) {
    return fail(Error::InvalidProgram,
                "decode: expected get_max_batch in 1..%" PRId64
                " (the rows of tokens), got %" PRId64,
                info_.max_sequences, max_sequences);
  }
  if (info_.bos_id < -1 || info_.bos_id >= vocab_size) {
    return fail(Error::InvalidProgram,
                "decode: expected get_bos_id in 0..%" PRId64 ", got %" PRId64, vocab_size - 1,
                info_.bos_id);
  }
  info_.vocab_size = vocab_size;
  info_.max_sequences = max_sequences;
  info_.max_context_len = max_context_len;
  if (max_seq_len > 0) info_.max_seq_len = std::min(info_.max_seq_len, max_seq_len);
  info_.max_seq_len = std::min(info_.max_seq_len, max_context_len);
  return Error::Ok;
}

Error Decoder::seek(int64_t position, size_t row) {
  if (row >= positions_.size()) {
    return fail(Error::InvalidArgument, "decode: expected a row below %zu, got %zu",
                positions_.size(), row);
  }
  if (position < 0 || position > info_.max_context_len) {
    return fail(Error::InvalidArgument,
                "decode: expected a start position in 0..%" PRId64 ", got %" PRId64,
                info_.max_context_len, position);
  }
  positions_[row] = position;
  return Error::Ok;
}

Error Decoder::reset() {
  std::fill(positions_.begin(), positions_.end(), 0);
  return model_.reset();
}

Error Decoder::check_prompt(const GenerateRequest& request, int64_t position) const {
  if (request.n_prompt < 1) {
    return fail(Error::InvalidArgument,
                "decode: expected a prompt of at least one token, got none");
  }
  if (request.n_prompt > info_.max_context_len - position) {
    return fail(Error::InvalidArgument,
                "decode: the prompt has %" PRId64 " tokens, the context holds %" PRId64
                " and %" PRId64
                " of them are taken; shorten the prompt, or export with a longer context",
                request.n_prompt, info_.max_context_len, position);
  }
  for (int64_t i = 0; i < request.n_prompt; ++i) {
    if (request.prompt[i] < 0 || request.prompt[i] >= info_.vocab_size) {
      return fail(Error::InvalidArgument,
                  "decode: expected prompt tokens in 0..%" PRId64 ", got %" PRId64
                  " at index %" PRId64 "; is this the model's tokenizer?",
                  info_.vocab_size - 1, request.prompt[i], i);
    }
  }
  return Error::Ok;
}

Error Decoder::check_requests(const GenerateRequest* requests, size_t n) const {
  const auto n_rows = static_cast<size_t>(info_.max_sequences);
  for (size_t i = 0; i < n; ++i) {
    Error error = fail(validate_sampler_config(requests[i].config.sampler));
    if (error == Error::Ok) error = check_prompt(requests[i], positions_[i % n_rows]);
    if (error != Error::Ok) return error;
    if (n > n_rows && positions_[i % n_rows] != 0) {
      return fail(Error::InvalidArgument,
                  "decode: expected at most %zu conversations to go on with, one in each row, got "
                  "%zu; reset before, or give fewer",
                  n_rows, n);
    }
  }
  return Error::Ok;
}

// ---- conversations that run together ----

/// One conversation in its row.
struct Decoder::Sequence {
  Sequence(const GenerateRequest& request, GenerateStats& stats, int64_t& position)
      : request(request),
        stats(stats),
        position(position),
        start(position),
        sampler(request.config.sampler) {}

  const GenerateRequest& request;
  GenerateStats& stats;
  int64_t& position;  // tokens in its cache
  const int64_t start;
  Sampler sampler;
  int64_t token = 0;       // chosen last
  int64_t token_read = 0;  // at position - 1
  bool is_active = true;
  Clock::time_point first_token;

  void end(StopReason reason) {
    is_active = false;
    stats.stop_reason = reason;
  }
};

/// As many as the model has rows for, at most; number i in row i.
class Decoder::Group {
 public:
  Group(Decoder& decoder, const GenerateRequest* requests, size_t n, GenerateStats* stats,
        Clock::time_point start)
      : decoder_(decoder), start_(start), begin_(Clock::now()) {
    sequences_.reserve(n);
    for (size_t i = 0; i < n; ++i)
      sequences_.emplace_back(requests[i], stats[i], decoder.positions_[i]);
  }

  Error run() {
    Error error = prefill();
    if (error == Error::Ok) error = choose(sequences_.size());
    if (error != Error::Ok || n_rows() == 0) return error;
    DecodeSteps* steps = decoder_.model_.decode_steps("forward");
    return steps != nullptr ? decode(*steps) : decode();
  }
  double prefill_s() const { return prefill_s_; }
  double decode_s() const { return seconds_between(first_token_, last_token_); }
  /// Of the last to end.
  StopReason stop_reason() const { return stop_reason_; }

 private:
  // Rows up to the last active one are fed; fewer of them only when half of them would do, since each
  // number of rows has a graph of its own on a GPU.
  size_t n_rows() const {
    size_t needed = sequences_.size();
    while (needed > 0 && !sequences_[needed - 1].is_active) --needed;
    size_t n = sequences_.size();
    while (n > 1 && needed <= n / 2) n = (n + 1) / 2;
    return needed == 0 ? 0 : n;
  }

  Error prefill();
  Error decode();
  Error decode(DecodeSteps& steps);
  Error forward(size_t n_rows, int64_t n_tokens);
  Error choose(size_t n_rows);
  void accept(Sequence& sequence, int64_t token);
  int64_t n_steps_left(const Sequence& sequence) const;

  Decoder& decoder_;
  const Clock::time_point start_, begin_;  // of the call; of the group
  std::vector<Sequence> sequences_;
  std::vector<int64_t> tokens_, input_pos_;  // inputs of forward, row by row
  TensorView logits_ = {};                   // of the last token of each row: [n_rows, vocab_size]
  double prefill_s_ = 0;
  bool has_token_ = false;
  Clock::time_point first_token_, last_token_;
  StopReason stop_reason_ = StopReason::kMaxNewTokens;
};

/// Runs the model on tokens_ and input_pos_, [n_rows, n_tokens]; logits_ is then of their last ones.
Error Decoder::Group::forward(size_t n_rows, int64_t n_tokens) {
  const auto rows = static_cast<int64_t>(n_rows);
  const int64_t vocab_size = decoder_.info_.vocab_size;
  const TensorView inputs[2] = {
      int64_view(tokens_.data(), {rows, n_tokens}),
      decoder_.takes_rows_
          ? int64_view(input_pos_.data(), {rows, n_tokens})
          : int64_view(input_pos_.data(), {decoder_.one_position_ ? 1 : n_tokens})};
  TensorView logits;
  Error error = decoder_.model_.forward("forward", inputs, 2, nullptr);
  if (error == Error::Ok) error = decoder_.model_.output(0, &logits);
  if (error != Error::Ok) return error;
  const int64_t columns = logits.ndim > 0 ? logits.sizes[logits.ndim - 1] : 0;
  const int64_t given = logits.ndim == 3 ? logits.sizes[1] : 1;  // rows of each of ours
  const uint64_t element_nbytes = logits.dtype == DType::kFloat32 ? 4 : 2;
  if (!is_logits_dtype(logits.dtype) || columns < vocab_size || logits.sizes[0] != rows ||
      given < 1 ||
      logits.nbytes != static_cast<uint64_t>(rows * given * columns) * element_nbytes) {
    return fail(Error::InvalidState,
                "decode: expected at least %" PRId64
                " logits of each of %zu rows from forward, got %" PRId64 " in %" PRIu64 " bytes",
                vocab_size, n_rows, columns, logits.nbytes);
  }
  // The last row of each; columns behind the vocabulary are padding.
  const uint64_t last = static_cast<uint64_t>((given - 1) * columns) * element_nbytes;
  logits_ = logits;
  logits_.data = static_cast<char*>(logits.data) + last;
  logits_.ndim = 2;
  logits_.sizes[1] = vocab_size;
  logits_.strides[0] = given * columns;
  logits_.strides[1] = 1;
  return Error::Ok;
}

Error Decoder::Group::prefill() {
  int64_t longest = 0, chunk = decoder_.info_.max_seq_len;
  for (const Sequence& sequence : sequences_) {
    longest = std::max(longest, sequence.request.n_prompt);
    const int64_t wanted = sequence.request.config.prefill_chunk;
    if (wanted > 0) chunk = std::min(chunk, wanted);
  }
  const auto n_most = sequences_.size() * static_cast<size_t>(std::min(chunk, longest));
  tokens_.reserve(n_most);
  input_pos_.reserve(n_most);
  for (int64_t at = 0; at < longest; at += chunk) {
    const int64_t n_tokens = std::min(chunk, longest - at);
    tokens_.clear();
    input_pos_.clear();
    for (const Sequence& sequence : sequences_) {
      // A prompt that is at its end, or was ended, repeats its last token.
      const int64_t n =
          sequence.is_active ? sequence.request.n_prompt : sequence.stats.prompt_tokens;
      for (int64_t i = at; i < at + n_tokens; ++i) {
        tokens_.push_back(sequence.request.prompt[std::min(i, n - 1)]);
        input_pos_.push_back(sequence.start + std::min(i, n - 1));
      }
    }
    const Error error = forward(sequences_.size(), n_tokens);
    if (error != Error::Ok) return error;
    prefill_s_ = seconds_between(begin_, Clock::now());
    int64_t longest_active = 0;
    for (Sequence& sequence : sequences_) {
      const int64_t before = sequence.stats.prompt_tokens;
      if (!sequence.is_active || before == sequence.request.n_prompt) continue;
      const int64_t n_read = std::min(at + n_tokens, sequence.request.n_prompt);
      sequence.stats.prompt_tokens = n_read;
      sequence.stats.prefill_s = prefill_s_;
      sequence.position = sequence.start + n_read;
      sequence.token_read = sequence.request.prompt[n_read - 1];
      const auto& on_prefill = sequence.request.callbacks.on_prefill;
      if (on_prefill && !on_prefill(n_read)) {
        sequence.end(StopReason::kInterrupted);
        stop_reason_ = StopReason::kInterrupted;
      }
    }
    for (const Sequence& sequence : sequences_)
      if (sequence.is_active) longest_active = std::max(longest_active, sequence.request.n_prompt);
    longest = longest_active;
  }
  return Error::Ok;
}

/// A token for each active row out of logits_.
Error Decoder::Group::choose(size_t n_rows) {
  const uint64_t element_nbytes = logits_.dtype == DType::kFloat32 ? 4 : 2;
  for (size_t i = 0; i < n_rows; ++i) {
    Sequence& sequence = sequences_[i];
    if (!sequence.is_active) continue;
    TensorView row = logits_;
    row.data = static_cast<char*>(row.data) +
               i * static_cast<uint64_t>(logits_.strides[0]) * element_nbytes;
    row.ndim = 1;
    row.sizes[0] = decoder_.info_.vocab_size;
    row.strides[0] = 1;
    row.nbytes = static_cast<uint64_t>(row.sizes[0]) * element_nbytes;
    int64_t token = 0;
    const Error error = fail(sequence.sampler.sample(row, sequence.position, &token));
    if (error != Error::Ok) return error;
    accept(sequence, token);
  }
  return Error::Ok;
}

/// A token that was chosen for it: to the callback, and what ends with it.
void Decoder::Group::accept(Sequence& sequence, int64_t token) {
  const GenerateConfig& config = sequence.request.config;
  GenerateStats& stats = sequence.stats;
  sequence.token = token;
  last_token_ = Clock::now();
  if (!has_token_) first_token_ = last_token_;
  has_token_ = true;
  if (stats.new_tokens++ == 0) {
    sequence.first_token = last_token_;
    stats.time_to_first_token_s = seconds_between(start_, last_token_);
  }
  stats.decode_s = seconds_between(sequence.first_token, last_token_);
  const auto& on_token = sequence.request.callbacks.on_token;
  const bool go_on = !on_token || on_token(token);
  if (contains(decoder_.info_.eos_ids, token) || contains(config.stop_tokens, token)) {
    sequence.end(StopReason::kStopToken);
  } else if (!go_on) {
    sequence.end(StopReason::kInterrupted);
  } else if (stats.new_tokens == config.max_new_tokens) {
    sequence.end(StopReason::kMaxNewTokens);
  } else if (sequence.position == decoder_.info_.max_context_len) {
    sequence.end(StopReason::kEndOfContext);
  }
  if (!sequence.is_active) stop_reason_ = stats.stop_reason;
}

/// Steps that its active sequence can take at most.
int64_t Decoder::Group::n_steps_left(const Sequence& sequence) const {
  const int64_t of_context = decoder_.info_.max_context_len - sequence.position;
  const int64_t wanted = sequence.request.config.max_new_tokens;
  return wanted <= 0 ? of_context : std::min(of_context, wanted - sequence.stats.new_tokens);
}

/// Token by token, each through the host.
Error Decoder::Group::decode() {
  while (const size_t n = n_rows()) {
    tokens_.clear();
    input_pos_.clear();
    for (size_t i = 0; i < n; ++i) {
      const Sequence& sequence = sequences_[i];
      tokens_.push_back(sequence.is_active ? sequence.token : sequence.token_read);
      input_pos_.push_back(sequence.is_active ? sequence.position : sequence.position - 1);
    }
    Error error = forward(n, 1);
    if (error != Error::Ok) return error;
    for (size_t i = 0; i < n; ++i) {
      Sequence& sequence = sequences_[i];
      if (!sequence.is_active) continue;
      ++sequence.position;
      sequence.token_read = sequence.token;
    }
    error = choose(n);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

/// The same with the tokens chosen on the device. The next step is in the queue before the tokens of
/// this one are looked at, so that the device never waits for the host.
Error Decoder::Group::decode(DecodeSteps& steps) {
  constexpr int64_t kAhead = 2;
  static_assert(kAhead <= DecodeSteps::kMaxQueued, "or the queue is full");
  std::vector<DecodeRow> rows(n_rows());
  std::vector<DecodedToken> taken(rows.size());
  while (const size_t n = n_rows()) {
    for (size_t i = 0; i < n; ++i) {
      const Sequence& one = sequences_[i];
      rows[i].rule = sample_rule(one.request.config.sampler);
      rows[i].token = one.is_active ? one.token : one.token_read;
      rows[i].position = one.is_active ? one.position : one.position - 1;
      rows[i].end_position = one.is_active ? one.position + n_steps_left(one) : 0;
    }
    struct Ending {  // also where a callback throws
      DecodeSteps& steps;
      ~Ending() { steps.end_steps(); }
    } const ending{steps};
    Error error = steps.begin_steps(rows.data(), n, decoder_.info_.vocab_size);
    Error failed = Error::Ok;  // of a step that was not queued: those ahead of it come first
    int64_t n_queued = 0;
    while (error == Error::Ok) {
      int64_t n_wanted = 0;
      for (const Sequence& sequence : sequences_)
        if (sequence.is_active) n_wanted = std::max(n_wanted, n_steps_left(sequence));
      if (n_rows() < n) n_wanted = 0;  // what is queued, then with fewer rows
      while (failed == Error::Ok && n_queued < std::min(kAhead, n_wanted)) {
        failed = steps.queue_step();
        n_queued += failed == Error::Ok;
      }
      if (n_rows() == 0) break;
      if (n_queued == 0) {
        error = failed;
        break;
      }
      error = steps.take_step(taken.data());
      --n_queued;
      for (size_t i = 0; error == Error::Ok && i < n; ++i) {
        Sequence& sequence = sequences_[i];
        if (!sequence.is_active) continue;
        ++sequence.position;
        sequence.token_read = sequence.token;
        if (taken[i].status != SampleStatus::kSampled) {
          error = fail(sample_error(taken[i].status, taken[i].token, sequence.position));
          break;
        }
        accept(sequence, taken[i].token);
        if (!sequence.is_active) error = steps.stop_row(i);
      }
    }
    const Error ended = steps.end_steps();
    if (error == Error::Ok) error = ended;
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

Error Decoder::generate(const int64_t* prompt, int64_t n_prompt, const GenerateConfig& config,
                        const GenerateCallbacks& callbacks, GenerateStats* stats) {
  const GenerateRequest request = {prompt, n_prompt, config, callbacks};
  GenerateStats total;
  return generate(&request, 1, stats, &total);
}

Error Decoder::generate(const GenerateRequest* requests, size_t n_requests, GenerateStats* stats,
                        GenerateStats* total) {
  const Clock::time_point start = Clock::now();
  *total = GenerateStats();
  std::fill(stats, stats + n_requests, GenerateStats());
  Error error = check_requests(requests, n_requests);
  const auto n_rows = static_cast<size_t>(info_.max_sequences);
  for (size_t i = 0; error == Error::Ok && i < n_requests; i += n_rows) {
    if (i > 0) error = reset();
    if (error != Error::Ok) break;
    Group group(*this, requests + i, std::min(n_rows, n_requests - i), stats + i, start);
    error = group.run();
    total->prefill_s += group.prefill_s();
    total->decode_s += group.decode_s();
    total->stop_reason = group.stop_reason();
  }
  const uint64_t peak_bytes = model_.device_use().peak_device_bytes;
  total->n_sequences = 0;
  for (size_t i = 0; i < n_requests; ++i) {
    stats[i].peak_device_memory_bytes = peak_bytes;
    total->prompt_tokens += stats[i].prompt_tokens;
    total->new_tokens += stats[i].new_tokens;
    if (stats[i].new_tokens == 0) continue;
    const double first_s = stats[i].time_to_first_token_s;
    if (total->n_sequences++ == 0 || first_s < total->time_to_first_token_s)
      total->time_to_first_token_s = first_s;
  }
  total->peak_device_memory_bytes = peak_bytes;
  return error;
}

}  // namespace cuda_int4
