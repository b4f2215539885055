// Field numbers and union tags of executorch's schema/program.fbs, which only ever appends.
#pragma once

#include <cstdint>

namespace cuda_int4 {
namespace program_schema {

struct ProgramField {
  enum { kPlans = 1, kDelegateData = 3, kSegments = 4, kNamedData = 7 };
};
struct PlanField {
  enum {
    kName = 0,
    kValues = 2,
    kInputs = 3,
    kOutputs = 4,
    kChains = 5,
    kOperators = 6,
    kDelegates = 7,
    kBufferSizes = 8
  };
};
struct ValueField {
  enum { kType = 0, kValue = 1 };
};
struct TensorField {
  enum { kSizes = 2, kData = 5, kAllocation = 6, kExtra = 9 };
};
struct ExtraField {
  enum { kName = 1 };
};
enum KernelType : uint8_t {
  kNull = 1,
  kInt,
  kBool,
  kDouble,
  kTensor,
  kString,
  kIntList,
  kDoubleList,
  kBoolList,
  kTensorList,
  kOptionalTensorList
};
enum InstructionType : uint8_t {
  kKernelCall = 1,
  kDelegateCall,
  kMoveCall,
  kJumpFalseCall,
  kFreeCall
};
constexpr int kItems = 0;  // of every list value

}  // namespace program_schema
}  // namespace cuda_int4
