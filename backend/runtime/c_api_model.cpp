// The model section of c_api.h on Model.
#include "c_api_internal.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {

Error check_handle(const cuda_int4_model* model) {
  return model != nullptr
             ? Error::Ok
             : fail(Error::InvalidArgument,
                    "expected a model from cuda_int4_model_open, got nullptr (closed already?)");
}

}  // namespace

int32_t cuda_int4_model_open(const char* path, const char* data_path, const char* device,
                             int32_t verify, cuda_int4_model** out) {
  const cuda_int4_model_options options = {device, verify, 1, 1, 0, nullptr};
  return cuda_int4_model_open_with(path, data_path, &options, out);
}

int32_t cuda_int4_model_open_with(const char* path, const char* data_path,
                                  const cuda_int4_model_options* options, cuda_int4_model** out) {
  return guarded([&]() -> Error {
    if (options == nullptr || out == nullptr)
      return fail(Error::InvalidArgument, "model_open: options or out is nullptr");
    ModelOptions model_options;
    if (options->device != nullptr) model_options.device = options->device;
    model_options.verify = options->verify != 0;
    model_options.cuda_graph = options->cuda_graph != 0;
    model_options.device_loop = options->device_loop != 0;
    model_options.on_callers_stream = options->on_callers_stream != 0;
    model_options.cuda_stream = options->cuda_stream;
    auto handle = std::make_unique<cuda_int4_model>();
    const Error error = Model::open(path, data_path, model_options, &handle->model);
    if (error != Error::Ok) return error;
    for (const std::string& method : handle->model->methods()) handle->methods += method + "\n";
    *out = handle.release();
    return Error::Ok;
  });
}

void cuda_int4_model_close(cuda_int4_model* model) { delete model; }

int32_t cuda_int4_model_forward(cuda_int4_model* model, const char* method,
                                const TensorView* inputs, uint64_t n_inputs, uint64_t* n_outputs) {
  return guarded([&]() -> Error {
    const Error error = check_handle(model);
    if (error != Error::Ok) return error;
    size_t n = 0;
    const Error failed = model->model->forward(method, inputs, n_inputs, &n);
    if (failed == Error::Ok && n_outputs != nullptr) *n_outputs = n;
    return failed;
  });
}

int32_t cuda_int4_model_output(cuda_int4_model* model, uint64_t index, TensorView* out) {
  return guarded([&]() -> Error {
    const Error error = check_handle(model);
    return error != Error::Ok ? error : model->model->output(index, out);
  });
}

const char* cuda_int4_model_methods(cuda_int4_model* model) {
  return model == nullptr ? nullptr : model->methods.c_str();
}

int32_t cuda_int4_model_reset(cuda_int4_model* model) {
  return guarded([&]() -> Error {
    const Error error = check_handle(model);
    return error != Error::Ok ? error : model->model->reset();
  });
}

int32_t cuda_int4_model_device_use(cuda_int4_model* model, cuda_int4_device_use* out) {
  return guarded([&]() -> Error {
    const Error error = check_handle(model);
    if (error != Error::Ok) return error;
    if (out == nullptr) return fail(Error::InvalidArgument, "device_use: out is nullptr");
    const DeviceUse use = model->model->device_use();
    *out = {{0},          use.device_bytes, use.peak_device_bytes, use.uploaded_bytes,
            use.upload_s, use.eager_runs,   use.captures,          use.replays};
    use.device.copy(out->device, sizeof(out->device) - 1);
    return Error::Ok;
  });
}

int32_t cuda_int4_model_profile(cuda_int4_model* model, const char* method,
                                const TensorView* inputs, uint64_t n_inputs, int32_t rounds,
                                const char** text) {
  return guarded([&]() -> Error {
    Error error = check_handle(model);
    if (error != Error::Ok) return error;
    if (text == nullptr) return fail(Error::InvalidArgument, "profile: text is nullptr");
    Profile profile;
    error = model->model->profile(method, inputs, n_inputs, rounds, &profile);
    if (error != Error::Ok) return error;
    model->profile = std::to_string(profile.total_us) + "\ttotal\t\n";
    for (const InstructionTime& one : profile.instructions)
      model->profile += std::to_string(one.us) + "\t" + one.op + "\t" + one.detail + "\n";
    *text = model->profile.c_str();
    return Error::Ok;
  });
}

int32_t cuda_int4_model_time_part(cuda_int4_model* model, const char* method,
                                  const TensorView* inputs, uint64_t n_inputs, const uint8_t* kept,
                                  uint64_t n_kept, int32_t rounds, double* us) {
  return guarded([&]() -> Error {
    const Error error = check_handle(model);
    if (error != Error::Ok) return error;
    return model->model->time_part(method, inputs, n_inputs, kept, n_kept, rounds, us);
  });
}
