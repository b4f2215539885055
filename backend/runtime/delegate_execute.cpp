// DelegateMethod::execute: on the CPU in the caller's own memory; on a GPU through staging memory,
// and from the second call of a shape on as a replayed graph.
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/platform/log.h>

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

namespace {

Error sizes_error(size_t i, Error error, const Tensor& given) {
  TensorView view;
  view_of(given, &view);
  return fail_unless_explained(error,
                               "input %zu: expected sizes the model was exported for, got %s", i,
                               ShapeText(view).text);
}

}  // namespace

Error DelegateMethod::execute(Args args) {
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
  return device_->reads_host_memory() ? execute_in_place(inputs, outputs)
                                      : execute_staged(inputs, outputs);
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
  const ExecutionScope scope(execution);
  const size_t before = temp_->resets();
  // The first reset is the execution's, each later one ends an instruction.
  temp_->set_on_reset([&] { set_current_instruction(uint32_t(temp_->resets() - before - 1)); });
  const Error error = method_->execute();
  temp_->set_on_reset({});
  if (error == Error::Ok) return error;
  const std::string op = operator_at(blob_.program, name_, temp_->resets() - before - 2);
  return fail_unless_explained(error,
                               "nested program: %s refused its arguments with %s (the log says "
                               "why); run with sizes and indices the model was exported for",
                               op.c_str(), executorch::runtime::to_string(error));
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

  SettledShape* shape = cuda_graph_ ? shapes_.find(key_) : nullptr;
  if (shape != nullptr && (shape->graph == nullptr || shape->generation != temp_->generation()))
    capture(inputs, shape);
  Error error = Error::Ok;
  if (shape != nullptr && shape->graph != nullptr) {
    error = device_->launch(*shape->graph);
    ++replays_;
  } else {
    error = run_staged(inputs);
    ++eager_runs_;
    if (error == Error::Ok) {
      note_outputs(&results_);
      if (cuda_graph_) {
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

/// A run of this shape as a graph; none where it cannot be recorded, and the call runs eagerly.
void DelegateMethod::capture(Args inputs, SettledShape* shape) {
  constexpr int kMaxFailures = 2;
  shape->graph.reset();
  if (shape->failed_captures == kMaxFailures) return;
  const size_t generation = temp_->generation();
  if (device_->begin_capture()) {
    const Error error = run_staged(inputs);
    std::unique_ptr<DeviceGraph> graph = device_->end_capture();
    if (error == Error::Ok && graph != nullptr && temp_->generation() == generation) {
      shape->graph = std::move(graph);
      shape->generation = generation;
      ++captures_;
      return;
    }
  }
  clear_last_error();
  if (++shape->failed_captures == kMaxFailures)
    ET_LOG(Info, "cuda_int4: a shape of inputs that cannot be captured in a graph runs eagerly");
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
  return fail(Error::InvalidArgument,
              "nested program: %s: expected indices in 0..%" PRId64 ", got %" PRId64
              "; run with indices the model was exported for",
              op.c_str(), found.limit - 1, found.value);
}

Error DelegateMethod::reset() {
  for (const MutableBuffer& buffer : mutable_buffers_) {
    const Error error = device_->zero(buffer.data, buffer.nbytes);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

}  // namespace cuda_int4
