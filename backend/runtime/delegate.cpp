#include "delegate.h"

#include <executorch/runtime/backend/interface.h>

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "errors.h"

namespace cuda_int4 {

using executorch::runtime::ArrayRef;
using executorch::runtime::BackendExecutionContext;
using executorch::runtime::BackendInitContext;
using executorch::runtime::CompileSpec;
using executorch::runtime::DelegateHandle;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;

namespace {

thread_local DelegateListener* listener = nullptr;

bool is_off_by_environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::strcmp(value, "0") == 0;
}

/// The number of a cudaStream_t, which options have no type for.
Error read_stream(const char* text, DelegateMethod::Options* options) {
  const char* end = text + std::strlen(text);
  uintptr_t address = 0;
  const auto parsed = std::from_chars(text, end, address);
  if (text == end || parsed.ec != std::errc() || parsed.ptr != end)
    return fail(Error::InvalidArgument,
                "cuda_stream: expected the address of a cudaStream_t in decimal, got \"%s\"", text);
  options->on_callers_stream = true;
  options->stream = reinterpret_cast<void*>(address);
  return Error::Ok;
}

/// Nothing may be thrown into ExecuTorch, which is built without exceptions.
template <typename Body>
Error guarded(Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& e) {
    return fail(Error::MemoryAllocationFailed, "CudaInt4Backend: %s", e.what());
  } catch (...) {
    return fail(Error::Internal, "CudaInt4Backend: unknown C++ exception");
  }
}

class CudaInt4Backend final : public executorch::runtime::BackendInterface {
 public:
  bool is_available() const override { return true; }

  Result<DelegateHandle*> init(BackendInitContext& context, FreeableBuffer* processed,
                               ArrayRef<CompileSpec>) const override {
    clear_last_error();
    std::unique_ptr<DelegateMethod> method;
    const Error error = guarded([&]() -> Error {
      DelegateMethod::Options options;
      options.verify_constants = !is_off_by_environment("CUDA_INT4_VERIFY");
      options.cuda_graph = !is_off_by_environment("CUDA_INT4_CUDA_GRAPH");
      const auto device = context.get_runtime_spec<const char*>("device");
      if (device.ok()) options.device = device.get();
      const auto verify = context.get_runtime_spec<bool>("verify_constants");
      if (verify.ok()) options.verify_constants = verify.get();
      const auto graph = context.get_runtime_spec<bool>("cuda_graph");
      if (graph.ok()) options.cuda_graph = options.cuda_graph && graph.get();
      const auto loop = context.get_runtime_spec<bool>("device_loop");
      options.device_loop = !is_off_by_environment("CUDA_INT4_DEVICE_LOOP");
      const char* where = std::getenv("CUDA_INT4_DEVICE_LOOP");
      options.cpu_loop = where != nullptr && std::strcmp(where, "cpu") == 0;
      if (loop.ok()) options.device_loop = options.device_loop && loop.get();
      const auto stream = context.get_runtime_spec<const char*>("cuda_stream");
      if (stream.ok()) {
        const Error error = read_stream(stream.get(), &options);
        if (error != Error::Ok) return error;
      }
      const Result<const void*> blob = processed->data_safe();
      if (!blob.ok() || blob.get() == nullptr)
        return fail(Error::InvalidProgram, "delegate blob: expected its bytes, got none");
      const Error failed = DelegateMethod::open(blob.get(), processed->size(),
                                                context.get_named_data_map(), options, &method);
      if (failed == Error::Ok && listener != nullptr) listener->opened.push_back(method.get());
      return failed;
    });
    if (error != Error::Ok) return error;
    return static_cast<DelegateHandle*>(method.release());
  }

  Error execute(BackendExecutionContext& context, DelegateHandle* handle,
                Span<EValue*> args) const override {
    if (handle == nullptr) return Error::DelegateInvalidHandle;
    clear_last_error();
    return guarded([&] {
      return static_cast<DelegateMethod*>(handle)->execute(args, context.event_tracer());
    });
  }

  void destroy(DelegateHandle* handle) const override {
    delete static_cast<DelegateMethod*>(handle);
  }
};

/// False where another copy of this library came first: ExecuTorch then runs that one.
bool register_once() {
  static CudaInt4Backend backend;
  return executorch::runtime::register_backend({kBackendId, &backend}) == Error::Ok;
}

[[maybe_unused]] const bool registered = register_once();

}  // namespace

DelegateListener::DelegateListener() : outer_(listener) { listener = this; }
DelegateListener::~DelegateListener() { listener = outer_; }

}  // namespace cuda_int4
