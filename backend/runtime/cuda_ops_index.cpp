#include "cuda_ops.h"

namespace cuda_int4 {

CudaOps cuda_index_ops() { return {}; }

}  // namespace cuda_int4
