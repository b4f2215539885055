// sample: its entry; arguments in ../sampling.h, the contract in sample.cu.
#pragma once

#include "../sampling.h"
#include "../tensor_view.h"

namespace cuda_int4 {

Status cuda_sample(const SampleArgs& args, const ExecutionContext& context);

}  // namespace cuda_int4
