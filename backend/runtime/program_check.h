// What ExecuTorch's flatbuffer verification leaves open: indices.
//
// Program::load with InternalConsistency makes sure that every pointer of the flatbuffer stays
// inside it. It does not look at numbers that index other tables, and Method trusts some of them: an
// input beyond the values aborts the process, an op index out of range is forgotten when the next
// operator resolves. check_program reads those numbers; program_linears reads what the nested
// program says of its int4 linears, for delegate.cpp to hold against the header.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cuda_int4 {

/// What one method of a program consists of.
struct MethodShape {
  std::string_view name;
  uint32_t kernel_calls = 0;
  uint32_t delegate_calls = 0;
  uint32_t other_instructions = 0;
  uint32_t jumps = 0;              // of the other instructions
  uint32_t planned_inputs = 0;     // with memory of their own, which the host writes
  uint32_t tensors_with_data = 0;  // constants and initial values that are in the program itself
  // It does nothing but call a delegate with its inputs and outputs, in their order.
  bool is_one_delegate = false;
};

/// One call of cuda_int4::linear. Keys are those of its constants, "" where there is none.
struct LinearCall {
  std::string_view qdata, scale, zero_point, meta;
  int64_t group_size;
  std::string_view layout_tag, activation;
  int64_t out_features;  // 0: not stated
};

/// `data` has passed Program::load with Verification::InternalConsistency; `what` names it in
/// messages. Fills in `methods` (may be nullptr); its names point into `data`.
executorch::runtime::Error check_program(const void* data, const char* what,
                                         std::vector<MethodShape>* methods);

/// Name and overload of every operator of every method ("cuda_int4::mul.out"); after check_program.
std::vector<std::string> program_operators(const void* data);

/// The operator that the `index`-th instruction of `method` calls, for messages; after
/// check_program. "an op" where it calls none or, because of jumps, cannot be told.
std::string operator_at(const void* data, std::string_view method, size_t index);

/// Of each instruction of `method` the operator it calls, "" where it calls none; after
/// check_program.
std::vector<std::string> instruction_operators(const void* data, std::string_view method);

/// Every call of cuda_int4::linear, after check_program. An argument that is not what the op's
/// schema says is InvalidProgram.
executorch::runtime::Error program_linears(const void* data, std::vector<LinearCall>* out);

}  // namespace cuda_int4
