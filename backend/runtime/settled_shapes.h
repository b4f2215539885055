// SettledShapes -- what a method remembers of the shapes of inputs that it has run: how its outputs
// came out, and the graph that replays the run.
//
//   first run of a shape    eager, and the results are noted
//   second                  captured, if the device can; then launched
//   later                   launched
//
// A few are kept; the one used longest ago goes first. A graph holds addresses: those of another
// generation of the method's growing memory are stale, and it is captured again.
#pragma once

#include <executorch/runtime/core/evalue.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "device.h"

namespace cuda_int4 {

// An output of the nested method as a run of this shape leaves it.
struct SettledOutput {
  const void* data = nullptr;  // device memory
  size_t nbytes = 0;
  std::vector<executorch::aten::SizesType> sizes;
  executorch::runtime::EValue number;  // where it is no tensor
};

struct SettledGraph {
  std::unique_ptr<DeviceGraph> graph;
  size_t generation = 0;  // of the memory that the graph uses
  int failed_captures = 0;
  int64_t vocab_size = 0;  // of a step
};

struct SettledShape {
  std::vector<int64_t> key;
  std::vector<SettledOutput> outputs;
  SettledGraph call;
  std::array<SettledGraph, 2> steps;  // of decoding: [rows draw, all are greedy]
  uint64_t last_used = 0;
};

class SettledShapes {
 public:
  static constexpr size_t kMaxShapes = 8;

  /// nullptr for a shape that is not among them.
  SettledShape* find(const std::vector<int64_t>& key);
  /// A new one, in the place of the oldest if they are many.
  SettledShape& add(const std::vector<int64_t>& key);
  void clear() { shapes_.clear(); }
  /// Graphs of steps hold addresses that calls do not.
  void forget_steps() {
    for (const auto& shape : shapes_) shape->steps = {};
  }

 private:
  std::vector<std::unique_ptr<SettledShape>> shapes_;
  uint64_t now_ = 0;
};

}  // namespace cuda_int4
