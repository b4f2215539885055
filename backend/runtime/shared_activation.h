// SharedActivation -- the int8 form of an activation, made by the first w4a8 linear that reads it and
// found there by the others: the query, key and value projections of one x quantise it once. From
// the next run on, an op that can write its result as int8 too has made it already.
#pragma once

#include <executorch/runtime/core/evalue.h>

#include <cstddef>
#include <cstdint>
#include <unordered_set>

#include "../kernels/ops.h"
#include "device.h"

namespace cuda_int4 {

/// One of a method, on a GPU. Its memory grows to the largest x and then stays where it is.
class SharedActivation {
 public:
  explicit SharedActivation(Device& device) : device_(device) {}
  ~SharedActivation() { device_.free(memory_); }
  SharedActivation(const SharedActivation&) = delete;
  SharedActivation& operator=(const SharedActivation&) = delete;

  /// Sets execution->quantized_x for a linear of activation "int8" whose x is `value`. `args` are
  /// valid.
  executorch::runtime::Error give(const executorch::runtime::EValue* value, const LinearArgs& args,
                                  ExecutionContext* execution);
  /// Sets execution->quantized_y for an op that can write its result `y`, which is `value`, as int8
  /// too, where a linear was given that value before. The op is queued behind it.
  executorch::runtime::Error take(const executorch::runtime::EValue* value, const TensorView& y,
                                  ExecutionContext* execution);
  /// What it holds may have been written to since: from here on it is made again.
  void forget() { of_ = nullptr; }
  /// Counts the memories there have been: addresses given out under another count are stale.
  size_t generation() const { return generation_; }

 private:
  Device& device_;
  void* memory_ = nullptr;
  uint64_t nbytes_ = 0;
  size_t generation_ = 0;
  const executorch::runtime::EValue* of_ = nullptr;
  const void* of_data_ = nullptr;
  uint64_t of_nbytes_ = 0;
  std::unordered_set<const executorch::runtime::EValue*> read_;  // what linears were given

  executorch::runtime::Error reserve(const TensorView& x);
  void now_of(const executorch::runtime::EValue* value, const TensorView& x);
};

}  // namespace cuda_int4
