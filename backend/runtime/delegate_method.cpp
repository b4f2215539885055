#include "delegate_method.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <algorithm>
#include <cinttypes>

#include "../kernels/checks.h"
#include "../kernels/ops.h"
#include "../kernels/parallel_ranges.h"
#include "errors.h"
#include "parallel.h"
#include "program_check.h"
#include "program_writes.h"
#include "tensor_bridge.h"

// mutable_input is deprecated for callers of models; a delegate has no other way to pass an int on.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace cuda_int4 {

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

// Without data, and without x and y.
LinearArgs args_of_record(const Blob& blob, const LinearRecord& linear) {
  LinearArgs args{};
  args.x = args.y = absent_view();
  args.qdata = view_of_record(blob, linear.qdata);
  args.scale = view_of_record(blob, linear.scale);
  args.zero_point = view_of_record(blob, linear.zero_point);
  args.meta = view_of_record(blob, linear.meta);
  args.bias = view_of_record(blob, linear.bias);
  args.group_size = linear.group_size;
  args.layout_tag = linear.layout_tag.c_str();
  args.activation = linear.activation.c_str();
  args.name = linear.name.c_str();
  args.out_features = linear.N;
  return args;
}

}  // namespace

DelegateMethod::~DelegateMethod() {
  if (device_ == nullptr) return;  // nothing came after it
  end_steps();
  shapes_.clear();
  method_.reset();
  program_.reset();
  temp_.reset();
  shared_activation_.reset();
  constants_.reset();
  for (void* allocation : allocations_) device_->free(allocation);
  device_->free_host(fault_memory_.host);
  device_->free_host(steps_.state.host);
  device_->free_host(steps_.words.host);
  for (const Staged& input : inputs_) device_->free_host(input.host);
  for (const Output& output : outputs_) device_->free_host(output.staged.host);
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
  self->cuda_graph_ = options.cuda_graph;
  self->device_loop_ = options.device_loop;
  self->cpu_loop_ = options.cpu_loop;
  // The device is not touched before everything that the file alone decides has been checked.
  self->constants_ = std::make_unique<Constants>(self->blob_.constants, *self->device_);
  error = self->constants_->locate(store);
  if (error == Error::Ok) error = self->load_program();
  if (error == Error::Ok)
    self->writes_by_position_ =
        writes_by_position(self->blob_.program,
                           [&self](std::string_view name) { return self->constants_->has(name); });
  if (error == Error::Ok) error = self->check_memory();
  if (error == Error::Ok) error = self->check_values();
  if (error == Error::Ok) error = self->constants_->place(options.verify_constants);
  if (error == Error::Ok) error = self->load_method();
  if (error == Error::Ok) error = self->place_mutable_buffers();
  if (error == Error::Ok) error = self->plan_inputs();
  if (error == Error::Ok) error = self->plan_outputs();
  if (error == Error::Ok) error = self->device_->synchronize();
  if (error != Error::Ok) return error;
  *out = std::move(self);
  return Error::Ok;
}

DeviceUse DelegateMethod::device_use() const {
  DeviceUse use;
  use.device = device_->name();
  use.device_bytes = device_->allocated_bytes();
  use.peak_device_bytes = device_->peak_allocated_bytes();
  use.uploaded_bytes = constants_->uploaded_bytes();
  use.upload_s = constants_->upload_seconds();
  use.eager_runs = eager_runs_;
  use.captures = captures_;
  use.replays = replays_;
  return use;
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
    const LinearArgs args = args_of_record(blob_, linear);
    const Status status = validate_linear_weight(args);
    // Parts that disagree are the caller's mistake in eager; here they are the file's.
    if (status.code == StatusCode::kInvalidArgument)
      return fail(Error::InvalidProgram, "%s", status.message);
    if (!status.ok()) return fail(status);
    int64_t N = 0, K = 0;
    linear_weight_sizes(args, &N, &K);
    if (N != linear.N || K != linear.K)
      return fail(Error::InvalidProgram,
                  "%s: expected parts of N=%" PRId64 " K=%" PRId64 " group_size=%" PRId64
                  ", found qdata %s and scale %s; the .pte is damaged, export it again",
                  linear.name.c_str(), linear.N, linear.K, linear.group_size,
                  ShapeText(args.qdata).text, ShapeText(args.scale).text);
  }
  return Error::Ok;
}

/// Metadata of 2:4 weights, the one part that a kernel cannot take as it comes, while it is still in
/// host memory. It is a third of the weight's bytes, read at the speed of memory by all cores.
Error DelegateMethod::check_values() const {
  std::vector<LinearArgs> weights;
  for (const LinearRecord& linear : blob_.linears) {
    if (linear.meta < 0) continue;
    weights.push_back(args_of_record(blob_, linear));
    weights.back().meta.data = const_cast<void*>(constants_->located(size_t(linear.meta)));
  }
  std::vector<Status> found(weights.size());
  const auto validate = [&](int64_t begin, int64_t end) {
    for (size_t i = size_t(begin); i < size_t(end); ++i)
      found[i] = validate_linear_values(weights[i]);
  };
  ExecutionContext context{};
  context.parallel_for = &parallel_for;
  parallel_ranges(context, int64_t(weights.size()), 1, validate);
  for (const Status& status : found)
    if (!status.ok()) return fail(Error::InvalidProgram, "%s", status.message);
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
  // ExecuTorch would copy them on the host, and the memory may be a GPU's.
  if (methods[0].planned_inputs > 0 || methods[0].tensors_with_data > 0)
    return fail(Error::InvalidProgram,
                "nested program: expected no input with memory of its own and no tensor with data, "
                "found %u and %u; the .pte is damaged, export it again",
                methods[0].planned_inputs, methods[0].tensors_with_data);
  if (methods[0].jumps > 0 && !device_->reads_host_memory())
    return fail(
        Error::DelegateInvalidCompatibility,
        "nested program: device %s cannot run jumps (control flow inside a delegate), found "
        "%u; use device \"cpu\"",
        device_->name(), methods[0].jumps);
  for (const std::string& op : program_operators(blob_.program))
    if (std::find(blob_.ops.begin(), blob_.ops.end(), op) == blob_.ops.end())
      return fail(Error::InvalidProgram,
                  "nested program: expected only ops that the header lists, found %s; the .pte is "
                  "damaged, export it again",
                  op.c_str());
  error = check_writes(blob_.program, kNested,
                       [this](std::string_view name) { return constants_->has(name); });
  if (error != Error::Ok) return error;
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
                     call.layout_tag == linear.layout_tag && call.activation == linear.activation &&
                     (call.out_features == 0 || call.out_features == linear.N));
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

namespace {

Error refused(Error error) {
  return fail_unless_explained(error,
                               "nested program: expected one that ExecuTorch loads, got %s; the "
                               ".pte is damaged, export it again",
                               executorch::runtime::to_string(error));
}

}  // namespace

Error DelegateMethod::load_program() {
  loader_.emplace(blob_.program, blob_.program_nbytes);
  auto program = Program::load(&*loader_, Program::Verification::InternalConsistency);
  if (!program.ok()) return refused(program.error());
  program_.emplace(std::move(program.get()));
  const Error error = check_nested(*program_);
  if (error != Error::Ok) return error;
  const Result<const char*> name = program_->get_method_name(0);
  if (!name.ok()) return refused(name.error());
  name_ = name.get();
  operators_ = instruction_operators(blob_.program, name_);
  return Error::Ok;
}

/// Everything that open() allocates on the device, against what is free there.
Error DelegateMethod::check_memory() const {
  const uint64_t free = device_->free_bytes();
  if (free == UINT64_MAX) return Error::Ok;
  const Result<MethodMeta> meta = program_->method_meta(name_.c_str());
  if (!meta.ok()) return refused(meta.error());
  uint64_t activations = 0, buffers = 0;
  const auto add = [](uint64_t* sum, uint64_t nbytes) {
    *sum = nbytes > UINT64_MAX - *sum ? UINT64_MAX : *sum + nbytes;
  };
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const Result<int64_t> nbytes = meta->memory_planned_buffer_size(i);
    if (!nbytes.ok()) return refused(nbytes.error());
    add(&activations, uint64_t(nbytes.get()));
  }
  for (size_t i = 0; i < meta->num_inputs(); ++i) {
    const auto info = meta->input_tensor_meta(i);  // none of a number
    if (info.ok()) add(&activations, info->nbytes());
  }
  for (size_t i = 0; i < meta->num_outputs(); ++i) {
    const auto info = meta->output_tensor_meta(i);
    if (info.ok() && !info->is_memory_planned()) add(&activations, info->nbytes());
  }
  for (size_t i = 0; i < meta->num_attributes(); ++i) {
    const auto info = meta->attribute_tensor_meta(i);
    if (!info.ok()) return refused(info.error());
    if (!info->is_memory_planned() && !constants_->has(info->name())) add(&buffers, info->nbytes());
  }
  uint64_t needed = constants_->device_bytes();
  add(&needed, buffers);
  add(&needed, activations);
  if (needed <= free) return Error::Ok;
  return fail(Error::MemoryAllocationFailed,
              "device %s: expected %" PRIu64 " bytes of free memory (%" PRIu64
              " of constants, %" PRIu64 " of caches, %" PRIu64 " of activations), it has %" PRIu64
              "; free some, use another device, or export a smaller model or a shorter context",
              device_->name(), needed, constants_->device_bytes(), buffers, activations, free);
}

Error DelegateMethod::load_method() {
  const Result<MethodMeta> meta = program_->method_meta(name_.c_str());
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
  auto method = program_->load_method(name_.c_str(), &*memory_, nullptr, constants_.get(), nullptr,
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
  if (out->device == nullptr)
    return fail(Error::MemoryAllocationFailed,
                "%s %zu: device %s has no %zu bytes left; export with a shorter greatest sequence",
                what, i, device_->name(), nbytes);
  allocations_.push_back(out->device);
  return Error::Ok;
}

Error DelegateMethod::plan_inputs() {
  inputs_.resize(method_->inputs_size());
  if (device_->reads_host_memory()) return Error::Ok;
  shared_activation_ = std::make_unique<SharedActivation>(*device_);
  // Kernels write to it, the host reads it after each run.
  Error error = stage_host(sizeof(DeviceFault), &fault_memory_);
  if (error != Error::Ok) return error;
  const MethodMeta meta = method_->method_meta();
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (!method_->get_input(i).isTensor()) continue;
    const auto info = meta.input_tensor_meta(i);
    if (!info.ok()) return info.error();
    error = stage("input", i, info->nbytes(), &inputs_[i]);
    // All of it now: graphs hold its address.
    if (error == Error::Ok) error = stage_host(info->nbytes(), &inputs_[i]);
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
      if (!device_->reads_host_memory() && output.bindable) {
        Error error = stage("output", i, output.max_nbytes, &output.staged);
        if (error == Error::Ok)
          error = method_->set_output_data_ptr(output.staged.device, output.max_nbytes, i);
        if (error != Error::Ok) return error;
      }
    }
    outputs_.push_back(std::move(output));
  }
  return Error::Ok;
}

}  // namespace cuda_int4
