// DelegateMethod::execute: on the CPU in the caller's own memory; on a GPU through staging memory,
// and from the second call of a shape on as a replayed graph.
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/platform/log.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "../kernels/checks.h"
#include "delegate_method.h"
#include "errors.h"
#include "execution.h"
#include "parallel.h"
#include "program_check.h"
#include "tensor_bridge.h"

// mutable_input is deprecated for callers of models; a delegate has no other way to pass an int on.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace cuda_int4 {

using executorch::aten::DimOrderType;
using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::EventTracer;
using executorch::runtime::EventTracerProfilingLevel;

namespace {

Error sizes_error(size_t i, Error error, const Tensor& given) {
  TensorView view;
  view_of(given, &view);
  return fail_unless_explained(error,
                               "input %zu: expected sizes the model was exported for, got %s", i,
                               ShapeText(view).text);
}

/// "cuda_int4::index_put_", "cuda_int4::copy_"; not "cuda_int4::index_put.out".
bool writes_in_place(const std::string& op) {
  const size_t end = std::min(op.find('.'), op.size());
  return end > 0 && op[end - 1] == '_';
}

}  // namespace

Error DelegateMethod::execute(Args args, EventTracer* tracer) {
  const size_t n_inputs = method_->inputs_size();
  if (args.size() != n_inputs + outputs_.size())
    return fail(
        Error::InvalidProgram,
        "delegate call: expected %zu inputs and %zu outputs, got %zu arguments; the .pte is "
        "damaged, export it again",
        n_inputs, outputs_.size(), args.size());
  const Args inputs(args.data(), n_inputs), outputs(args.data() + n_inputs, outputs_.size());
  for (size_t i = 0; i < n_inputs; ++i) {
    const Error error = check_input(i, *inputs[i]);
    if (error != Error::Ok) return error;
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Error error = check_output(i, *outputs[i]);
    if (error != Error::Ok) return error;
  }
  if (kept_ != nullptr) return time_part(inputs, outputs);
  if (profile_rounds_ > 0) return take_profile(inputs, outputs);
  if (tracer != nullptr &&
      tracer->event_tracer_profiling_level() < EventTracerProfilingLevel::kProfileAllEvents)
    tracer = nullptr;
  marking_ = tracer != nullptr;
  const uint64_t start_ticks = executorch::runtime::pal_current_ticks();
  const Error error = device_->reads_host_memory() ? execute_in_place(inputs, outputs)
                                                   : execute_staged(inputs, outputs);
  marking_ = false;
  if (error == Error::Ok && tracer != nullptr) report_times(tracer, start_ticks);
  return error;
}

/// Everything but the sizes, which set_input checks.
Error DelegateMethod::check_input(size_t i, const EValue& value) {
  const EValue& nested = method_->get_input(i);
  if (!nested.isTensor()) {
    // Ints (a dynamic size) are not planned, and arrive as None in the nested program.
    if (!value.isInt() && !value.isDouble() && !value.isBool() && !value.isNone())
      return fail(Error::InvalidType, "input %zu: expected a number, got another type of value", i);
    return Error::Ok;
  }
  if (!value.isTensor())
    return fail(Error::InvalidType, "input %zu: expected a tensor, got another type of value", i);
  const Tensor& expected = nested.toTensor();
  const Tensor& given = value.toTensor();
  TensorView expected_view, given_view;
  if (!view_of(given, &given_view) || !view_of(expected, &expected_view) ||
      given_view.dtype != expected_view.dtype)
    return fail(Error::InvalidArgument, "input %zu: expected dtype %s, got %s", i,
                dtype_name(DType(expected.scalar_type())), dtype_name(DType(given.scalar_type())));
  if (given_view.ndim != expected_view.ndim ||
      !std::equal(given.dim_order().begin(), given.dim_order().end(), expected.dim_order().begin()))
    return fail(
        Error::InvalidArgument,
        "input %zu: expected %d dimensions in the order of memory it was exported with, got "
        "%s in another; pass x.contiguous()",
        i, expected_view.ndim, ShapeText(given_view).text);
  return Error::Ok;
}

Error DelegateMethod::check_output(size_t i, const EValue& value) {
  if (!outputs_[i].is_tensor) return Error::Ok;
  if (!value.isTensor())
    return fail(Error::InvalidType, "output %zu: expected a tensor to write to", i);
  const Tensor& given = value.toTensor();
  const Tensor& nested = method_->get_output(i).toTensor();
  if (given.scalar_type() != nested.scalar_type())
    return fail(Error::InvalidArgument, "output %zu: expected dtype %s, got %s", i,
                dtype_name(DType(nested.scalar_type())), dtype_name(DType(given.scalar_type())));
  return Error::Ok;
}

Error DelegateMethod::run() {
  ExecutionContext execution{};
  execution.device = device_->kind();
  execution.stream = device_->stream();
  execution.parallel_for = execution.device == DeviceKind::kCpu ? &parallel_for : nullptr;
  execution.fault = fault();
  execution.constant_weights = true;  // check_nested
  if (shared_activation_ != nullptr) shared_activation_->forget();
  const ExecutionScope scope(execution, shared_activation_.get());
  const size_t before = temp_->resets();
  struct Listening {
    TempArena& arena;
    ~Listening() { arena.set_on_reset({}); }
  } const listening{*temp_};
  // The first reset is the execution's, each later one ends an instruction.
  temp_->set_on_reset([&] {
    const size_t next = temp_->resets() - before - 1;
    if (next > 0) end_instruction(next - 1);
    begin_instruction(next);
  });
  const Error error = method_->execute();
  end_instruction(operators_.size());
  if (error == Error::Ok) return error;
  const std::string op = operator_at(blob_.program, name_, temp_->resets() - before - 2);
  return fail_unless_explained(error,
                               "nested program: %s refused its arguments with %s (the log says "
                               "why); run with sizes and indices the model was exported for",
                               op.c_str(), executorch::runtime::to_string(error));
}

/// After the last one, with their number, too.
void DelegateMethod::begin_instruction(size_t i) {
  set_current_instruction(uint32_t(i));
  if (leaving_out_) {
    device_->leave_out(i < operators_.size() && kept_[i] == 0);
    set_current_stream(device_->stream());
  }
  if (marking_) device_->mark(i);
  if (i < operators_.size()) {
    device_->push_range(operators_[i].c_str());
    in_range_ = true;
  }
}

void DelegateMethod::end_instruction(size_t i) {
  if (in_range_) device_->pop_range();
  in_range_ = false;
  // What it wrote to may be what was quantised.
  if (shared_activation_ != nullptr && i < operators_.size() && writes_in_place(operators_[i]))
    shared_activation_->forget();
}

// ---- in the caller's memory ----

Error DelegateMethod::execute_in_place(Args inputs, Args outputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const EValue& value = *inputs[i];
    if (!value.isTensor()) {
      method_->mutable_input(i) = value;
      continue;
    }
    const Error error = method_->set_input(value, i);
    if (error != Error::Ok) return sizes_error(i, error, value.toTensor());
  }
  Error error = Error::Ok;
  for (size_t i = 0; error == Error::Ok && i < outputs.size(); ++i)
    error = bind_output(i, *outputs[i]);
  if (error == Error::Ok) error = run();
  for (size_t i = 0; error == Error::Ok && i < outputs.size(); ++i)
    error = hand_over(i, *outputs[i]);
  return error;
}

Error DelegateMethod::bind_output(size_t i, EValue& value) {
  const Output& output = outputs_[i];
  if (!output.is_tensor || !output.bindable) return Error::Ok;
  Tensor& given = value.toTensor();
  // The caller's tensor has the sizes of the last call; its memory is planned for the greatest ones.
  const Error error =
      executorch::runtime::resize_tensor(given, {output.max_sizes.data(), output.max_sizes.size()});
  if (error != Error::Ok || given.const_data_ptr() == nullptr)
    return fail(
        Error::InvalidArgument,
        "output %zu: expected memory for %zu bytes, got less; the .pte is damaged, export it "
        "again",
        i, output.max_nbytes);
  return method_->set_output_data_ptr(given.mutable_data_ptr(), output.max_nbytes, i);
}

namespace {

/// The caller's tensor takes the sizes of the result.
Error resize_output(size_t i, Tensor& to, executorch::aten::ArrayRef<SizesType> sizes) {
  if (executorch::runtime::resize_tensor(to, sizes) == Error::Ok) return Error::Ok;
  return fail(Error::InvalidArgument,
              "output %zu: the result does not fit the memory planned for it; run with at most the "
              "sizes the model was exported for",
              i);
}

Error no_output_memory(size_t i) {
  return fail(Error::InvalidArgument, "output %zu: expected memory to write to, got none", i);
}

}  // namespace

Error DelegateMethod::hand_over(size_t i, EValue& value) {
  const EValue& result = method_->get_output(i);
  if (!outputs_[i].is_tensor) {
    value = result;
    return Error::Ok;
  }
  const Tensor& from = result.toTensor();
  Tensor& to = value.toTensor();
  const Error error = resize_output(i, to, from.sizes());
  if (error != Error::Ok) return error;
  // The same pointer but where the result is a view, an input, a constant or a cache.
  if (from.const_data_ptr() == to.const_data_ptr() || from.nbytes() == 0) return Error::Ok;
  if (to.const_data_ptr() == nullptr || from.const_data_ptr() == nullptr)
    return no_output_memory(i);
  return device_->copy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
}

// ---- through staging memory ----

Error DelegateMethod::execute_staged(Args inputs, Args outputs) {
  const DeviceScope scope(*device_);
  key_.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Error error = stage_input(i, *inputs[i]);
    if (error != Error::Ok) return error;
  }
  *fault() = {};

  SettledShape* shape = cuda_graph_ && !marking_ ? shapes_.find(key_) : nullptr;
  if (shape != nullptr) settle(&shape->call, [&] { return run_staged(inputs); });
  Error error = Error::Ok;
  if (shape != nullptr && shape->call.graph != nullptr) {
    device_->push_range("cuda_int4: graph");
    error = device_->launch(*shape->call.graph);
    device_->pop_range();
    ++replays_;
  } else {
    error = run_staged(inputs);
    ++eager_runs_;
    if (error == Error::Ok) {
      note_outputs(&results_);
      if (cuda_graph_ && !marking_) {
        if (shape == nullptr) shape = &shapes_.add(key_);
        shape->outputs = results_;
      }
    }
  }
  if (error == Error::Ok) error = download(shape != nullptr ? shape->outputs : results_, outputs);
  // After an error too: nothing of this call is left in the queue.
  const Error finished = device_->synchronize();
  if (error == Error::Ok) error = finished;
  if (error == Error::Ok) error = fault_error();
  if (error != Error::Ok) return error;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs_[i].is_tensor) continue;
    Tensor& to = outputs[i]->toTensor();
    if (to.nbytes() > 0 && !device_->is_page_locked(to.const_data_ptr(), to.nbytes()))
      std::memcpy(to.mutable_data_ptr(), outputs_[i].staged.host, to.nbytes());
  }
  return Error::Ok;
}

Error DelegateMethod::stage_host(size_t nbytes, Staged* staged) {
  if (staged->host != nullptr && staged->host_nbytes >= nbytes) return Error::Ok;
  device_->free_host(staged->host);
  staged->host = device_->allocate_host(nbytes);
  staged->host_nbytes = staged->host == nullptr ? 0 : nbytes;
  if (staged->host != nullptr) return Error::Ok;
  return fail(Error::MemoryAllocationFailed,
              "device %s: expected %zu bytes of host memory that can be page-locked, there are "
              "none; run with less of it in use, or with shorter inputs",
              device_->name(), nbytes);
}

/// Its bytes to page-locked memory, its shape or value to the key.
Error DelegateMethod::stage_input(size_t i, const EValue& value) {
  if (!value.isTensor()) {
    key_.push_back(int64_t(value.tag));
    int64_t bits = 0;
    if (value.isInt()) bits = value.toInt();
    if (value.isBool()) bits = value.toBool();
    if (value.isDouble()) {
      const double number = value.toDouble();
      std::memcpy(&bits, &number, sizeof(bits));
    }
    key_.push_back(bits);
    return Error::Ok;
  }
  const Tensor& given = value.toTensor();
  key_.insert(key_.end(), given.sizes().begin(), given.sizes().end());
  if (given.nbytes() > inputs_[i].nbytes) return sizes_error(i, Error::InvalidArgument, given);
  if (given.nbytes() == 0) return Error::Ok;
  if (given.const_data_ptr() == nullptr)
    return fail(Error::InvalidArgument, "input %zu: expected data, got nullptr", i);
  std::memcpy(inputs_[i].host, given.const_data_ptr(), given.nbytes());
  return Error::Ok;
}

/// Uploads the staged inputs and queues the nested method on them.
Error DelegateMethod::run_staged(Args inputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const EValue& value = *inputs[i];
    if (!value.isTensor()) {
      method_->mutable_input(i) = value;
      continue;
    }
    const Tensor& given = value.toTensor();
    executorch::aten::TensorImpl impl(
        given.scalar_type(), given.dim(), const_cast<SizesType*>(given.sizes().data()),
        inputs_[i].device, const_cast<DimOrderType*>(given.dim_order().data()),
        const_cast<StridesType*>(given.strides().data()));
    Error error = method_->set_input(EValue(Tensor(&impl)), i);
    if (error != Error::Ok) return sizes_error(i, error, given);
    error = device_->upload_async(inputs_[i].device, inputs_[i].host, given.nbytes());
    if (error != Error::Ok) return error;
  }
  return run();
}

/// Of all memory that graphs hold addresses of and that grows.
size_t DelegateMethod::generation() const {
  return temp_->generation() + shared_activation_->generation();
}

/// A run as a graph; nullptr where it cannot be recorded.
std::unique_ptr<DeviceGraph> DelegateMethod::record(const std::function<Error()>& run) {
  Capture capture(*device_);
  if (!capture.going()) return nullptr;
  const Error error = run();
  std::unique_ptr<DeviceGraph> graph = capture.end();
  if (error == Error::Ok) return graph;
  clear_last_error();
  return nullptr;
}

/// A graph of `run` that is not stale, or none, and it runs eagerly.
void DelegateMethod::settle(SettledGraph* settled, const std::function<Error()>& run) {
  constexpr int kMaxFailures = 2;
  if (settled->graph != nullptr && settled->generation == generation()) return;
  settled->graph.reset();
  if (settled->failed_captures == kMaxFailures) return;
  settled->graph = record(run);
  settled->generation = generation();
  if (settled->graph != nullptr) {
    ++captures_;
  } else if (++settled->failed_captures == kMaxFailures) {
    ET_LOG(Info, "cuda_int4: a shape of inputs that cannot be captured in a graph runs eagerly");
  }
}

void DelegateMethod::note_outputs(std::vector<SettledOutput>* outputs) {
  outputs->resize(outputs_.size());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    SettledOutput& output = (*outputs)[i];
    const EValue& result = method_->get_output(i);
    if (!outputs_[i].is_tensor) {
      output.number = result;
      continue;
    }
    const Tensor& tensor = result.toTensor();
    output.data = tensor.const_data_ptr();
    output.nbytes = tensor.nbytes();
    output.sizes.assign(tensor.sizes().begin(), tensor.sizes().end());
  }
}

/// Queues the transfer of the results to the caller's memory, where that is page-locked, else to
/// ours.
Error DelegateMethod::download(const std::vector<SettledOutput>& results, Args outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const SettledOutput& result = results[i];
    if (!outputs_[i].is_tensor) {
      *outputs[i] = result.number;
      continue;
    }
    Tensor& to = outputs[i]->toTensor();
    Error error = resize_output(i, to, {result.sizes.data(), result.sizes.size()});
    if (error != Error::Ok) return error;
    if (result.nbytes == 0) continue;
    void* host = to.mutable_data_ptr();
    if (host == nullptr || result.data == nullptr) return no_output_memory(i);
    if (!device_->is_page_locked(host, result.nbytes)) {
      error = stage_host(result.nbytes, &outputs_[i].staged);
      if (error != Error::Ok) return error;
      host = outputs_[i].staged.host;
    }
    error = device_->download_async(host, result.data, result.nbytes);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

Error DelegateMethod::fault_error() const {
  const DeviceFault& found = *fault();
  if (found.kind == 0) return Error::Ok;
  const std::string op = operator_at(blob_.program, name_, found.op_index);
  if (found.kind == 2)
    return fail(Error::InvalidArgument,
                "nested program: %s: expected divisors other than 0 for integers, got 0; run with "
                "inputs the model was made for",
                op.c_str());
  return fail(Error::InvalidArgument,
              "nested program: %s: expected indices in 0..%" PRId64 ", got %" PRId64
              "; run with indices the model was exported for",
              op.c_str(), found.limit - 1, found.value);
}

// ---- times ----

/// What instructions are, for who reads their times.
void DelegateMethod::describe_instructions() {
  std::vector<LinearCall> calls;
  if (program_linears(blob_.program, &calls) != Error::Ok) calls.clear();
  size_t n_linears = 0;
  profile_.instructions.clear();
  for (const std::string& op : operators_) {
    std::string detail;
    if (op == "cuda_int4::linear.out" && n_linears < calls.size()) {
      const LinearCall& call = calls[n_linears++];
      for (const LinearRecord& linear : blob_.linears)
        if (call.qdata == blob_.constants[size_t(linear.qdata)].key)
          detail = linear.name + " N=" + std::to_string(linear.N) +
                   " K=" + std::to_string(linear.K) +
                   (linear.activation == "int8" ? " w4a8" : " w4a16");
    }
    profile_.instructions.push_back({op, detail, 0});
  }
}

void DelegateMethod::report_times(EventTracer* tracer, uint64_t start_ticks) {
  const auto ratio = executorch::runtime::pal_ticks_to_ns_multiplier();
  const double ticks_per_us = 1000.0 * double(ratio.denominator) / double(ratio.numerator);
  double at_us = 0;
  for (size_t i = 0; i < operators_.size(); ++i) {
    const double us = std::max(0.0, device_->microseconds_between(i, i + 1));
    if (!operators_[i].empty())
      tracer->log_profiling_delegate(operators_[i].c_str(),
                                     executorch::runtime::kUnsetDelegateDebugIntId,
                                     start_ticks + uint64_t(at_us * ticks_per_us),
                                     start_ticks + uint64_t((at_us + us) * ticks_per_us));
    at_us += us;
  }
}

/// One run with marks: mark i is where instruction i begins.
Error DelegateMethod::profile_round(DeviceGraph* graph, Args inputs, Args outputs) {
  if (graph != nullptr) {
    const Error error = device_->launch(*graph);
    return error == Error::Ok ? device_->synchronize() : error;
  }
  marking_ = true;
  const Error error = device_->reads_host_memory() ? execute_in_place(inputs, outputs)
                                                   : execute_staged(inputs, outputs);
  marking_ = false;
  return error;
}

Error DelegateMethod::take_profile(Args inputs, Args outputs) {
  describe_instructions();
  const DeviceScope scope(*device_);
  const bool staged = !device_->reads_host_memory();
  std::unique_ptr<DeviceGraph> plain, marked;
  if (staged) {
    Error error = execute_staged(inputs, outputs);  // all memory has grown to its size
    if (error != Error::Ok) return error;
    const auto run = [&] { return run_staged(inputs); };
    plain = record(run);
    marking_ = true;
    marked = record(run);
    marking_ = false;
    if (plain == nullptr) marked.reset();
    if (marked == nullptr) plain.reset();
  }
  const size_t n = operators_.size();
  std::vector<std::vector<double>> us(n + 1);
  for (int round = 0; round < profile_rounds_; ++round) {
    const Error error = profile_round(marked.get(), inputs, outputs);
    if (error != Error::Ok) return error;
    for (size_t i = 0; i < n; ++i) us[i].push_back(device_->microseconds_between(i, i + 1));
    double total_us = device_->microseconds_between(0, n);
    if (plain != nullptr) {
      device_->mark(0);
      Error failed = device_->launch(*plain);
      device_->mark(1);
      if (failed == Error::Ok) failed = device_->synchronize();
      if (failed != Error::Ok) return failed;
      total_us = device_->microseconds_between(0, 1);
    }
    us[n].push_back(total_us);
  }
  const auto median = [](std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };
  for (size_t i = 0; i < n; ++i) profile_.instructions[i].us = median(us[i]);
  profile_.total_us = median(us[n]);
  return Error::Ok;
}

/// The outputs keep what they had: what is left out may be what makes them.
Error DelegateMethod::time_part(Args inputs, Args outputs) {
  if (device_->reads_host_memory())
    return fail(Error::NotSupported,
                "time_part: expected a GPU, where a call is recorded before it runs, got %s; ask "
                "for a profile, which times each instruction",
                device_->name());
  const DeviceScope scope(*device_);
  Error error = execute_staged(inputs, outputs);  // all memory has grown to its size
  if (error != Error::Ok) return error;
  leaving_out_ = true;
  const std::unique_ptr<DeviceGraph> graph = record([&] { return run_staged(inputs); });
  leaving_out_ = false;
  if (graph == nullptr)
    return fail(Error::NotSupported,
                "time_part: expected a call that can be recorded as a CUDA graph, got one that "
                "cannot; ask for a profile, which times each instruction");
  // Several in a row, as tokens follow each other: the launch of the next is over when its turn is.
  constexpr int kInARow = 4;
  std::vector<double> us;
  for (int round = 0; round < profile_rounds_; ++round) {
    device_->mark(0);
    for (int i = 0; i < kInARow && error == Error::Ok; ++i) error = device_->launch(*graph);
    device_->mark(1);
    const Error finished = device_->synchronize();
    if (error == Error::Ok) error = finished;
    if (error != Error::Ok) return error;
    us.push_back(device_->microseconds_between(0, 1) / kInARow);
  }
  std::sort(us.begin(), us.end());
  profile_.instructions.clear();
  profile_.total_us = us[us.size() / 2];
  return Error::Ok;
}

Error DelegateMethod::reset() {
  for (const MutableBuffer& buffer : mutable_buffers_) {
    const Error error = device_->zero(buffer.data, buffer.nbytes);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

}  // namespace cuda_int4
