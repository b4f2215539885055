// Generic ops on the CPU: kernels of ExecuTorch's, which take their arguments' number and types for
// granted and end the process where these are others. What is found here looks first.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <string>
#include <string_view>
#include <vector>

namespace cuda_int4 {

/// `graph_name` as in "aten::mul.out"; nullptr: not one of them, or ExecuTorch has no kernel for it.
executorch::runtime::OpFunction find_forwarded(std::string_view graph_name);

/// Graph names of those that ExecuTorch has kernels for.
std::vector<std::string> forwarded_ops();

/// The graph name of one of these ops from its name alone: "mul.out" to "aten::mul.out"; empty: none
/// of them.
std::string forwarded_graph_name(std::string_view name);

}  // namespace cuda_int4
