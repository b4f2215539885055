#include "cuda_ops.h"

#include <iterator>

namespace cuda_int4 {

executorch::runtime::Span<const CudaOps> cuda_op_families() {
  static const CudaOps families[] = {cuda_elementwise_ops(), cuda_shape_ops(),
                                     cuda_index_ops(),       cuda_reduce_ops(),
                                     cuda_matmul_ops(),      cuda_convolution_ops()};
  return {families, std::size(families)};
}

}  // namespace cuda_int4
