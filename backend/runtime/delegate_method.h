// DelegateMethod -- one delegate blob, opened: its device, constants, caches and nested Method.
//
//   open      everything checked, every constant placed, the nested program loaded; nothing is left
//             to fail in execute but what a caller can get wrong
//   execute   bind inputs and outputs, run, hand outputs over; allocates nothing once shapes settle
//   reset     zero the mutable buffers (KV caches)
//
// All memory it owns hangs on it. One thread at a time.
#pragma once

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>

#include <memory>
#include <optional>
#include <vector>

#include "blob.h"
#include "constants.h"
#include "device.h"
#include "temp_arena.h"

namespace cuda_int4 {

class DelegateMethod {
 public:
  struct Options {
    const char* device = nullptr;  // see make_device
    bool verify_constants = true;
    // On CUDA: the caller's cudaStream_t; else a stream of the method's own.
    bool on_callers_stream = false;
    void* stream = nullptr;
  };

  /// `blob` stays readable for the life of the result; `store` only for the call, but the bytes it
  /// lends stay borrowed.
  static executorch::runtime::Error open(const void* blob, uint64_t blob_nbytes,
                                         const executorch::runtime::NamedDataMap* store,
                                         const Options& options,
                                         std::unique_ptr<DelegateMethod>* out);
  ~DelegateMethod();
  DelegateMethod(const DelegateMethod&) = delete;
  DelegateMethod& operator=(const DelegateMethod&) = delete;

  /// args: the inputs of the nested method, then its outputs.
  executorch::runtime::Error execute(executorch::runtime::Span<executorch::runtime::EValue*> args);
  executorch::runtime::Error reset();

 private:
  struct MutableBuffer {
    void* data;
    size_t nbytes;
  };
  // Where a device does not read host memory: an input's or output's memory there, and memory of
  // the host that transfers need no copy of.
  struct Staged {
    void* device = nullptr;
    void* host = nullptr;
    size_t nbytes = 0;
  };
  struct Output {
    bool is_tensor;
    bool bindable;  // has no memory of its own: written straight into the caller's, or into staged
    size_t max_nbytes;
    std::vector<executorch::aten::SizesType> max_sizes;
    Staged staged;
  };

  DelegateMethod() = default;
  executorch::runtime::Error check_ops();
  executorch::runtime::Error check_linears() const;
  executorch::runtime::Error check_nested(const executorch::runtime::Program& program) const;
  executorch::runtime::Error load_method();
  executorch::runtime::Error place_mutable_buffers();
  executorch::runtime::Error plan_inputs();
  executorch::runtime::Error plan_outputs();
  executorch::runtime::Error stage(const char* what, size_t i, size_t nbytes, Staged* out);
  executorch::runtime::Error bind_input(size_t i, const executorch::runtime::EValue& value);
  executorch::runtime::Error set_tensor_input(size_t i, const executorch::aten::Tensor& given);
  executorch::runtime::Error bind_output(size_t i, executorch::runtime::EValue& value);
  executorch::runtime::Error run();
  executorch::runtime::Error hand_over(size_t i, executorch::runtime::EValue& value);
  executorch::runtime::Error finish_hand_over(
      executorch::runtime::Span<executorch::runtime::EValue*> outputs);

  // In the order of construction: what is below may point to what is above.
  std::unique_ptr<Device> device_;
  Blob blob_;
  std::vector<executorch::runtime::Kernel> kernels_;
  std::unique_ptr<Constants> constants_;
  std::vector<void*> allocations_;  // of device_, freed last
  std::vector<void*> host_allocations_;
  std::vector<MutableBuffer> mutable_buffers_;
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_;
  executorch::extension::MallocMemoryAllocator method_memory_;
  std::unique_ptr<TempArena> temp_;
  std::optional<executorch::runtime::MemoryManager> memory_;
  std::optional<executorch::extension::BufferDataLoader> loader_;
  std::optional<executorch::runtime::Program> program_;
  std::optional<executorch::runtime::Method> method_;
  std::vector<Staged> inputs_;
  std::vector<Output> outputs_;
};

}  // namespace cuda_int4
