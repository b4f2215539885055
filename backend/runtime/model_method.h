// ModelMethod -- one method of a .pte, loaded: its memory, its delegates, its latest outputs.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/tensor_view.h"
#include "delegate.h"
#include "model.h"
#include "program_check.h"
#include "temp_arena.h"

namespace cuda_int4 {

class ModelMethod {
 public:
  struct Source {
    const void* program_data = nullptr;  // what `program` was loaded from, past check_program
    const executorch::runtime::Program* program = nullptr;
    const executorch::runtime::NamedDataMap* data = nullptr;  // the .ptd, or nullptr
    ModelOptions options;                                     // verify: the constants
  };

  /// `source` outlives the result.
  static executorch::runtime::Error load(const Source& source, const MethodShape& shape,
                                         std::unique_ptr<ModelMethod>* out);
  ~ModelMethod();
  ModelMethod(const ModelMethod&) = delete;
  ModelMethod& operator=(const ModelMethod&) = delete;

  const std::string& name() const { return name_; }
  size_t n_inputs() const { return inputs_.size(); }
  size_t n_outputs() const { return outputs_.size(); }
  const TensorView& input_info(size_t i) const { return inputs_[i].info; }
  const TensorView& output_info(size_t i) const { return outputs_[i].info; }

  executorch::runtime::Error forward(const TensorView* inputs, size_t n);
  executorch::runtime::Error output(size_t i, TensorView* out);
  executorch::runtime::Error reset();
  const std::vector<DelegateMethod*>& delegates() const { return delegates_; }
  /// nullptr where it is not the whole of one delegate on a GPU.
  DecodeSteps* decode_steps();

 private:
  struct Input {
    TensorView info;  // greatest sizes; a number is 0-dimensional
    executorch::runtime::Tag tag;
    bool contiguous;  // in the program; anything else is not for TensorViews
  };
  struct Output {
    TensorView info;
    executorch::runtime::Tag tag;
    bool is_input = false;  // handed through
    void* own = nullptr;    // memory for an output that the program plans none for
    union {
      int64_t as_int;
      double as_double;
      bool as_bool;
    } number = {0};
  };

  ModelMethod(const Source& source, const MethodShape& shape);
  executorch::runtime::Error open();
  executorch::runtime::Error describe();
  void page_lock();
  void undo_page_locks();
  executorch::runtime::Error check_apart(size_t i, const TensorView& view) const;
  executorch::runtime::Error set_input(size_t i, const TensorView& view);

  const Source& source_;
  std::string name_;
  bool is_one_delegate_;  // its inputs and outputs are the delegate's
  bool only_delegates_;   // nothing outside them runs, so all state is theirs
  size_t n_delegate_calls_;
  std::unique_ptr<Device> host_;
  std::vector<void*> allocations_;  // of host_
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_;
  std::optional<executorch::extension::MallocMemoryAllocator> method_memory_;
  std::optional<TempArena> temp_;
  std::optional<executorch::runtime::MemoryManager> memory_;
  std::optional<executorch::runtime::Method> method_;
  std::vector<DelegateMethod*> delegates_;  // of method_
  std::vector<void*> page_locked_;          // memory that delegates_[0]'s device page-locked
  std::vector<Input> inputs_;
  std::vector<Output> outputs_;
};

}  // namespace cuda_int4
