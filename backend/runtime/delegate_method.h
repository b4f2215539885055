// DelegateMethod -- one delegate blob, opened: its device, constants, caches and nested Method.
//
//   open      everything checked, every constant placed, the nested program loaded; nothing is left
//             to fail in execute but what a caller can get wrong
//   execute   bind inputs and outputs, run, hand outputs over; allocates nothing once shapes settle
//   reset     zero the mutable buffers (KV caches)
//
// Of a language model on a GPU it is the DecodeSteps, too, where can_step() says so.
//
// All memory it owns hangs on it. One thread at a time.
#pragma once

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/event_tracer.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "blob.h"
#include "constants.h"
#include "decode_steps.h"
#include "device.h"
#include "device_use.h"
#include "profile.h"
#include "sampler.h"
#include "settled_shapes.h"
#include "shared_activation.h"
#include "temp_arena.h"

namespace cuda_int4 {

class DelegateMethod final : public DecodeSteps {
 public:
  struct Options {
    const char* device = nullptr;  // see make_device
    bool verify_constants = true;
    bool cuda_graph = true;   // replay the calls of a shape that has been seen before
    bool device_loop = true;  // can_step() where it can be
    bool cpu_loop = false;    // on the CPU, too: the same steps, for tests of them
    // On CUDA: the caller's cudaStream_t; else a stream of the method's own.
    bool on_callers_stream = false;
    void* stream = nullptr;
  };

  /// `blob` stays readable for the life of the result; `store` only for the call, but the bytes it
  /// lends stay borrowed.
  static executorch::runtime::Error open(const void* blob, uint64_t blob_nbytes,
                                         const executorch::runtime::NamedDataMap* store,
                                         const Options& options,
                                         std::unique_ptr<DelegateMethod>* out);
  ~DelegateMethod() override;
  DelegateMethod(const DelegateMethod&) = delete;
  DelegateMethod& operator=(const DelegateMethod&) = delete;

  /// args: the inputs of the nested method, then its outputs; host memory. tracer: nullptr, or who
  /// is told how long each instruction took, which makes the call an eager one.
  executorch::runtime::Error execute(executorch::runtime::Span<executorch::runtime::EValue*> args,
                                     executorch::runtime::EventTracer* tracer = nullptr);
  /// The calls from now on are timed by running each `rounds` times; 0: no more.
  void set_profiling(int rounds) { profile_rounds_ = rounds; }
  /// The calls from now on are timed whole, `rounds` times, without the instructions for which
  /// `kept`, one entry for each, is 0; they give no results. nullptr: no more. On a GPU only.
  void set_timing_part(const uint8_t* kept, int rounds) {
    kept_ = kept;
    profile_rounds_ = kept == nullptr ? 0 : rounds;
  }
  size_t n_instructions() const { return operators_.size(); }
  /// Of the latest call that was timed.
  const Profile& profile() const { return profile_; }
  executorch::runtime::Error reset();

  /// Whether it can be the DecodeSteps: on a GPU (or with cpu_loop), its inputs tokens [B, S] and
  /// input_pos [S] or [B, S], its first output logits, and all its state caches that are written at
  /// given positions: a step more than wanted would change any other.
  bool can_step();
  executorch::runtime::Error begin_steps(const DecodeRow* rows, size_t n_rows,
                                         int64_t vocab_size) override;
  executorch::runtime::Error queue_step() override;
  executorch::runtime::Error take_step(DecodedToken* tokens) override;
  executorch::runtime::Error stop_row(size_t row) override;
  executorch::runtime::Error end_steps() override;

  DeviceUse device_use() const;
  Device& device() { return *device_; }

 private:
  struct MutableBuffer {
    void* data;
    size_t nbytes;
  };
  // Memory of an input or output where the device does not read the host's. Always the same device
  // memory: graphs hold its address.
  struct Staged {
    void* device = nullptr;
    void* host = nullptr;  // page-locked, grown on demand
    size_t nbytes = 0;     // of device
    size_t host_nbytes = 0;
  };
  struct Output {
    bool is_tensor;
    bool bindable;  // has no memory of its own: written straight into the caller's, or into staged
    size_t max_nbytes;
    std::vector<executorch::aten::SizesType> max_sizes;
    Staged staged;
  };
  // Of decoding in progress, in one piece of memory; the method's inputs stay free for other calls.
  struct StepState {
    SampleRow* rows;
    int64_t* tokens;
    int64_t* positions;
    static size_t nbytes(size_t n_rows) {
      return n_rows * (sizeof(SampleRow) + 2 * sizeof(int64_t));
    }
  };
  struct Steps {
    bool active = false;
    Staged state;
    Staged words;              // host: the ring of what the sampler says
    std::vector<int64_t> key;  // of their shape
    size_t n_rows = 0;
    int64_t vocab_size = 0;
    bool is_greedy = true;
    uint64_t n_queued = 0, n_taken = 0;
    std::vector<Sampler> samplers;  // of each row, on the CPU
  };
  using Args = executorch::runtime::Span<executorch::runtime::EValue*>;

  DelegateMethod() = default;
  // delegate_method.cpp
  executorch::runtime::Error check_ops();
  executorch::runtime::Error check_linears() const;
  executorch::runtime::Error check_values() const;
  executorch::runtime::Error check_nested(const executorch::runtime::Program& program) const;
  executorch::runtime::Error load_program();
  executorch::runtime::Error check_memory() const;
  executorch::runtime::Error load_method();
  executorch::runtime::Error place_mutable_buffers();
  executorch::runtime::Error stage(const char* what, size_t i, size_t nbytes, Staged* out);
  executorch::runtime::Error plan_inputs();
  executorch::runtime::Error plan_outputs();
  // delegate_execute.cpp
  executorch::runtime::Error check_input(size_t i, const executorch::runtime::EValue& value);
  executorch::runtime::Error check_output(size_t i, const executorch::runtime::EValue& value);
  executorch::runtime::Error run();
  void begin_instruction(size_t i);
  void end_instruction(size_t i);
  void describe_instructions();
  void report_times(executorch::runtime::EventTracer* tracer, uint64_t start_ticks);
  executorch::runtime::Error take_profile(Args inputs, Args outputs);
  executorch::runtime::Error time_part(Args inputs, Args outputs);
  executorch::runtime::Error profile_round(DeviceGraph* graph, Args inputs, Args outputs);
  executorch::runtime::Error execute_in_place(Args inputs, Args outputs);
  executorch::runtime::Error bind_output(size_t i, executorch::runtime::EValue& value);
  executorch::runtime::Error hand_over(size_t i, executorch::runtime::EValue& value);
  executorch::runtime::Error execute_staged(Args inputs, Args outputs);
  executorch::runtime::Error stage_host(size_t nbytes, Staged* staged);
  executorch::runtime::Error stage_input(size_t i, const executorch::runtime::EValue& value);
  executorch::runtime::Error run_staged(Args inputs);
  std::unique_ptr<DeviceGraph> record(const std::function<executorch::runtime::Error()>& run);
  size_t generation() const;
  void settle(SettledGraph* settled, const std::function<executorch::runtime::Error()>& run);
  void note_outputs(std::vector<SettledOutput>* outputs);
  executorch::runtime::Error download(const std::vector<SettledOutput>& results, Args outputs);
  DeviceFault* fault() const { return static_cast<DeviceFault*>(fault_memory_.host); }
  executorch::runtime::Error fault_error() const;
  // delegate_steps.cpp
  executorch::runtime::Error place_steps(size_t n_rows);
  StepState step_state(void* memory) const;
  executorch::runtime::Error run_step();
  executorch::runtime::Error bind_step();
  executorch::runtime::Error sample_step(const SettledOutput& logits);
  executorch::runtime::Error wait_for_word(const uint64_t* word, uint64_t step);

  // In the order of construction: what is below may point to what is above.
  std::unique_ptr<Device> device_;
  Blob blob_;
  std::vector<executorch::runtime::Kernel> kernels_;
  std::unique_ptr<Constants> constants_;
  std::vector<void*> allocations_;  // of device_, freed last
  std::vector<MutableBuffer> mutable_buffers_;
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_;
  executorch::extension::MallocMemoryAllocator method_memory_;
  std::unique_ptr<TempArena> temp_;
  std::optional<executorch::runtime::MemoryManager> memory_;
  std::optional<executorch::extension::BufferDataLoader> loader_;
  std::optional<executorch::runtime::Program> program_;
  std::string name_;  // of the nested method
  std::optional<executorch::runtime::Method> method_;
  std::vector<Staged> inputs_;
  std::vector<Output> outputs_;
  std::vector<std::string> operators_;  // of each instruction
  bool marking_ = false;                // instructions leave marks on device_
  bool in_range_ = false;
  int profile_rounds_ = 0;
  const uint8_t* kept_ = nullptr;  // set_timing_part
  bool leaving_out_ = false;       // the instructions that kept_ does not keep
  Profile profile_;
  // On a device that does not read host memory:
  std::unique_ptr<SharedActivation> shared_activation_;
  Staged fault_memory_;  // host: a DeviceFault
  bool cuda_graph_ = true, device_loop_ = true, cpu_loop_ = false;
  bool writes_by_position_ = false;
  std::vector<int64_t> key_;  // of the call in progress
  std::vector<SettledOutput> results_;
  SettledShapes shapes_;
  Steps steps_;
  uint64_t eager_runs_ = 0, captures_ = 0, replays_ = 0;
};

}  // namespace cuda_int4
