// The functions of a gate by name; gate_mul's `activation`.
#pragma once

#include <cstring>

namespace cuda_int4 {

enum class GateFunction { kSilu, kGelu, kGeluTanh, kUnknown };

inline GateFunction gate_function_of(const char* activation) {
  if (activation == nullptr) return GateFunction::kUnknown;
  if (strcmp(activation, "silu") == 0) return GateFunction::kSilu;
  if (strcmp(activation, "gelu") == 0) return GateFunction::kGelu;
  if (strcmp(activation, "gelu_tanh") == 0) return GateFunction::kGeluTanh;
  return GateFunction::kUnknown;
}

}  // namespace cuda_int4
