// Prints the size and the last field's offset of each struct that backend/_native.py mirrors.
#include <cstddef>
#include <cstdio>

#include "runtime/c_api.h"

using namespace cuda_int4;

#define PRINT(type, last) std::printf(#type " %zu %zu\n", sizeof(type), offsetof(type, last))

int main() {
  PRINT(TensorView, strides);
  PRINT(LinearArgs, out_features);
  PRINT(AttentionArgs, merge_heads);
  PRINT(RmsNormArgs, eps);
  PRINT(SiluArgs, y);
  PRINT(SampleRow, step);
  PRINT(SampleArgs, n_slots);
  PRINT(cuda_int4_model_options, cuda_stream);
  PRINT(cuda_int4_device_use, replays);
  PRINT(cuda_int4_generate_config, on_prefill);
  PRINT(cuda_int4_generate_stats, n_sequences);
  PRINT(cuda_int4_generate_request, stats);
  PRINT(cuda_int4_decode_info, eos_ids);
}
