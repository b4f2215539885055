#include "model.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <chrono>
#include <optional>

#include "errors.h"
#include "mapped_file.h"
#include "model_method.h"
#include "program_check.h"
#include "ptd_check.h"
#include "seal.h"

namespace cuda_int4 {

using executorch::extension::BufferDataLoader;
using executorch::extension::FlatTensorDataMap;
using executorch::runtime::Error;
using executorch::runtime::Program;

struct Model::Impl {
  // In the order of construction: what is below may point to what is above.
  MappedFile pte, ptd;
  std::optional<BufferDataLoader> pte_loader, ptd_loader;
  std::optional<FlatTensorDataMap> data;
  std::optional<Program> program;
  ModelMethod::Source source;
  std::vector<std::unique_ptr<ModelMethod>> methods;
  std::vector<std::string> names;
  ModelMethod* latest = nullptr;  // whose outputs output() shows
  double load_seconds = 0;

  ModelMethod* find(const char* name) const {
    for (const auto& method : methods)
      if (name != nullptr && method->name() == name) return method.get();
    return nullptr;
  }

  Error open_files(const char* path, const char* data_path, bool verify);
  Error open_methods();
};

Error Model::Impl::open_files(const char* path, const char* data_path, bool verify) {
  FileBody pte_body, ptd_body;
  Error error = pte.open(path);
  if (error == Error::Ok) error = check_file(pte, FileKind::kPte, verify, &pte_body);
  if (error != Error::Ok) return error;
  bool all_verified = pte_body.verified;
  if (data_path != nullptr) {
    error = ptd.open(data_path);
    if (error == Error::Ok) error = check_file(ptd, FileKind::kPtd, verify, &ptd_body);
    if (error == Error::Ok) error = check_ptd(ptd.data(), ptd_body.nbytes, data_path);
    if (error != Error::Ok) return error;
    all_verified = all_verified && ptd_body.verified;
    ptd_loader.emplace(ptd.data(), ptd_body.nbytes);
    auto map = FlatTensorDataMap::load(&*ptd_loader);
    if (!map.ok())
      return fail(map.error(), "%s: expected a .ptd, got %s; it is damaged, export it again",
                  data_path, executorch::runtime::to_string(map.error()));
    data.emplace(std::move(map.get()));
    source.data = &*data;
  }
  // A verified seal covers the constants: no second pass over them.
  source.options.verify = verify && !all_verified;

  pte_loader.emplace(pte.data(), pte_body.nbytes);
  auto loaded = Program::load(&*pte_loader, Program::Verification::InternalConsistency);
  if (!loaded.ok())
    return fail(
        loaded.error(),
        "%s: expected an ExecuTorch program, got %s; the .pte is truncated or damaged, export "
        "it again",
        path, executorch::runtime::to_string(loaded.error()));
  program.emplace(std::move(loaded.get()));
  source.program_data = pte.data();
  source.program = &*program;
  return Error::Ok;
}

Error Model::Impl::open_methods() {
  std::vector<MethodShape> shapes;
  const Error error = check_program(pte.data(), pte.path().c_str(), &shapes);
  if (error != Error::Ok) return error;
  for (const MethodShape& shape : shapes) {
    methods.emplace_back();
    const Error failed = ModelMethod::load(source, shape, &methods.back());
    if (failed != Error::Ok) return failed;
    names.emplace_back(shape.name);
  }
  return Error::Ok;
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

Error Model::open(const char* path, const char* data_path, const char* device, bool verify,
                  std::unique_ptr<Model>* out) {
  ModelOptions options;
  if (device != nullptr) options.device = device;
  options.verify = verify;
  return open(path, data_path, options, out);
}

Error Model::open(const char* path, const char* data_path, const ModelOptions& options,
                  std::unique_ptr<Model>* out) {
  const auto start = std::chrono::steady_clock::now();
  executorch::runtime::runtime_init();
  if (path == nullptr || out == nullptr)
    return fail(Error::InvalidArgument, "Model::open: path and out must not be nullptr");
  auto impl = std::make_unique<Impl>();
  impl->source.options = options;
  Error error = impl->open_files(path, data_path, options.verify);
  if (error == Error::Ok) error = impl->open_methods();
  if (error != Error::Ok) return error;
  impl->load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  out->reset(new Model(std::move(impl)));
  return Error::Ok;
}

const std::vector<std::string>& Model::methods() const { return impl_->names; }

bool Model::has_method(const char* method) const { return impl_->find(method) != nullptr; }

size_t Model::n_inputs(const char* method) const {
  const ModelMethod* found = impl_->find(method);
  return found == nullptr ? 0 : found->n_inputs();
}

size_t Model::n_outputs(const char* method) const {
  const ModelMethod* found = impl_->find(method);
  return found == nullptr ? 0 : found->n_outputs();
}

Error Model::input_info(const char* method, size_t index, TensorView* info) const {
  if (index >= n_inputs(method))
    return fail(Error::InvalidArgument, "input_info: no input %zu of method %s", index,
                method == nullptr ? "nullptr" : method);
  *info = impl_->find(method)->input_info(index);
  return Error::Ok;
}

Error Model::output_info(const char* method, size_t index, TensorView* info) const {
  if (index >= n_outputs(method))
    return fail(Error::InvalidArgument, "output_info: no output %zu of method %s", index,
                method == nullptr ? "nullptr" : method);
  *info = impl_->find(method)->output_info(index);
  return Error::Ok;
}

Error Model::forward(const char* method, const TensorView* inputs, size_t n_inputs,
                     size_t* n_outputs) {
  ModelMethod* found = impl_->find(method);
  if (found == nullptr)
    return fail(Error::InvalidArgument, "expected one of this model's methods, got \"%s\"",
                method == nullptr ? "nullptr" : method);
  impl_->latest = nullptr;
  const Error error = found->forward(inputs, n_inputs);
  if (error != Error::Ok) return error;
  impl_->latest = found;
  if (n_outputs != nullptr) *n_outputs = found->n_outputs();
  return Error::Ok;
}

Error Model::output(size_t index, TensorView* out) const {
  if (impl_->latest == nullptr)
    return fail(Error::InvalidState, "output: expected a successful forward before it, got none");
  return impl_->latest->output(index, out);
}

Error Model::profile(const char* method, const TensorView* inputs, size_t n_inputs, int rounds,
                     Profile* out) {
  if (rounds < 1 || out == nullptr)
    return fail(Error::InvalidArgument, "profile: expected 1 round or more, got %d", rounds);
  ModelMethod* found = impl_->find(method);
  if (found != nullptr)
    for (DelegateMethod* delegate : found->delegates()) delegate->set_profiling(rounds);
  const Error error = forward(method, inputs, n_inputs, nullptr);
  if (found == nullptr) return error;
  *out = {};
  for (DelegateMethod* delegate : found->delegates()) {
    delegate->set_profiling(0);
    const Profile& part = delegate->profile();
    out->instructions.insert(out->instructions.end(), part.instructions.begin(),
                             part.instructions.end());
    out->total_us += part.total_us;
  }
  return error;
}

Error Model::time_part(const char* method, const TensorView* inputs, size_t n_inputs,
                       const uint8_t* kept, size_t n_kept, int rounds, double* us) {
  if (rounds < 1 || us == nullptr)
    return fail(Error::InvalidArgument, "time_part: expected 1 round or more, got %d", rounds);
  ModelMethod* found = impl_->find(method);
  if (found == nullptr) return forward(method, inputs, n_inputs, nullptr);  // the error
  size_t n = 0;
  for (DelegateMethod* delegate : found->delegates()) n += delegate->n_instructions();
  if (n != n_kept || kept == nullptr)
    return fail(Error::InvalidArgument,
                "time_part: expected one entry for each of %zu instructions, got %zu; take their "
                "number from a profile",
                n, kept == nullptr ? 0 : n_kept);
  for (DelegateMethod* delegate : found->delegates()) {
    delegate->set_timing_part(kept, rounds);
    kept += delegate->n_instructions();
  }
  const Error error = forward(method, inputs, n_inputs, nullptr);
  *us = 0;
  for (DelegateMethod* delegate : found->delegates()) {
    delegate->set_timing_part(nullptr, 0);
    *us += delegate->profile().total_us;
  }
  impl_->latest = nullptr;  // its outputs are of no call
  return error;
}

DecodeSteps* Model::decode_steps(const char* method) {
  ModelMethod* found = impl_->find(method);
  DecodeSteps* steps = found == nullptr ? nullptr : found->decode_steps();
  if (steps != nullptr) impl_->latest = nullptr;
  return steps;
}

Error Model::reset() {
  impl_->latest = nullptr;
  for (const auto& method : impl_->methods) {
    const Error error = method->reset();
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

DeviceUse Model::device_use() const {
  DeviceUse sum;
  for (const auto& method : impl_->methods)
    for (DelegateMethod* delegate : method->delegates()) {
      const DeviceUse use = delegate->device_use();
      if (sum.device.empty()) sum.device = use.device;
      sum.device_bytes += use.device_bytes;
      sum.peak_device_bytes += use.peak_device_bytes;
      sum.uploaded_bytes += use.uploaded_bytes;
      sum.upload_s += use.upload_s;
      sum.eager_runs += use.eager_runs;
      sum.captures += use.captures;
      sum.replays += use.replays;
    }
  return sum;
}

double Model::load_seconds() const { return impl_->load_seconds; }

}  // namespace cuda_int4
