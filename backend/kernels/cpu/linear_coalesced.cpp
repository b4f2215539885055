// cuda_int4::linear on coalesced.v1 on the CPU: from arguments to a job, and the job to threads.
#include "../coalesced.h"
#include "../parallel_ranges.h"
#include "isa.h"
#include "linear.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

uint64_t linear_coalesced_scratch_bytes_on(const CpuKernels& kernels, const LinearArgs& args) {
  LinearJob job = make_linear_job(args);
  const LinearKernel* kernel = kernels.choose_linear(job);
  job.M = smaller(job.M, kernel->max_rows);
  return kernel->scratch_bytes(job);
}

Status linear_coalesced_on(const CpuKernels& kernels, const LinearArgs& args,
                           const ExecutionContext& context) {
  LinearJob job = make_linear_job(args);
  job.scratch = context.scratch;
  const LinearKernel* kernel = kernels.choose_linear(job);
  for (int64_t m0 = 0; m0 < job.M; m0 += kernel->max_rows) {
    const LinearJob rows = rows_of_job(job, m0, kernel->max_rows);
    stage_rows(*kernel, rows, context);
    parallel_ranges(context, ceil_div(job.N, kernel->n_unit),
                    ceil_div(kGrainWeights, rows.M * job.K * kernel->n_unit),
                    [&](int64_t begin, int64_t end) { kernel->run(rows, begin, end); });
  }
  return {};
}

}  // namespace cpu

uint64_t cpu_linear_coalesced_scratch_bytes(const LinearArgs& args) {
  return cpu::linear_coalesced_scratch_bytes_on(cpu::best_kernels(), args);
}

Status cpu_linear_coalesced(const LinearArgs& args, const ExecutionContext& context) {
  return cpu::linear_coalesced_on(cpu::best_kernels(), args, context);
}

}  // namespace cuda_int4
