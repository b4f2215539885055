// Model -- a .pte (and its .ptd) opened, verified, and ready to run.
//
//   std::unique_ptr<cuda_int4::Model> model;
//   Model::open("model.pte", nullptr, "auto", /*verify=*/true, &model);
//   model->forward("forward", inputs, 2, &n_outputs);
//   model->output(0, &logits);
//
// open() checks the seal (seal.h) before it parses a byte, then loads every method, so that a file
// which this build cannot run fails here and not in the middle of a conversation. Everything a
// method owns hangs on it: two models share nothing but the thread pool.
//
// Errors are returned, with the reason in last_error() (errors.h). One thread at a time per model.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "../kernels/tensor_view.h"
#include "device_use.h"
#include "profile.h"
#include "visibility.h"

namespace cuda_int4 {

struct ModelOptions {
  /// "auto" | "cpu" | "cuda" | "cuda:<index>". The environment variable CUDA_INT4_DEVICE takes the
  /// place of "auto", which is CUDA where a GPU answers and has a kernel of every op, else the CPU.
  std::string device = "auto";
  /// False skips every checksum over constants; programs and their headers are always checked.
  bool verify = true;
  /// From the second call on with the same sizes of inputs, replay a CUDA graph of the first. False,
  /// or CUDA_INT4_CUDA_GRAPH=0 in the environment, launches kernel by kernel always.
  bool cuda_graph = true;
  /// Where a Decoder (decoder.h) drives a model that is wholly on a GPU, tokens are chosen there and the
  /// host reads them behind. False, or CUDA_INT4_DEVICE_LOOP=0 in the environment, brings the logits of
  /// every token to the host: the same tokens, later.
  bool device_loop = true;
  /// Work on cuda_stream, a cudaStream_t (nullptr: the legacy default stream) that outlives the
  /// model. Else each method has a stream of its own.
  bool on_callers_stream = false;
  void* cuda_stream = nullptr;
};

class DecodeSteps;  // decode_steps.h

class CUDA_INT4_EXPORT Model {
 public:
  /// data_path: nullptr or a .ptd. *out: on Ok only.
  static executorch::runtime::Error open(const char* path, const char* data_path,
                                         const ModelOptions& options, std::unique_ptr<Model>* out);
  /// The two options that most callers have; nullptr is "auto".
  static executorch::runtime::Error open(const char* path, const char* data_path,
                                         const char* device, bool verify,
                                         std::unique_ptr<Model>* out);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const std::vector<std::string>& methods() const;
  bool has_method(const char* method) const;
  /// 0 where there is no such method.
  size_t n_inputs(const char* method) const;
  size_t n_outputs(const char* method) const;
  /// What `method` takes or gives at `index`: dtype and greatest sizes, no data. An int, a double or
  /// a bool is a 0-dimensional tensor. InvalidArgument: no such method or index.
  executorch::runtime::Error input_info(const char* method, size_t index, TensorView* info) const;
  executorch::runtime::Error output_info(const char* method, size_t index, TensorView* info) const;

  /// Runs `method`. Inputs are contiguous, borrowed for the call, and not views of the method's own
  /// outputs, which the call writes; an int, double or bool input is
  /// the 0-dimensional tensor (int64, float64, bool) of it. *n_outputs may be nullptr.
  executorch::runtime::Error forward(const char* method, const TensorView* inputs, size_t n_inputs,
                                     size_t* n_outputs);
  /// Output `index` of the latest forward; the view holds until the next call on this model.
  executorch::runtime::Error output(size_t index, TensorView* out) const;

  /// Runs `method` as forward does, each delegate `rounds` + 2 times, and says where the time of one
  /// run goes. A method that adds to a state (not one that writes to given positions of a cache)
  /// does so as many times.
  executorch::runtime::Error profile(const char* method, const TensorView* inputs, size_t n_inputs,
                                     int rounds, Profile* out);

  /// *us: how long the delegates of `method` would run without the instructions (profile's, in its
  /// order) for which `kept` is 0; a median of `rounds`. What they write may be anything afterwards.
  /// NotSupported: not on a GPU, or it cannot be recorded as a CUDA graph.
  executorch::runtime::Error time_part(const char* method, const TensorView* inputs,
                                       size_t n_inputs, const uint8_t* kept, size_t n_kept,
                                       int rounds, double* us);

  /// `method` as steps that follow each other on the device, until the next call on this model; nullptr
  /// where it cannot be: on the CPU, and where something of it runs outside one delegate.
  DecodeSteps* decode_steps(const char* method);

  /// Zeroes every mutable buffer (KV caches): a new conversation.
  executorch::runtime::Error reset();

  /// Of all its methods together.
  DeviceUse device_use() const;
  /// Seconds that open() took.
  double load_seconds() const;

 private:
  struct Impl;
  explicit Model(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace cuda_int4
