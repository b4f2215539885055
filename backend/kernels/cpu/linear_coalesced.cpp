// cuda_int4::linear on coalesced.v1 on the CPU: from arguments to a job, and the job to threads.
#include "../checks.h"
#include "../coalesced.h"
#include "../layouts.h"
#include "../parallel_ranges.h"
#include "isa.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

namespace {

// Weights times rows of x, about 15 us of one core: less is not worth waking a thread for.
constexpr int64_t kGrainWeights = int64_t{1} << 19;

LinearJob make_job(const LinearArgs& args) {
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
  job.int8_activation = args.activation[0] == 'i';
  return job;
}

}  // namespace

uint64_t linear_scratch_bytes_on(const CpuKernels& kernels, const LinearArgs& args) {
  LinearJob job = make_job(args);
  const LinearKernel* kernel = kernels.choose_linear(job);
  job.M = smaller(job.M, kernel->max_rows);
  return kernel->scratch_bytes(job);
}

Status linear_on(const CpuKernels& kernels, const LinearArgs& args,
                 const ExecutionContext& context) {
  LinearJob job = make_job(args);
  const LinearKernel* kernel = kernels.choose_linear(job);
  job.scratch = context.scratch;
  const int64_t M = job.M, elem_bytes = dtype_bytes(job.dtype);
  const int64_t n_units = ceil_div(job.N, kernel->n_unit);
  for (int64_t m0 = 0; m0 < M; m0 += kernel->max_rows) {
    job.M = smaller(kernel->max_rows, M - m0);
    job.x = static_cast<const char*>(args.x.data) + m0 * job.K * elem_bytes;
    job.y = static_cast<char*>(args.y.data) + m0 * job.N * elem_bytes;
    parallel_ranges(context, job.M, ceil_div(kGrainWeights / 4, job.K),
                    [&](int64_t begin, int64_t end) { kernel->stage(job, begin, end); });
    parallel_ranges(context, n_units, ceil_div(kGrainWeights, job.M * job.K * kernel->n_unit),
                    [&](int64_t begin, int64_t end) { kernel->run(job, begin, end); });
  }
  return {};
}

}  // namespace cpu

uint64_t cpu_linear_coalesced_scratch_bytes(const LinearArgs& args) {
  return cpu::linear_scratch_bytes_on(cpu::best_kernels(), args);
}

Status cpu_linear_coalesced(const LinearArgs& args, const ExecutionContext& context) {
  return cpu::linear_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
