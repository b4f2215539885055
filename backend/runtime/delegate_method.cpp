#include "delegate_method.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "../kernels/checks.h"
#include "../kernels/ops.h"
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
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Kernel;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::MethodMeta;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Span;

namespace {

constexpr char kNested[] = "nested program";

/// A view of a constant by its record; no data yet.
TensorView view_of_record(const Blob& blob, int32_t index) {
  if (index < 0) return absent_view();
  const ConstantRecord& record = blob.constants[size_t(index)];
  TensorView view{};
  view.dtype = record.dtype;
  view.ndim = int32_t(record.sizes.size());
  std::copy(record.sizes.begin(), record.sizes.end(), view.sizes);
  make_contiguous(&view);
  return view;
}

}  // namespace

DelegateMethod::~DelegateMethod() {
  method_.reset();
  program_.reset();
  temp_.reset();
  constants_.reset();
  for (void* allocation : allocations_) device_->free(allocation);
  for (void* allocation : host_allocations_) device_->free_host(allocation);
}

Error DelegateMethod::open(const void* blob, uint64_t blob_nbytes, const NamedDataMap* store,
                           const Options& options, std::unique_ptr<DelegateMethod>* out) {
  std::unique_ptr<DelegateMethod> self(new DelegateMethod());
  Error error = read_blob(blob, blob_nbytes, &self->blob_);
  if (error == Error::Ok)
    error =
        make_device({options.device, &self->blob_.ops, options.on_callers_stream, options.stream},
                    &self->device_);
  if (error == Error::Ok) error = self->check_ops();
  if (error == Error::Ok) error = self->check_linears();
  if (error != Error::Ok) return error;
  self->constants_ = std::make_unique<Constants>(self->blob_.constants, *self->device_);
  error = self->constants_->place(store, options.verify_constants);
  if (error == Error::Ok) error = self->load_method();
  if (error == Error::Ok) error = self->place_mutable_buffers();
  if (error == Error::Ok) error = self->plan_inputs();
  if (error == Error::Ok) error = self->plan_outputs();
  if (error == Error::Ok) error = self->device_->synchronize();
  if (error != Error::Ok) return error;
  *out = std::move(self);
  return Error::Ok;
}

// ---- init ----

Error DelegateMethod::check_ops() {
  kernels_.reserve(blob_.ops.size());
  for (const std::string& op : blob_.ops) {
    const auto kernel = device_->find_kernel(op);
    if (kernel == nullptr)
      return fail(Error::DelegateInvalidCompatibility,
                  "op %s: expected an op that device %s of cuda_int4 %s runs, found one it lacks; "
                  "run it with the version that exported it, or export again with this one",
                  op.c_str(), device_->name(), CUDA_INT4_VERSION);
    kernels_.emplace_back(op.c_str(), kernel);
  }
  return Error::Ok;
}

Error DelegateMethod::check_linears() const {
  for (const LinearRecord& linear : blob_.linears) {
    LinearArgs args{};
    args.x = args.y = absent_view();
    args.qdata = view_of_record(blob_, linear.qdata);
    args.scale = view_of_record(blob_, linear.scale);
    args.zero_point = view_of_record(blob_, linear.zero_point);
    args.meta = view_of_record(blob_, linear.meta);
    args.bias = view_of_record(blob_, linear.bias);
    args.group_size = linear.group_size;
    args.layout_tag = linear.layout_tag.c_str();
    args.activation = linear.activation.c_str();
    args.name = linear.name.c_str();
    const Status status = validate_linear_weight(args);
    // Parts that disagree are the caller's mistake in eager; here they are the file's.
    if (status.code == StatusCode::kInvalidArgument)
      return fail(Error::InvalidProgram, "%s", status.message);
    if (!status.ok()) return fail(status);
    // Every layout so far keeps a row of qdata and of scale per output feature.
    const int64_t n_scales =
        int64_t(blob_.constants[size_t(linear.scale)].nbytes) / dtype_bytes(args.scale.dtype);
    if (args.qdata.sizes[0] != linear.N || n_scales * linear.group_size != linear.N * linear.K)
      return fail(Error::InvalidProgram,
                  "%s: expected parts of N=%" PRId64 " K=%" PRId64 " group_size=%" PRId64
                  ", found qdata %s and scale %s; the .pte is damaged, export it again",
                  linear.name.c_str(), linear.N, linear.K, linear.group_size,
                  ShapeText(args.qdata).text, ShapeText(args.scale).text);
  }
  return Error::Ok;
}

Error DelegateMethod::check_nested(const Program& program) const {
  std::vector<MethodShape> methods;
  Error error = check_program(blob_.program, kNested, &methods);
  if (error != Error::Ok) return error;
  if (program.num_methods() != 1 || methods[0].delegate_calls != 0)
    return fail(Error::InvalidProgram,
                "nested program: expected one method without delegates, got %zu methods; the .pte "
                "is damaged, export it again",
                program.num_methods());
  for (const std::string& op : program_operators(blob_.program))
    if (std::find(blob_.ops.begin(), blob_.ops.end(), op) == blob_.ops.end())
      return fail(Error::InvalidProgram,
                  "nested program: expected only ops that the header lists, found %s; the .pte is "
                  "damaged, export it again",
                  op.c_str());
  std::vector<LinearCall> calls;
  error = program_linears(blob_.program, &calls);
  if (error != Error::Ok) return error;
  const auto key = [this](int32_t index) -> std::string_view {
    return index < 0 ? std::string_view() : blob_.constants[size_t(index)].key;
  };
  for (const LinearCall& call : calls) {
    const LinearRecord* same_weight = nullptr;
    bool agrees = false;
    for (const LinearRecord& linear : blob_.linears) {
      if (call.qdata != key(linear.qdata)) continue;
      same_weight = &linear;
      agrees =
          agrees || (call.scale == key(linear.scale) && call.zero_point == key(linear.zero_point) &&
                     call.meta == key(linear.meta) && call.group_size == linear.group_size &&
                     call.layout_tag == linear.layout_tag && call.activation == linear.activation);
    }
    if (same_weight == nullptr)
      return fail(Error::InvalidProgram,
                  "nested program: expected the weight of every int4 linear in the header, found a "
                  "call on %.*s; the .pte is damaged, export it again",
                  int(call.qdata.size()), call.qdata.data());
    if (!agrees)
      return fail(Error::DelegateInvalidCompatibility,
                  "%s: expected layout %s, activation %s and group_size %" PRId64
                  " as in the header, found %.*s, %.*s and %" PRId64
                  " in the nested program; the .pte is damaged, export it again",
                  same_weight->name.c_str(), same_weight->layout_tag.c_str(),
                  same_weight->activation.c_str(), same_weight->group_size,
                  int(call.layout_tag.size()), call.layout_tag.data(), int(call.activation.size()),
                  call.activation.data(), call.group_size);
  }
  return Error::Ok;
}

Error DelegateMethod::load_method() {
  const auto refused = [](Error error) {
    return fail_unless_explained(error,
                                 "nested program: expected one that ExecuTorch loads, got %s; the "
                                 ".pte is damaged, export it again",
                                 executorch::runtime::to_string(error));
  };
  loader_.emplace(blob_.program, blob_.program_nbytes);
  auto program = Program::load(&*loader_, Program::Verification::InternalConsistency);
  if (!program.ok()) return refused(program.error());
  program_.emplace(std::move(program.get()));
  const Error error = check_nested(*program_);
  if (error != Error::Ok) return error;
  const Result<const char*> name = program_->get_method_name(0);
  if (!name.ok()) return refused(name.error());
  const Result<MethodMeta> meta = program_->method_meta(name.get());
  if (!meta.ok()) return refused(meta.error());

  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const Result<int64_t> nbytes = meta->memory_planned_buffer_size(i);
    if (!nbytes.ok()) return refused(nbytes.error());
    void* memory = device_->allocate(size_t(nbytes.get()));
    if (memory == nullptr)
      return fail(Error::MemoryAllocationFailed,
                  "nested program: device %s has no %" PRId64
                  " bytes left for activations; export with a shorter greatest sequence",
                  device_->name(), nbytes.get());
    allocations_.push_back(memory);
    planned_spans_.emplace_back(static_cast<uint8_t*>(memory), size_t(nbytes.get()));
  }
  planned_.emplace(Span<Span<uint8_t>>(planned_spans_.data(), planned_spans_.size()));
  temp_ = std::make_unique<TempArena>(*device_);
  memory_.emplace(&method_memory_, &*planned_, temp_.get());
  auto method = program_->load_method(name.get(), &*memory_, nullptr, constants_.get(), nullptr,
                                      {kernels_.data(), kernels_.size()});
  if (!method.ok()) return refused(method.error());
  method_.emplace(std::move(method.get()));
  return Error::Ok;
}

Error DelegateMethod::place_mutable_buffers() {
  const MethodMeta meta = method_->method_meta();
  for (size_t i = 0; i < meta.num_attributes(); ++i) {
    const auto info = meta.attribute_tensor_meta(i);
    if (!info.ok()) return info.error();
    const std::string name(info->name());
    auto tensor = method_->get_attribute(name);
    if (!tensor.ok()) return tensor.error();
    // Constants have names too; they have their data already.
    if (tensor->const_data_ptr() != nullptr || info->is_memory_planned()) continue;
    const size_t nbytes = tensor->nbytes();
    if (nbytes == 0) continue;
    void* memory = device_->allocate(nbytes);
    if (memory == nullptr)
      return fail(Error::MemoryAllocationFailed,
                  "buffer %s: device %s has no %zu bytes left; export with a shorter context",
                  name.c_str(), device_->name(), nbytes);
    allocations_.push_back(memory);
    mutable_buffers_.push_back({memory, nbytes});
    const Error error =
        executorch::runtime::internal::set_tensor_data(tensor.get(), memory, nbytes);
    if (error != Error::Ok) return error;
  }
  return reset();
}

Error DelegateMethod::stage(const char* what, size_t i, size_t nbytes, Staged* out) {
  out->nbytes = nbytes;
  out->device = device_->allocate(nbytes);
  if (out->device != nullptr) allocations_.push_back(out->device);
  out->host = device_->allocate_host(nbytes);
  if (out->host != nullptr) host_allocations_.push_back(out->host);
  if (out->device != nullptr && out->host != nullptr) return Error::Ok;
  return fail(
      Error::MemoryAllocationFailed,
      "%s %zu: no %zu bytes of %s memory left for it; export with a shorter greatest sequence",
      what, i, nbytes, out->device == nullptr ? device_->name() : "page-locked host");
}

Error DelegateMethod::plan_inputs() {
  inputs_.resize(method_->inputs_size());
  if (device_->reads_host_memory()) return Error::Ok;
  const MethodMeta meta = method_->method_meta();
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (!method_->get_input(i).isTensor()) continue;
    const auto info = meta.input_tensor_meta(i);
    if (!info.ok()) return info.error();
    const Error error = stage("input", i, info->nbytes(), &inputs_[i]);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

Error DelegateMethod::plan_outputs() {
  const MethodMeta meta = method_->method_meta();
  for (size_t i = 0; i < method_->outputs_size(); ++i) {
    const EValue& value = method_->get_output(i);
    Output output{value.isTensor(), false, 0, {}, {}};
    if (output.is_tensor) {
      const auto info = meta.output_tensor_meta(i);
      if (!info.ok()) return info.error();
      output.max_nbytes = info->nbytes();
      output.max_sizes.assign(info->sizes().begin(), info->sizes().end());
      // Memory of its own: planned, a constant, a mutable buffer. Or an input handed through, whose
      // pointer is not ours to set.
      output.bindable = !info->is_memory_planned() && value.toTensor().const_data_ptr() == nullptr;
      for (size_t j = 0; j < method_->inputs_size(); ++j)
        if (&method_->mutable_input(j) == &value) output.bindable = false;
      if (!device_->reads_host_memory()) {
        Error error = stage("output", i, output.max_nbytes, &output.staged);
        if (error == Error::Ok && output.bindable)
          error = method_->set_output_data_ptr(output.staged.device, output.max_nbytes, i);
        if (error != Error::Ok) return error;
      }
    }
    outputs_.push_back(std::move(output));
  }
  return Error::Ok;
}

// ---- execute ----

Error DelegateMethod::bind_input(size_t i, const EValue& value) {
  EValue& nested = method_->mutable_input(i);
  if (!nested.isTensor()) {
    // Ints (a dynamic size) are not planned, and arrive as None in the nested program.
    if (!value.isInt() && !value.isDouble() && !value.isBool() && !value.isNone())
      return fail(Error::InvalidType, "input %zu: expected a number, got another type of value", i);
    nested = value;
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
  const Error error =
      device_->reads_host_memory() ? method_->set_input(value, i) : set_tensor_input(i, given);
  if (error != Error::Ok)
    return fail_unless_explained(error,
                                 "input %zu: expected sizes the model was exported for, got %s", i,
                                 ShapeText(given_view).text);
  return Error::Ok;
}

/// The nested method reads the staged copy, which is always at the same address.
Error DelegateMethod::set_tensor_input(size_t i, const Tensor& given) {
  const Staged& staged = inputs_[i];
  if (given.nbytes() > staged.nbytes) return Error::InvalidArgument;
  executorch::aten::TensorImpl impl(given.scalar_type(), given.dim(),
                                    const_cast<SizesType*>(given.sizes().data()), staged.device,
                                    const_cast<DimOrderType*>(given.dim_order().data()),
                                    const_cast<StridesType*>(given.strides().data()));
  const Error error = method_->set_input(EValue(Tensor(&impl)), i);
  if (error != Error::Ok || given.nbytes() == 0) return error;
  if (given.const_data_ptr() == nullptr)
    return fail(Error::InvalidArgument, "input %zu: expected data, got nullptr", i);
  std::memcpy(staged.host, given.const_data_ptr(), given.nbytes());
  return device_->upload_async(staged.device, staged.host, given.nbytes());
}

Error DelegateMethod::bind_output(size_t i, EValue& value) {
  const Output& output = outputs_[i];
  if (!output.is_tensor) return Error::Ok;
  if (!value.isTensor())
    return fail(Error::InvalidType, "output %zu: expected a tensor to write to", i);
  Tensor& given = value.toTensor();
  const Tensor& nested = method_->get_output(i).toTensor();
  if (given.scalar_type() != nested.scalar_type())
    return fail(Error::InvalidArgument, "output %zu: expected dtype %s, got %s", i,
                dtype_name(DType(nested.scalar_type())), dtype_name(DType(given.scalar_type())));
  if (!output.bindable || !device_->reads_host_memory()) return Error::Ok;
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

Error DelegateMethod::hand_over(size_t i, EValue& value) {
  const EValue& result = method_->get_output(i);
  if (!outputs_[i].is_tensor) {
    value = result;
    return Error::Ok;
  }
  const Tensor& from = result.toTensor();
  Tensor& to = value.toTensor();
  const Error error = executorch::runtime::resize_tensor(to, from.sizes());
  if (error != Error::Ok)
    return fail(
        Error::InvalidArgument,
        "output %zu: the result does not fit the memory planned for it; run with at most the "
        "sizes the model was exported for",
        i);
  // The same pointer but where the result is a view, an input, a constant or a cache.
  if (from.const_data_ptr() == to.const_data_ptr() || from.nbytes() == 0) return Error::Ok;
  if (to.const_data_ptr() == nullptr || from.const_data_ptr() == nullptr)
    return fail(Error::InvalidArgument, "output %zu: expected memory to write to, got none", i);
  if (device_->reads_host_memory())
    return device_->copy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  void* host = to.mutable_data_ptr();
  if (!device_->is_from_allocate_host(host)) host = outputs_[i].staged.host;
  return device_->download_async(host, from.const_data_ptr(), from.nbytes());
}

/// What went through staging, once it is there, to where the caller wants it.
Error DelegateMethod::finish_hand_over(Span<EValue*> outputs) {
  const Error error = device_->synchronize();
  if (error != Error::Ok || device_->reads_host_memory()) return error;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (!outputs_[i].is_tensor) continue;
    Tensor& to = outputs[i]->toTensor();
    if (to.nbytes() > 0 && !device_->is_from_allocate_host(to.const_data_ptr()))
      std::memcpy(to.mutable_data_ptr(), outputs_[i].staged.host, to.nbytes());
  }
  return Error::Ok;
}

Error DelegateMethod::execute(Span<EValue*> args) {
  const DeviceScope scope(*device_);
  const size_t n_inputs = method_->inputs_size();
  if (args.size() != n_inputs + outputs_.size())
    return fail(
        Error::InvalidProgram,
        "delegate call: expected %zu inputs and %zu outputs, got %zu arguments; the .pte is "
        "damaged, export it again",
        n_inputs, outputs_.size(), args.size());
  for (size_t i = 0; i < n_inputs; ++i) {
    const Error error = bind_input(i, *args[i]);
    if (error != Error::Ok) return error;
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Error error = bind_output(i, *args[n_inputs + i]);
    if (error != Error::Ok) return error;
  }
  Error error = run();
  for (size_t i = 0; error == Error::Ok && i < outputs_.size(); ++i)
    error = hand_over(i, *args[n_inputs + i]);
  // Also after an error: nothing of this call is left in the queue.
  const Error finished = finish_hand_over({args.data() + n_inputs, outputs_.size()});
  return error != Error::Ok ? error : finished;
}

Error DelegateMethod::run() {
  ExecutionContext execution{};
  execution.device = device_->kind();
  execution.stream = device_->stream();
  execution.parallel_for = execution.device == DeviceKind::kCpu ? &parallel_for : nullptr;
  const ExecutionScope scope(execution);
  const size_t before = temp_->resets();
  const Error error = method_->execute();
  if (error == Error::Ok) return error;
  const std::string op =
      operator_at(blob_.program, method_->method_meta().name(), temp_->resets() - before - 2);
  return fail_unless_explained(error,
                               "nested program: %s refused its arguments with %s (the log says "
                               "why); run with sizes and indices the model was exported for",
                               op.c_str(), executorch::runtime::to_string(error));
}

Error DelegateMethod::reset() {
  for (const MutableBuffer& buffer : mutable_buffers_) {
    const Error error = device_->zero(buffer.data, buffer.nbytes);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

}  // namespace cuda_int4
