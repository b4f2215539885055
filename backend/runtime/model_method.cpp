#include "model_method.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <string>

#include "../kernels/checks.h"
#include "errors.h"
#include "tensor_bridge.h"

// mutable_input is deprecated, but the only way to set a number that changes from call to call.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace cuda_int4 {

using executorch::aten::DimOrderType;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::MethodMeta;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;

namespace {

bool is_number(Tag tag) { return tag == Tag::Int || tag == Tag::Double || tag == Tag::Bool; }

/// A number as the interface shows it; None, which a dynamic int is, as an int.
TensorView number_info(Tag tag) {
  TensorView view{};
  view.dtype = tag == Tag::Double ? DType::kFloat64
               : tag == Tag::Bool ? DType::kBool
                                  : DType::kInt64;
  make_contiguous(&view);
  return view;
}

/// False where a TensorView cannot show it.
bool tensor_info(const TensorInfo& info, TensorView* out, bool* contiguous) {
  *out = TensorView{};
  out->dtype = static_cast<DType>(info.scalar_type());
  if (info.sizes().size() > size_t(kMaxDims) || dtype_bytes(out->dtype) == 0) return false;
  out->ndim = int32_t(info.sizes().size());
  std::copy(info.sizes().begin(), info.sizes().end(), out->sizes);
  make_contiguous(out);
  *contiguous = true;
  for (size_t d = 0; d < info.dim_order().size(); ++d)
    *contiguous = *contiguous && info.dim_order()[d] == d;
  return true;
}

}  // namespace

ModelMethod::ModelMethod(const Source& source, const MethodShape& shape)
    : source_(source),
      name_(shape.name),
      is_one_delegate_(shape.is_one_delegate),
      only_delegates_(shape.kernel_calls == 0 && shape.other_instructions == 0),
      n_delegate_calls_(shape.delegate_calls),
      host_(make_cpu_device()) {}

ModelMethod::~ModelMethod() {
  undo_page_locks();
  method_.reset();
  temp_.reset();
  for (void* allocation : allocations_) host_->free(allocation);
}

Error ModelMethod::load(const Source& source, const MethodShape& shape,
                        std::unique_ptr<ModelMethod>* out) {
  std::unique_ptr<ModelMethod> self(new ModelMethod(source, shape));
  const Result<MethodMeta> meta = source.program->method_meta(self->name_.c_str());
  if (!meta.ok())
    return fail(meta.error(), "method %s: expected its description, got %s; the .pte is damaged",
                self->name_.c_str(), executorch::runtime::to_string(meta.error()));
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const Result<int64_t> nbytes = meta->memory_planned_buffer_size(i);
    if (!nbytes.ok()) return nbytes.error();
    void* memory = self->host_->allocate(size_t(nbytes.get()));
    if (memory == nullptr)
      return fail(Error::MemoryAllocationFailed,
                  "method %s: no %" PRId64
                  " bytes of memory left for activations; export with a shorter greatest sequence",
                  self->name_.c_str(), nbytes.get());
    self->allocations_.push_back(memory);
    self->planned_spans_.emplace_back(static_cast<uint8_t*>(memory), size_t(nbytes.get()));
  }
  self->planned_.emplace(
      Span<Span<uint8_t>>(self->planned_spans_.data(), self->planned_spans_.size()));
  self->temp_.emplace(*self->host_);
  Error error = self->open();
  if (error == Error::Ok) error = self->describe();
  if (error != Error::Ok) return error;
  self->page_lock();
  *out = std::move(self);
  return Error::Ok;
}

Error ModelMethod::open() {
  undo_page_locks();
  method_.reset();  // its delegates go with it
  delegates_.clear();
  method_memory_.emplace();
  memory_.emplace(&*method_memory_, &*planned_, &*temp_);
  // Mutable buffers outside delegates start as zeros unless the file gives them values.
  for (const Span<uint8_t>& span : planned_spans_)
    if (!only_delegates_) std::memset(span.data(), 0, span.size());

  executorch::runtime::BackendOptions<5> options;
  Error error = options.set_option("device", source_.options.device.c_str());
  if (error == Error::Ok) error = options.set_option("verify_constants", source_.options.verify);
  if (error == Error::Ok) error = options.set_option("cuda_graph", source_.options.cuda_graph);
  if (error == Error::Ok) error = options.set_option("device_loop", source_.options.device_loop);
  if (error == Error::Ok && source_.options.on_callers_stream) {
    const auto address = reinterpret_cast<uintptr_t>(source_.options.cuda_stream);
    error = options.set_option("cuda_stream", std::to_string(address).c_str());
  }
  executorch::runtime::LoadBackendOptionsMap backend_options;
  if (error == Error::Ok) error = backend_options.set_options(kBackendId, options.view());
  if (error != Error::Ok)
    return fail(error, "device: ExecuTorch does not take the options of a load");
  DelegateListener listener;
  clear_last_error();
  auto method = source_.program->load_method(name_.c_str(), &*memory_, nullptr, source_.data,
                                             &backend_options);
  if (!method.ok())
    return fail_unless_explained(
        method.error(),
        "method %s: ExecuTorch cannot load it (%s): an op or a backend outside CudaInt4Backend is "
        "missing here, or the .pte is damaged; the log names it",
        name_.c_str(), executorch::runtime::to_string(method.error()));
  method_.emplace(std::move(method.get()));
  delegates_ = std::move(listener.opened);
  for (size_t i = 0; i < outputs_.size(); ++i)
    if (outputs_[i].own != nullptr) {
      error = method_->set_output_data_ptr(outputs_[i].own, outputs_[i].info.nbytes, i);
      if (error != Error::Ok) return error;
    }
  return Error::Ok;
}

Error ModelMethod::describe() {
  const MethodMeta meta = method_->method_meta();
  for (size_t i = 0; i < method_->inputs_size(); ++i) {
    Input input{number_info(Tag::Int), method_->get_input(i).tag, true};
    if (input.tag == Tag::Tensor) {
      const Result<TensorInfo> info = meta.input_tensor_meta(i);
      if (!info.ok() || !tensor_info(info.get(), &input.info, &input.contiguous))
        return fail(
            Error::NotSupported,
            "method %s: input %zu has a dtype or number of dimensions that this runtime does "
            "not carry",
            name_.c_str(), i);
    } else if (is_number(input.tag)) {
      input.info = number_info(input.tag);
    }
    inputs_.push_back(input);
  }
  for (size_t i = 0; i < method_->outputs_size(); ++i) {
    Output output;
    output.tag = method_->get_output(i).tag;
    for (size_t j = 0; j < method_->inputs_size(); ++j)
      output.is_input = output.is_input || &method_->get_input(j) == &method_->get_output(i);
    output.info = number_info(output.tag);
    if (output.tag == Tag::Tensor) {
      const Result<TensorInfo> info = meta.output_tensor_meta(i);
      bool contiguous = true;
      if (!info.ok() || !tensor_info(info.get(), &output.info, &contiguous))
        return fail(Error::NotSupported,
                    "method %s: output %zu has a dtype or number of dimensions that this runtime "
                    "does not carry",
                    name_.c_str(), i);
      if (!info->is_memory_planned() &&
          method_->get_output(i).toTensor().const_data_ptr() == nullptr) {
        output.own = host_->allocate(output.info.nbytes);
        if (output.own == nullptr)
          return fail(Error::MemoryAllocationFailed,
                      "method %s: no %" PRIu64 " bytes of memory left for output %zu",
                      name_.c_str(), output.info.nbytes, i);
        allocations_.push_back(output.own);
        const Error error = method_->set_output_data_ptr(output.own, output.info.nbytes, i);
        if (error != Error::Ok) return error;
      }
    }
    outputs_.push_back(output);
  }
  return Error::Ok;
}

/// What delegates on a GPU write their outputs to, so that these come without a copy between. Only a
/// matter of speed: what cannot be locked is left as it is.
void ModelMethod::page_lock() {
  constexpr size_t kMaxBytes = size_t(64) << 20;  // of one piece; locking costs 0.4 s/GB
  if (delegates_.empty()) return;
  Device& device = delegates_[0]->device();
  const auto lock = [&](void* memory, size_t nbytes) {
    if (nbytes > 0 && nbytes <= kMaxBytes && device.page_lock(memory, nbytes))
      page_locked_.push_back(memory);
  };
  for (const Span<uint8_t>& span : planned_spans_) lock(span.data(), span.size());
  for (const Output& output : outputs_)
    if (output.own != nullptr) lock(output.own, output.info.nbytes);
}

void ModelMethod::undo_page_locks() {
  for (void* memory : page_locked_) delegates_[0]->device().undo_page_lock(memory);
  page_locked_.clear();
}

/// An input that lies in an output's memory would change while it is read, or before.
Error ModelMethod::check_apart(size_t i, const TensorView& view) const {
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  for (size_t j = 0; j < outputs_.size(); ++j) {
    const EValue& value = method_->get_output(j);
    if (!value.isTensor() || outputs_[j].is_input) continue;
    const auto output = reinterpret_cast<uintptr_t>(value.toTensor().const_data_ptr());
    if (begin < output + value.toTensor().nbytes() && output < begin + view.nbytes)
      return fail(Error::InvalidArgument,
                  "%s: input %zu: expected memory of its own, got that of output %zu, which the "
                  "call writes; pass a copy",
                  name_.c_str(), i, j);
  }
  return Error::Ok;
}

Error ModelMethod::set_input(size_t i, const TensorView& view) {
  const Input& expected = inputs_[i];
  if (view.ndim < 0 || view.ndim > kMaxDims || dtype_bytes(view.dtype) == 0)
    return fail(Error::InvalidArgument, "%s: input %zu: expected a tensor, got none", name_.c_str(),
                i);
  if (view.dtype != expected.info.dtype)
    return fail(Error::InvalidArgument,
                "%s: input %zu: expected dtype %s, got %s; convert it with .to()", name_.c_str(), i,
                dtype_name(expected.info.dtype), dtype_name(view.dtype));
  if (view.ndim != expected.info.ndim)
    return fail(Error::InvalidArgument,
                "%s: input %zu: expected %d dimensions (at most %s), got %s", name_.c_str(), i,
                expected.info.ndim, ShapeText(expected.info).text, ShapeText(view).text);
  int64_t numel = 0;
  const Error invalid =
      fail(check_contiguous({name_.c_str(), "each input", "pass x.contiguous()"}, view, &numel));
  if (invalid != Error::Ok) return invalid;
  if (numel > 0 && view.data == nullptr)
    return fail(Error::InvalidArgument, "%s: input %zu: expected data, got nullptr", name_.c_str(),
                i);
  if (!expected.contiguous)
    return fail(Error::NotSupported,
                "%s: input %zu is not contiguous in the program; export with contiguous inputs",
                name_.c_str(), i);

  if (expected.tag != Tag::Tensor) {
    EValue value;
    if (view.dtype == DType::kFloat64)
      value = EValue(*static_cast<const double*>(view.data));
    else if (view.dtype == DType::kBool)
      value = EValue(*static_cast<const uint8_t*>(view.data) != 0);
    else
      value = EValue(*static_cast<const int64_t*>(view.data));
    if (expected.tag == Tag::None) {  // a dynamic int
      method_->mutable_input(i) = value;
      return Error::Ok;
    }
    const Error error = method_->set_input(value, i);
    return error == Error::Ok
               ? error
               : fail(error, "%s: input %zu: expected the number it was exported with, got another",
                      name_.c_str(), i);
  }

  SizesType sizes[kMaxDims];
  StridesType strides[kMaxDims];
  DimOrderType dim_order[kMaxDims];
  uint64_t stride = 1;  // of a tensor without elements it may wrap around, and means nothing
  for (int d = view.ndim - 1; d >= 0; --d) {
    sizes[d] = SizesType(view.sizes[d]);
    strides[d] = StridesType(stride);
    dim_order[d] = DimOrderType(d);
    stride *= uint64_t(std::max<int64_t>(view.sizes[d], 1));
  }
  TensorImpl impl(static_cast<ScalarType>(view.dtype), view.ndim, sizes, view.data, dim_order,
                  strides);
  const Error error = method_->set_input(EValue(Tensor(&impl)), i);
  return error == Error::Ok
             ? error
             : fail(error, "%s: input %zu: expected sizes it was exported for (at most %s), got %s",
                    name_.c_str(), i, ShapeText(expected.info).text, ShapeText(view).text);
}

Error ModelMethod::forward(const TensorView* inputs, size_t n) {
  if (n != inputs_.size())
    return fail(Error::InvalidArgument, "%s: expected %zu inputs, got %zu", name_.c_str(),
                inputs_.size(), n);
  if (!method_.has_value())  // open() failed in a reset
    return fail(Error::InvalidState, "%s: the reset before failed; open the model again",
                name_.c_str());
  for (size_t i = 0; i < n; ++i) {
    const Error error = check_apart(i, inputs[i]);
    if (error != Error::Ok) return error;
  }
  for (size_t i = 0; i < n; ++i) {
    const Error error = set_input(i, inputs[i]);
    if (error != Error::Ok) return error;
  }
  clear_last_error();
  const size_t before = temp_->resets();
  const Error error = method_->execute();
  if (error == Error::Ok) return error;
  const std::string op = operator_at(source_.program_data, name_, temp_->resets() - before - 2);
  return fail_unless_explained(error,
                               "%s: %s outside CudaInt4Backend refused its arguments with %s (the "
                               "log says why); run with sizes and indices the model was exported "
                               "for",
                               name_.c_str(), op.c_str(), executorch::runtime::to_string(error));
}

Error ModelMethod::output(size_t i, TensorView* out) {
  if (i >= outputs_.size())
    return fail(Error::InvalidArgument, "%s: expected one of %zu outputs, got number %zu",
                name_.c_str(), outputs_.size(), i);
  const EValue& value = method_->get_output(i);
  Output& output = outputs_[i];
  if (value.isTensor()) {
    if (!view_of(value.toTensor(), out))
      return fail(Error::NotSupported,
                  "%s: output %zu has a dtype or number of dimensions that this runtime does not "
                  "carry",
                  name_.c_str(), i);
    return Error::Ok;
  }
  if (!is_number(value.tag))
    return fail(Error::NotSupported, "%s: output %zu: expected a tensor or a number", name_.c_str(),
                i);
  *out = number_info(value.tag);
  out->data = &output.number;
  if (value.isInt()) output.number.as_int = value.toInt();
  if (value.isDouble()) output.number.as_double = value.toDouble();
  if (value.isBool()) output.number.as_bool = value.toBool();
  return Error::Ok;
}

DecodeSteps* ModelMethod::decode_steps() {
  if (!is_one_delegate_ || delegates_.size() != 1 || !delegates_[0]->can_step()) return nullptr;
  return delegates_[0];
}

Error ModelMethod::reset() {
  // State outside our delegates (or in those of another copy of this library, which came first and
  // is the one that ExecuTorch runs): load it afresh.
  if (!only_delegates_ || delegates_.size() != n_delegate_calls_) {
    const Error error = open();
    if (error == Error::Ok) page_lock();
    return error;
  }
  for (DelegateMethod* delegate : delegates_) {
    const Error error = delegate->reset();
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

}  // namespace cuda_int4
