// From validated arguments to the jobs of cpu_kernels.h, for every layout.
#pragma once

#include "../ops.h"
#include "cpu_kernels.h"

namespace cuda_int4 {
namespace cpu {

// Weights times rows of x, about 15 us of one core: less is not worth waking a thread for.
constexpr int64_t kGrainWeights = int64_t{1} << 19;

// All but scratch. qdata, scale and zero_point are the argument's: in coalesced.v1 what the kernels
// read, else for the caller to replace.
LinearJob make_linear_job(const LinearArgs& args);

// The rows m0 .. of a job: at most `max_rows`.
LinearJob rows_of_job(const LinearJob& job, int64_t m0, int64_t max_rows);

// kernel.stage() of all rows of the job, on the threads of `context`.
void stage_rows(const LinearKernel& kernel, const LinearJob& job, const ExecutionContext& context);

}  // namespace cpu
}  // namespace cuda_int4
