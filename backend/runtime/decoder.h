// Decoder -- tokens out of a loaded language model: prefill in chunks, then one token at a time, of one
// conversation or of several.
//
// The model is a .pte whose forward is (tokens [1, S] int64, input_pos int64) -> logits, in the form
// that executorch's own runners take:
//
//   input_pos  [S], the position of each token; or [1], the position of the first
//   logits     [1, S, V], [1, 1, V] or [1, V]; float16 | bfloat16 | float32; the last row is read
//   constant methods, each optional: get_max_context_len, get_max_seq_len, get_vocab_size, get_max_batch,
//              get_bos_id, get_eos_ids, use_kv_cache (must be true), enable_dynamic_shape (false: S is 1)
//
// or one of several rows: tokens [B, S], input_pos [B, S] -> logits [B, V], [B, 1, V] or [B, S, V], with
// B from 1 to max_sequences. Row b has a cache of its own. A row that has less to read repeats its last
// token at that token's position, which writes again what is there.
//
// On a GPU the tokens are chosen there (decode_steps.h), and the host is one step behind.
//
//   std::unique_ptr<Model> model;
//   Model::open("llama.pte", nullptr, "auto", true, &model);
//   std::unique_ptr<Decoder> decoder;
//   Decoder::create(*model, &decoder);  // checks all of the above
//   decoder->generate(prompt.data(), prompt.size(), config, callbacks, &stats);
//
// Errors are returned, with the reason in cuda_int4_last_error(). After an error in the middle of a
// generation position() says how many tokens the cache holds.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "sampler.h"
#include "visibility.h"

namespace cuda_int4 {

// What a model says of itself, defaults filled in.
struct DecodeInfo {
  int64_t max_context_len = 0;  // tokens the cache holds
  int64_t max_seq_len = 0;      // tokens that one forward takes
  int64_t vocab_size = 0;       // tokens are 0..vocab_size - 1
  int64_t bos_id = -1;          // begins a conversation, for whoever makes tokens of text; -1: none
  std::vector<int64_t> eos_ids;
  int64_t max_sequences = 1;  // that one forward takes
};

struct GenerateConfig {
  SamplerConfig sampler;
  int64_t max_new_tokens = 0;  // <= 0: until a stop token or the end of the context
  // Tokens per forward in prefill; <= 0 or too many: the model's max. Of several the least counts.
  int64_t prefill_chunk = 0;
  std::vector<int64_t> stop_tokens;  // beside the model's eos_ids
};

// Each returns true to go on, false to end the generation there. An empty one is not called.
struct GenerateCallbacks {
  std::function<bool(int64_t token)> on_token;     // each token as it is chosen, a stop token too
  std::function<bool(int64_t n_read)> on_prefill;  // after each chunk: prompt tokens read so far
};

// One of several conversations.
struct GenerateRequest {
  const int64_t* prompt = nullptr;
  int64_t n_prompt = 0;
  GenerateConfig config;
  GenerateCallbacks callbacks;  // with false this conversation ends, the others go on
};

enum class StopReason : int32_t {  // the numbers of cuda_int4_generate_stats.stop_reason
  kMaxNewTokens = 0,
  kStopToken = 1,
  kEndOfContext = 2,
  kInterrupted = 3,  // a callback said so
};

struct GenerateStats {
  double prefill_s = 0;                   // reading the prompt
  double decode_s = 0;                    // from the first new token to the last
  double time_to_first_token_s = 0;       // from the call; 0 if there was none
  int64_t prompt_tokens = 0;              // read
  int64_t new_tokens = 0;                 // chosen
  uint64_t peak_device_memory_bytes = 0;  // of the model's; 0 on the CPU
  StopReason stop_reason = StopReason::kMaxNewTokens;
  int32_t n_sequences = 1;  // that these are of; in a sum those that chose a token

  // 0 where nothing was timed. The first new token comes out of the prefill.
  double prefill_tokens_per_s() const { return prefill_s > 0 ? prompt_tokens / prefill_s : 0; }
  double decode_tokens_per_s() const {
    return decode_s > 0 ? (new_tokens - n_sequences) / decode_s : 0;
  }
};

class CUDA_INT4_EXPORT Decoder {
 public:
  // Checks the model's signature and reads its constant methods. `model` outlives the decoder.
  static executorch::runtime::Error create(Model& model, std::unique_ptr<Decoder>* out);

  const DecodeInfo& info() const { return info_; }

  // Tokens in a row's cache. The last token chosen by generate() is not among them: the next prompt of
  // the same conversation begins with it.
  int64_t position(size_t row = 0) const { return positions_[row]; }
  // Go on behind the first `position` tokens of a row's cache.
  executorch::runtime::Error seek(int64_t position, size_t row = 0);
  // Empties the caches: new conversations.
  executorch::runtime::Error reset();

  // Reads the prompt (one token at least) behind what the cache holds, then chooses tokens. `stats`
  // is filled in on an error too, as far as it got. Allocates nothing per token.
  executorch::runtime::Error generate(const int64_t* prompt, int64_t n_prompt,
                                      const GenerateConfig& config,
                                      const GenerateCallbacks& callbacks, GenerateStats* stats);
  // The same for several at once: number i in row i, each behind what its row holds. stats[i] of each;
  // *total of all: prompts and tokens together, the time that they took together, the stop reason of
  // the last to end. More than max_sequences run in groups one after the other, from empty caches;
  // then, or with max_sequences of 1, all positions must be 0. An error of one ends all.
  executorch::runtime::Error generate(const GenerateRequest* requests, size_t n_requests,
                                      GenerateStats* stats, GenerateStats* total);

 private:
  struct Sequence;
  class Group;
  explicit Decoder(Model& model) : model_(model) {}

  executorch::runtime::Error read_metadata();
  executorch::runtime::Error check_signature();
  executorch::runtime::Error check_prompt(const GenerateRequest& request, int64_t position) const;
  executorch::runtime::Error check_requests(const GenerateRequest* requests, size_t n) const;

  Model& model_;
  DecodeInfo info_;
  bool one_position_ = false;       // input_pos is [1], not [S]
  bool takes_rows_ = false;         // tokens and input_pos are [B, S]
  std::vector<int64_t> positions_;  // of each row
};

}  // namespace cuda_int4
