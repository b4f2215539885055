// Constants stay constant: kernels read weights ahead of time, and on a CPU they lie in the mapped
// file. Our export never writes to one; a program of another making may.
#pragma once

#include <executorch/runtime/core/error.h>

#include <functional>
#include <string_view>

namespace cuda_int4 {

/// InvalidProgram where an instruction of a method writes to a tensor that is a constant or a view of
/// one, or an input takes its place; or where a number takes the place of a tensor. After
/// check_program.
executorch::runtime::Error check_writes(
    const void* data, const char* what,
    const std::function<bool(std::string_view name)>& is_constant);

/// Whether all state of the program (its tensors with names that are no constants) is written by ops
/// that write to given positions of it: then a call repeated, or one more at positions behind, changes
/// nothing that counts. After check_program.
bool writes_by_position(const void* data,
                        const std::function<bool(std::string_view name)>& is_constant);

}  // namespace cuda_int4
