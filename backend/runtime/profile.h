// Profile -- where the time of one call goes, instruction by instruction.
//
// On a GPU the instructions are those of a captured graph with a timestamp between each two, so that
// the host's launches do not count; a timestamp itself costs about a microsecond, which is why
// total_us, of the same graph without them, is less than the sum.
#pragma once

#include <string>
#include <vector>

namespace cuda_int4 {

struct InstructionTime {
  std::string op;      // "cuda_int4::linear.out"
  std::string detail;  // of an int4 linear: "layers.0.wq.weight N=4096 K=4096 int8"; else ""
  double us;           // median of the rounds
};

struct Profile {
  std::vector<InstructionTime> instructions;  // in their order; of every delegate in turn
  double total_us = 0;                        // of the delegates, transfers of inputs included
};

}  // namespace cuda_int4
