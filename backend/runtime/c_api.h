// The C interface of libcuda_int4: what Python reaches through ctypes and any language may call.
//
// Every function that can fail returns an int32_t: 0, or an executorch::runtime::Error number; the
// reason is then in cuda_int4_last_error() of the same thread, valid until its next failing call.
// No function throws or aborts. Reasons are also logged through ExecuTorch, which prints on stderr.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/ops.h"
#include "../kernels/sampling.h"

#define CUDA_INT4_API extern "C" __attribute__((visibility("default")))

// ---- library ----
CUDA_INT4_API const char* cuda_int4_version(void);  // "0.1.0", the Python package's
CUDA_INT4_API const char* cuda_int4_last_error(void);
CUDA_INT4_API void cuda_int4_clear_last_error(void);   // "": to tell a new reason from an old one
CUDA_INT4_API int32_t cuda_int4_cuda_built(void);      // 1 if this library has CUDA kernels
CUDA_INT4_API int32_t cuda_int4_cuda_available(void);  // 1 if it has and a driver and GPU answer
// Out-variant names of every op the delegate runs on `device` ("cpu" | "cuda"), one to a line, e.g.
// "aten::mul.out\ncuda_int4::linear.out\n": the partitioner's support table. nullptr: no such device.
CUDA_INT4_API const char* cuda_int4_supported_ops(const char* device);
// CRC-32C over the little-endian CRC-32Cs of the 4 MiB pieces of the data (one piece: still CRC of
// the 4 bytes of its CRC); 0 bytes: no pieces. Pieces are hashed on the thread pool.
CUDA_INT4_API uint32_t cuda_int4_checksum(const void* data, uint64_t nbytes);
// The same of data that is read in parts: so_far is the checksum of the parts before (0 at first),
// each of which is a multiple of 4 MiB.
CUDA_INT4_API uint32_t cuda_int4_checksum_continue(uint32_t so_far, const void* data,
                                                   uint64_t nbytes);
// CPU threads of this process's ExecuTorch, 1 or more; no model may be running meanwhile.
CUDA_INT4_API int32_t cuda_int4_set_num_threads(uint32_t n_threads);
// For command lines: from here on ExecuTorch's log, which repeats our errors on stderr, prints only
// what comes before an abort. Before the first model is opened.
CUDA_INT4_API void cuda_int4_keep_log_quiet(void);

// ---- ops, for PyTorch eager (device: 0 CPU, 1 CUDA; stream: cudaStream_t or nullptr) ----
// On CUDA they return once the work is on the stream: they allocate nothing and wait for nothing, so
// a CUDA graph can capture them. The tensors' device must be the current one of the thread.
// scratch: memory of that device, 64-byte aligned, of the size that *_scratch_bytes gives for the
// same arguments, the op's own until the stream has passed it; nullptr where the size is 0. On the
// CPU nullptr is always right: the op then takes what it needs from the heap.
// quantized_x: nullptr, or x as cuda_int4_quantize_activation has written it, for a CUDA linear with
// activation "int8".
// quantized_y: nullptr, or where to write y on CUDA a second time, as cuda_int4_quantize_activation
// would.
CUDA_INT4_API int32_t cuda_int4_linear(const cuda_int4::LinearArgs* args, int32_t device,
                                       void* stream, void* scratch, uint64_t scratch_bytes,
                                       const void* quantized_x);
// The same on CUDA, of a weight that nothing on the stream writes, as in a .pte: the kernel may read
// it before what is ahead on the stream has ended.
CUDA_INT4_API int32_t cuda_int4_linear_of_constants(const cuda_int4::LinearArgs* args, void* stream,
                                                    void* scratch, uint64_t scratch_bytes,
                                                    const void* quantized_x);
CUDA_INT4_API int32_t cuda_int4_linear_scratch_bytes(const cuda_int4::LinearArgs* args,
                                                     int32_t device, uint64_t* nbytes);
// x [..., K] on CUDA, once for all w4a8 linears that read it, into `to`: device memory at a multiple
// of 16 of as many bytes as the second function says for M rows (0: they are no sizes of an x).
CUDA_INT4_API int32_t cuda_int4_quantize_activation(const cuda_int4::TensorView* x, void* stream,
                                                    void* to);
CUDA_INT4_API uint64_t cuda_int4_quantized_activation_bytes(int64_t M, int64_t K);
CUDA_INT4_API int32_t cuda_int4_attention(const cuda_int4::AttentionArgs* args, int32_t device,
                                          void* stream, void* scratch, uint64_t scratch_bytes);
CUDA_INT4_API int32_t cuda_int4_attention_scratch_bytes(const cuda_int4::AttentionArgs* args,
                                                        int32_t device, uint64_t* nbytes);
CUDA_INT4_API int32_t cuda_int4_rms_norm(const cuda_int4::RmsNormArgs* args, int32_t device,
                                         void* stream, void* quantized_y);
CUDA_INT4_API int32_t cuda_int4_silu(const cuda_int4::SiluArgs* args, int32_t device, void* stream);
CUDA_INT4_API int32_t cuda_int4_add_rms_norm(const cuda_int4::AddRmsNormArgs* args, int32_t device,
                                             void* stream, void* quantized_y);
CUDA_INT4_API int32_t cuda_int4_gate_mul(const cuda_int4::GateMulArgs* args, int32_t device,
                                         void* stream, void* quantized_y);
CUDA_INT4_API int32_t cuda_int4_rope_append(const cuda_int4::RopeAppendArgs* args, int32_t device,
                                            void* stream);

// ---- a loaded .pte ----
struct cuda_int4_model;
struct cuda_int4_model_options {
  // "auto" | "cpu" | "cuda" | "cuda:<index>"; nullptr is "auto": the environment variable
  // CUDA_INT4_DEVICE, else CUDA where a GPU answers and has a kernel of every op, else the CPU.
  const char* device;
  int32_t verify;       // 0 skips checksums over constants (the program is always checked)
  int32_t cuda_graph;   // 0 launches kernel by kernel, where else calls of a size seen before
                        // replay a CUDA graph (CUDA_INT4_CUDA_GRAPH=0 does the same)
  int32_t device_loop;  // 0: cuda_int4_generate brings the logits of every token to the host, where
                        // else a GPU chooses (CUDA_INT4_DEVICE_LOOP=0 does the same)
  int32_t on_callers_stream;  // 1: work on cuda_stream, else each method on a stream of its own
  void* cuda_stream;          // a cudaStream_t that outlives the model; nullptr: the default stream
};
// data_path: nullptr or a .ptd. *out is set on success only.
CUDA_INT4_API int32_t cuda_int4_model_open_with(const char* path, const char* data_path,
                                                const cuda_int4_model_options* options,
                                                cuda_int4_model** out);
// The same with the options that most callers have.
CUDA_INT4_API int32_t cuda_int4_model_open(const char* path, const char* data_path,
                                           const char* device, int32_t verify,
                                           cuda_int4_model** out);
CUDA_INT4_API void cuda_int4_model_close(cuda_int4_model* model);
// Runs `method` ("forward"). Inputs are borrowed for the call, and are no views of the method's own
// outputs, which the call writes. Afterwards output i can be looked at
// through cuda_int4_model_output until the next call on this model; non-tensor inputs and outputs
// are 0-dimensional tensors (int64, float64, bool).
CUDA_INT4_API int32_t cuda_int4_model_forward(cuda_int4_model* model, const char* method,
                                              const cuda_int4::TensorView* inputs,
                                              uint64_t n_inputs, uint64_t* n_outputs);
CUDA_INT4_API int32_t cuda_int4_model_output(cuda_int4_model* model, uint64_t index,
                                             cuda_int4::TensorView* out);
// Names of the methods, one to a line; valid as long as the model.
CUDA_INT4_API const char* cuda_int4_model_methods(cuda_int4_model* model);
// Zeroes every mutable buffer (KV caches): a new conversation.
CUDA_INT4_API int32_t cuda_int4_model_reset(cuda_int4_model* model);

// Where the time of one call of `method` goes, instruction by instruction of its delegates, as the
// median of `rounds` runs (Model::profile in model.h, profile.h). *text, valid until the next profile
// of this model: a line "<microseconds>\ttotal\t", then "<microseconds>\t<op>\t<detail>" for each.
CUDA_INT4_API int32_t cuda_int4_model_profile(cuda_int4_model* model, const char* method,
                                              const cuda_int4::TensorView* inputs,
                                              uint64_t n_inputs, int32_t rounds, const char** text);

// *us: how long one call of `method` would take on its GPU without the instructions for which `kept`
// is 0, one entry for each that cuda_int4_model_profile lists, as the median of `rounds` runs
// (Model::time_part in model.h). Caches and outputs may hold anything afterwards.
CUDA_INT4_API int32_t cuda_int4_model_time_part(cuda_int4_model* model, const char* method,
                                                const cuda_int4::TensorView* inputs,
                                                uint64_t n_inputs, const uint8_t* kept,
                                                uint64_t n_kept, int32_t rounds, double* us);

// What a model has done on its device so far: device_use.h.
struct cuda_int4_device_use {
  char device[32];
  uint64_t device_bytes;
  uint64_t peak_device_bytes;
  uint64_t uploaded_bytes;
  double upload_s;
  uint64_t eager_runs;
  uint64_t captures;
  uint64_t replays;
};
CUDA_INT4_API int32_t cuda_int4_model_device_use(cuda_int4_model* model, cuda_int4_device_use* out);

// ---- the decode loop (decoder.h) ----
// Called with every token as it is chosen; non-zero ends the generation.
typedef int32_t (*cuda_int4_token_callback)(int64_t token, void* user);
// Called after each chunk of the prompt with how many of its tokens have been read; non-zero ends.
typedef int32_t (*cuda_int4_prefill_callback)(int64_t n_read, void* user);
// What a language model says of itself (its constant methods, defaults filled in).
struct cuda_int4_decode_info {
  int64_t max_context_len;  // tokens the cache holds
  int64_t max_seq_len;      // tokens that one forward takes
  int64_t vocab_size;
  int64_t bos_id;         // begins a conversation; -1: none. generate does not put it in front
  int64_t max_sequences;  // that one forward takes: cuda_int4_generate_several
  uint64_t n_eos_ids;
  int64_t eos_ids[32];
};
// Fails, with the reason, for a model that cuda_int4_generate cannot drive.
CUDA_INT4_API int32_t cuda_int4_model_decode_info(cuda_int4_model* model,
                                                  cuda_int4_decode_info* out);
struct cuda_int4_generate_config {
  int64_t max_new_tokens;  // <= 0: until a stop token or the end of the context
  int64_t prefill_chunk;   // tokens per forward while reading the prompt; <= 0: the model's max
  double temperature;      // 0: greedy
  int64_t top_k;           // <= 0: off
  double top_p;            // 1: off
  double min_p;            // 0: off; at least this times as likely as the likeliest
  uint64_t seed;
  uint64_t sequence;           // numbers the conversations of one seed, whose draws are independent
  const int64_t* stop_tokens;  // beside the model's own get_eos_ids
  uint64_t n_stop_tokens;
  cuda_int4_prefill_callback on_prefill;  // nullptr: not called
};
struct cuda_int4_generate_stats {
  double load_s;
  double prefill_s;
  double decode_s;
  double time_to_first_token_s;
  int64_t prompt_tokens;              // read; fewer than given only if on_prefill ended it
  int64_t new_tokens;                 // chosen, a stop token included
  uint64_t peak_memory_bytes;         // of the process
  uint64_t peak_device_memory_bytes;  // of the model; 0 on the CPU
  int32_t stop_reason;  // 0 max_new_tokens, 1 stop token, 2 end of context, 3 the callback
  int32_t n_sequences;  // 1; in a total those that chose a token. Tokens per second of decoding are
                        // (new_tokens - n_sequences) / decode_s
};
// start_pos: tokens already in the cache; 0 is a new conversation and resets the model. The last token
// chosen has not been through the model: to go on, start_pos += prompt_tokens + new_tokens - 1, and the
// next prompt begins with that token.
CUDA_INT4_API int32_t cuda_int4_generate(cuda_int4_model* model, const int64_t* prompt,
                                         uint64_t n_prompt, int64_t start_pos,
                                         const cuda_int4_generate_config* config,
                                         cuda_int4_token_callback callback, void* user,
                                         cuda_int4_generate_stats* stats);
// One of several conversations: the arguments of cuda_int4_generate.
struct cuda_int4_generate_request {
  const int64_t* prompt;
  uint64_t n_prompt;
  int64_t start_pos;                  // 0 in all, or in none: each then goes on in its row
  cuda_int4_generate_config config;   // prefill_chunk: the least of all counts
  cuda_int4_token_callback callback;  // non-zero ends this conversation, the others go on
  void* user;                         // for callback and config.on_prefill
  cuda_int4_generate_stats stats;     // written: of this conversation
};
// All of them together, number i in row i of the model's cache: one forward reads and writes a token of
// each, of up to max_sequences at once (cuda_int4_decode_info); more run in groups, a model of one at a
// time one after the other. Each gets the tokens that it would get alone but for rounding: with more
// rows a kernel may add up in another order. Draws hang on config.seed, config.sequence and the
// position, not on the row. total may be nullptr: prompt_tokens, new_tokens and times of all together,
// the stop reason of the last to end. An error of one ends all; every stats says how far it got.
CUDA_INT4_API int32_t cuda_int4_generate_several(cuda_int4_model* model,
                                                 cuda_int4_generate_request* requests,
                                                 uint64_t n_requests,
                                                 cuda_int4_generate_stats* total);
// One row of logits to one token, as generate does it: of config the sampling fields are read, and
// position (tokens before it in the conversation) counts the random number generator.
CUDA_INT4_API int32_t cuda_int4_sample(const cuda_int4::TensorView* logits,
                                       const cuda_int4_generate_config* config, int64_t position,
                                       int64_t* token);
// The same on CUDA, as the loop queues it behind a step; all but words is device memory. `rule` is what
// a row of args has for a configuration.
CUDA_INT4_API int32_t cuda_int4_sample_rule(const cuda_int4_generate_config* config,
                                            cuda_int4::SampleRule* rule);
CUDA_INT4_API int32_t cuda_int4_sample_rows(const cuda_int4::SampleArgs* args, void* stream);
