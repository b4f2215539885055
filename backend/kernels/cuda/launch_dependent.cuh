// Launches of kernels that may start before the kernel ahead of them in the stream has ended.
#pragma once

#include <cuda_runtime.h>

namespace cuda_int4 {

// `kernel` calls griddepcontrol_wait before it touches memory that others write or read: its launch
// overlaps the end of the kernel ahead. Weights are such memory, unless the context has
// constant_weights. A plain launch where the GPU (below sm_90) has no such thing.
// `cluster_blocks` above 1: blocks of the grid that make one cluster (sm_90).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent_clusters(void (*kernel)(Parameters...), dim3 grid,
                                      unsigned cluster_blocks, dim3 block, int shared_bytes,
                                      cudaStream_t stream, const Arguments&... arguments) {
  int device = 0, major = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster_blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster_blocks > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                             cudaStream_t stream, const Arguments&... arguments) {
  return launch_dependent_clusters(kernel, grid, 1, block, shared_bytes, stream, arguments...);
}

}  // namespace cuda_int4
