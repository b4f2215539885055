// TensorView, Status and ExecutionContext: the vocabulary of every kernel entry point.
//
// Plain C-compatible structs: the ExecuTorch runtime fills them from EValues, PyTorch eager fills
// them through ctypes, and neither type system is known below this line. The layout of each struct
// is part of the C interface (runtime/c_api.h); Python's ctypes mirror is backend/_native.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_int4 {

// Numbers are those of torch::ScalarType and executorch's ScalarType.
enum class DType : int32_t {
  kUInt8 = 0,
  kInt8 = 1,
  kInt16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kFloat16 = 5,
  kFloat32 = 6,
  kFloat64 = 7,
  kBool = 11,
  kBFloat16 = 15,
};

constexpr int kMaxDims = 8;

// A tensor somebody else owns. data == nullptr with ndim == -1 is "no tensor" (an optional).
struct TensorView {
  void* data;
  uint64_t nbytes;
  DType dtype;
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  bool present() const { return ndim >= 0; }
};
static_assert(sizeof(TensorView) == 152, "mirrored by backend/_native.py");

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,     // the caller's tensors disagree with each other or with the contract
  kIncompatibleLayout = 2,  // sound data in a layout or version that this build does not read
  kUnsupported = 3,         // well-formed, but no kernel on this device
  kOutOfMemory = 4,
  kDeviceError = 5,  // the driver said no
};

// What a kernel entry point returns: a code and, unless it is kOk, who expected what, what came,
// and what to do. No exceptions and no allocation below this line.
struct Status {
  StatusCode code = StatusCode::kOk;
  char message[1020] = {0};

  bool ok() const { return code == StatusCode::kOk; }
};

enum class DeviceKind : int32_t { kCpu = 0, kCuda = 1 };

// Runs fn(context, begin, end) over disjoint ranges that cover [0, n), each at least `grain` long
// but the last, on the caller's thread pool; returns when all have run.
using ParallelFor = void (*)(int64_t n, int64_t grain,
                             void (*fn)(void* context, int64_t begin, int64_t end), void* context);

// Where a CUDA kernel notes the first value it could not use, such as an index out of range: it skips
// the access, and the host reports it when it hands the outputs over.
struct DeviceFault {
  int32_t kind;  // 0: none yet; 1: index out of range; 2: integer division by 0
  uint32_t op_index;
  int64_t value;
  int64_t limit;  // of an index: values 0..limit-1 are fine
};

struct ExecutionContext {
  DeviceKind device;
  void* stream;              // cudaStream_t on CUDA, nullptr on the CPU
  ParallelFor parallel_for;  // CPU only; nullptr runs on the calling thread
  void* scratch;             // scratch_bytes the op asked for, 64-byte aligned
  uint64_t scratch_bytes;
  // CUDA only from here on.
  const void* quantized_x = nullptr;  // x of a w4a8 linear, already quantised; nullptr: not yet
  // Where rms_norm, add_rms_norm and gate_mul write y [..., K] a second time, as the w4a8 kernels read
  // it (quantized_activation_bytes); nullptr: nobody asks. K % 32 == 0.
  void* quantized_y = nullptr;
  DeviceFault* fault = nullptr;  // memory that both sides see; nullptr: nobody asks
  uint32_t op_index = 0;         // for `fault`: the instruction of the nested program
  // Nothing that is queued writes the weights of linears: a kernel launched as a dependent may read
  // them before its griddepcontrol_wait. In PyTorch the kernel ahead may have made them.
  bool constant_weights = false;
};

}  // namespace cuda_int4
