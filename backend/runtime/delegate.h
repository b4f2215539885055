// The delegate as ExecuTorch knows it: registered as "CudaInt4Backend" when this library is loaded.
//
// Load-time options (backend options of load_method, by this id):
//   device            "auto" | "cpu" | "cuda" | "cuda:<index>"; CUDA_INT4_DEVICE takes the place of
//                     "auto", which is CUDA where that can be, else the CPU
//   verify_constants  bool; false skips the checksums over constants, as does CUDA_INT4_VERIFY=0
//   cuda_graph        bool; false runs every call eagerly, as does CUDA_INT4_CUDA_GRAPH=0
//   cuda_stream       the caller's cudaStream_t to work on, its address in decimal ("0": the legacy
//                     default stream); without it each method has a stream of its own
#pragma once

#include <vector>

#include "delegate_method.h"

namespace cuda_int4 {

constexpr char kBackendId[] = "CudaInt4Backend";

/// While one lives, the delegates that this thread opens are listed in it: a Model finds the
/// delegates behind a Method, which ExecuTorch hides. A delegate is gone when its Method is.
class DelegateListener {
 public:
  DelegateListener();
  ~DelegateListener();
  DelegateListener(const DelegateListener&) = delete;
  DelegateListener& operator=(const DelegateListener&) = delete;

  std::vector<DelegateMethod*> opened;

 private:
  DelegateListener* outer_;
};

}  // namespace cuda_int4
