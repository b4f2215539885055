// cuda_int4::linear on the CPU: what the layouts share.
#include "linear.h"

#include "../checks.h"
#include "../linear_sizes.h"
#include "../parallel_ranges.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

LinearJob make_linear_job(const LinearArgs& args) {
  LinearJob job = {};
  job.x = args.x.data;
  job.qdata = static_cast<const uint8_t*>(args.qdata.data);
  job.scale = args.scale.data;
  job.zero_point = args.zero_point.present() ? args.zero_point.data : nullptr;
  job.bias = args.bias.present() ? args.bias.data : nullptr;
  job.y = args.y.data;
  job.dtype = args.x.dtype;
  job.scale_dtype = args.scale.dtype;
  job.zero_point_dtype = args.zero_point.present() ? args.zero_point.dtype : args.scale.dtype;
  job.M = linear_M(args);
  job.N = linear_N(args);
  job.K = linear_K(args);
  job.group_size = args.group_size;
  job.y_stride = job.N;
  job.int8_activation = args.activation[0] == 'i';
  return job;
}

LinearJob rows_of_job(const LinearJob& job, int64_t m0, int64_t max_rows) {
  const int64_t elem_bytes = dtype_bytes(job.dtype);
  LinearJob rows = job;
  rows.M = smaller(max_rows, job.M - m0);
  rows.x = static_cast<const char*>(job.x) + m0 * job.K * elem_bytes;
  rows.y = static_cast<char*>(job.y) + m0 * job.y_stride * elem_bytes;
  return rows;
}

void stage_rows(const LinearKernel& kernel, const LinearJob& job, const ExecutionContext& context) {
  parallel_ranges(context, job.M, ceil_div(kGrainWeights / 4, job.K),
                  [&](int64_t begin, int64_t end) { kernel.stage(job, begin, end); });
}

}  // namespace cpu
}  // namespace cuda_int4
