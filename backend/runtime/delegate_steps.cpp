// DelegateMethod as DecodeSteps: the nested method on inputs that stay on the device, with the sampler
// behind it, as a replayed graph from the second step of a shape on.
#include <algorithm>
#include <cstring>
#include <thread>

#include "../kernels/cuda/cuda_kernels.h"
#include "delegate_method.h"
#include "errors.h"

// get_input is deprecated for callers of models; a delegate has no other way to look at one.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace cuda_int4 {

using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

constexpr int64_t kSlots = 4;  // of the ring that the host reads tokens from
static_assert(kSlots > DecodeSteps::kMaxQueued, "a slot is read before it is written again");
constexpr uint64_t kStepMask = (uint64_t{1} << kStepBits) - 1;

bool is_int64(const EValue& value, int64_t least_ndim, int64_t most_ndim) {
  return value.isTensor() && value.toTensor().scalar_type() == executorch::aten::ScalarType::Long &&
         value.toTensor().dim() >= least_ndim && value.toTensor().dim() <= most_ndim;
}

uint64_t read_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

}  // namespace

bool DelegateMethod::can_step() {
  const bool has_sampler = device_->reads_host_memory() ? cpu_loop_ : cuda_kernels() != nullptr;
  return device_loop_ && has_sampler && writes_by_position_ && method_->inputs_size() == 2 &&
         method_->outputs_size() > 0 && is_int64(method_->get_input(0), 2, 2) &&
         is_int64(method_->get_input(1), 1, 2) && outputs_[0].is_tensor;
}

Error DelegateMethod::begin_steps(const DecodeRow* rows, size_t n_rows, int64_t vocab_size) {
  const DeviceScope scope(*device_);
  const auto info = method_->method_meta().input_tensor_meta(0);
  if (!info.ok()) return info.error();
  if (n_rows == 0 || n_rows > size_t(info->sizes()[0]))
    return fail(Error::InvalidArgument,
                "decode: expected 1 to %d rows, those of the model's tokens, got %zu; give fewer "
                "sequences at once",
                int(info->sizes()[0]), n_rows);
  Error error = place_steps(n_rows);
  if (error != Error::Ok) return error;
  steps_.n_rows = n_rows;
  steps_.vocab_size = vocab_size;
  steps_.n_queued = steps_.n_taken = 0;
  steps_.is_greedy = true;
  const StepState state = step_state(steps_.state.host);
  for (size_t i = 0; i < n_rows; ++i) {
    state.rows[i] = {rows[i].rule, rows[i].end_position, 0};
    state.tokens[i] = rows[i].token;
    state.positions[i] = rows[i].position;
    steps_.is_greedy = steps_.is_greedy && rows[i].rule.scale == 0;
  }
  std::memset(steps_.words.host, 0, steps_.words.host_nbytes);  // steps are numbered from 1
  steps_.samplers.clear();
  if (device_->reads_host_memory()) {
    for (size_t i = 0; i < n_rows; ++i) steps_.samplers.emplace_back(rows[i].rule);
  } else {
    *fault() = {};
  }
  error = device_->upload_async(steps_.state.device, steps_.state.host, StepState::nbytes(n_rows));
  if (error != Error::Ok) return error;
  // The key of a call with inputs of these sizes: its graph is another, its outputs are the same.
  steps_.key = {int64_t(n_rows), 1, int64_t(n_rows)};
  if (method_->get_input(1).toTensor().dim() == 2) steps_.key.push_back(1);
  steps_.active = true;
  return Error::Ok;
}

DelegateMethod::StepState DelegateMethod::step_state(void* memory) const {
  auto* rows = static_cast<SampleRow*>(memory);
  auto* tokens = reinterpret_cast<int64_t*>(rows + steps_.n_rows);
  return {rows, tokens, tokens + steps_.n_rows};
}

/// Memory for the states of the rows and for the words that the host reads.
Error DelegateMethod::place_steps(size_t n_rows) {
  const size_t nbytes = StepState::nbytes(n_rows);
  const void* before[2] = {steps_.state.device, steps_.words.host};
  Error error = Error::Ok;
  if (steps_.state.nbytes < nbytes) {
    Staged state;
    error = stage("the states of rows, number", n_rows, nbytes, &state);
    if (error != Error::Ok) return error;
    steps_.state.device = state.device;
    steps_.state.nbytes = nbytes;
  }
  error = stage_host(nbytes, &steps_.state);
  if (error == Error::Ok) error = stage_host(kSlots * n_rows * sizeof(uint64_t), &steps_.words);
  // Graphs hold their addresses.
  if (before[0] != steps_.state.device || before[1] != steps_.words.host) shapes_.forget_steps();
  return error;
}

/// Queues the nested method on the inputs that lie on the device, and the sampler behind it.
Error DelegateMethod::run_step() {
  const auto n_rows = SizesType(steps_.n_rows);
  const StepState state = step_state(steps_.state.device);
  for (size_t i = 0; i < 2; ++i) {
    const Tensor expected = method_->get_input(i).toTensor();
    SizesType sizes[2] = {n_rows, 1};
    StridesType strides[2] = {1, 1};
    executorch::aten::DimOrderType dim_order[2] = {0, 1};
    TensorImpl impl(expected.scalar_type(), expected.dim(), sizes,
                    i == 0 ? state.tokens : state.positions, dim_order, strides);
    const Error error = method_->set_input(EValue(Tensor(&impl)), i);
    if (error != Error::Ok)
      return fail_unless_explained(
          error, "decode: expected a model that takes one token of each of %d rows", int(n_rows));
  }
  Error error = bind_step();
  if (error == Error::Ok) error = run();
  if (error != Error::Ok) return error;
  note_outputs(&results_);
  return sample_step(results_[0]);
}

/// Memory for the outputs where a call writes to the caller's.
Error DelegateMethod::bind_step() {
  if (!device_->reads_host_memory()) return Error::Ok;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    Output& output = outputs_[i];
    if (!output.is_tensor || !output.bindable) continue;
    Error error = Error::Ok;
    if (output.staged.device == nullptr)
      error = stage("output", i, output.max_nbytes, &output.staged);
    if (error == Error::Ok)
      error = method_->set_output_data_ptr(output.staged.device, output.max_nbytes, i);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

Error DelegateMethod::sample_step(const SettledOutput& logits) {
  const Tensor tensor = method_->get_output(0).toTensor();
  const int64_t row_stride = logits.sizes.empty() ? 0 : logits.sizes.back();
  if (row_stride < steps_.vocab_size ||
      tensor.numel() != row_stride * static_cast<int64_t>(steps_.n_rows))
    return fail(Error::InvalidState,
                "decode: expected one row of at least %lld logits for each of %zu rows of tokens, "
                "got %lld logits in rows of %lld; export the last token's logits only",
                static_cast<long long>(steps_.vocab_size), steps_.n_rows,
                static_cast<long long>(tensor.numel()), static_cast<long long>(row_stride));
  SampleArgs args = {};
  args.logits = logits.data;
  args.n_rows = int64_t(steps_.n_rows);
  args.vocab_size = steps_.vocab_size;
  args.row_stride = row_stride;
  args.dtype = int32_t(tensor.scalar_type());
  args.is_greedy = steps_.is_greedy;
  const StepState state = step_state(steps_.state.device);
  args.rows = state.rows;
  args.tokens = state.tokens;
  args.positions = state.positions;
  args.words = static_cast<uint64_t*>(steps_.words.host);
  args.n_slots = kSlots;
  if (device_->reads_host_memory()) {
    sample_rows(args, &steps_.samplers);
    return Error::Ok;
  }
  ExecutionContext context{};
  context.device = device_->kind();
  context.stream = device_->stream();
  return fail(cuda_kernels()->sample(args, context));
}

Error DelegateMethod::queue_step() {
  if (!steps_.active)
    return fail(Error::InvalidState, "decode: expected begin_steps before queue_step, got none");
  if (steps_.n_queued - steps_.n_taken >= uint64_t(kMaxQueued))
    return fail(Error::InvalidState,
                "decode: expected fewer than %d steps in the queue, got as many; take one first",
                int(kMaxQueued));
  const DeviceScope scope(*device_);
  const bool settles = cuda_graph_ && !device_->reads_host_memory();
  SettledShape* shape = settles ? shapes_.find(steps_.key) : nullptr;
  SettledGraph* step = nullptr;
  if (shape != nullptr) {
    step = &shape->steps[steps_.is_greedy];
    if (step->vocab_size != steps_.vocab_size) *step = {};
    step->vocab_size = steps_.vocab_size;
    settle(step, [this] { return run_step(); });
  }
  Error error = Error::Ok;
  if (step != nullptr && step->graph != nullptr) {
    device_->push_range("cuda_int4: graph");
    error = device_->launch(*step->graph);
    device_->pop_range();
    ++replays_;
  } else {
    error = run_step();
    ++eager_runs_;
    if (error == Error::Ok && settles && shape == nullptr)
      shapes_.add(steps_.key).outputs = results_;
  }
  if (error == Error::Ok) ++steps_.n_queued;
  return error;
}

Error DelegateMethod::take_step(DecodedToken* tokens) {
  if (!steps_.active)
    return fail(Error::InvalidState, "decode: expected begin_steps before take_step, got none");
  if (steps_.n_taken == steps_.n_queued)
    return fail(Error::InvalidState, "decode: expected a step in the queue, got none; queue one");
  const uint64_t* words =
      static_cast<const uint64_t*>(steps_.words.host) + steps_.n_taken % kSlots * steps_.n_rows;
  ++steps_.n_taken;
  for (size_t i = 0; i < steps_.n_rows; ++i) {
    const Error error = wait_for_word(words + i, steps_.n_taken & kStepMask);
    if (error != Error::Ok) return error;
    const uint64_t word = read_word(words + i);
    tokens[i] = {int64_t(sampled_token(word)), sample_status(word)};
  }
  return device_->reads_host_memory() ? Error::Ok : fault_error();
}

/// The kernel writes it over the bus: watched in a loop, as cudaStreamSynchronize watches, too.
Error DelegateMethod::wait_for_word(const uint64_t* word, uint64_t step) {
  constexpr int kLooks = 1 << 14;  // before the device is asked whether it works at all
  while (true) {
    for (int i = 0; i < kLooks; ++i) {
      if (sampled_step(read_word(word)) == step) return Error::Ok;
      if (i % 256 == 255) std::this_thread::yield();
    }
    bool idle = false;
    const Error error = device_->query(&idle);
    if (error != Error::Ok) return error;
    if (idle && sampled_step(read_word(word)) != step)
      return fail(Error::Internal, "decode: device %s has ended a step without its tokens",
                  device_->name());
  }
}

Error DelegateMethod::stop_row(size_t row) {
  if (!steps_.active || row >= steps_.n_rows)
    return fail(Error::InvalidState, "decode: expected a row in progress, got number %zu", row);
  const DeviceScope scope(*device_);
  int64_t& end = step_state(steps_.state.host).rows[row].end_position;
  end = 0;
  return device_->upload_async(&step_state(steps_.state.device).rows[row].end_position, &end,
                               sizeof(end));
}

Error DelegateMethod::end_steps() {
  if (!steps_.active) return Error::Ok;
  steps_.active = false;
  return device_->synchronize();
}

}  // namespace cuda_int4
