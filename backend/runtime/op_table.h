// The one table of what the delegate runs: the partitioner reads it through
// cuda_int4_supported_ops, the delegate takes its kernels from it, so the two cannot disagree.
//
//   name in a graph                 name in a nested program      kernel on the CPU
//   cuda_int4::linear.out           the same                      ours (own_ops.cpp, kernels/)
//   aten::mul.out                   cuda_int4::mul.out            ExecuTorch's aten::mul.out
//   aten::linear.out                cuda_int4::dense_linear.out   ExecuTorch's: the name is taken
//   dim_order_ops::_clone...out     cuda_int4::_clone...out       ExecuTorch's
//   aten::sym_size.int              the same                      ExecuTorch's, on shapes only
//   executorch_prim::add.Scalar     the same                      ExecuTorch's, on ints only
//
// On CUDA generic ops have kernels of ours (cuda_ops.h); what has none there is not in its list.
// Generic ops are renamed in nested programs so that a kernel missing on a device is an error and
// never a CPU kernel on device pointers.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <string>
#include <string_view>

#include "../kernels/tensor_view.h"

namespace cuda_int4 {

/// The kernel by its name in a nested program; nullptr where the table has none.
executorch::runtime::OpFunction find_cpu_kernel(std::string_view nested_name);
executorch::runtime::OpFunction find_cuda_kernel(std::string_view nested_name);

/// ExecuTorch's own kernel for all dtypes, looked for quietly: the library's lookup logs what it does
/// not find.
executorch::runtime::OpFunction find_registered(std::string_view name);

/// Graph names of every op that `device` runs, sorted, one to a line.
const std::string& supported_ops(DeviceKind device);

}  // namespace cuda_int4
