// trace PATH DEVICE DUMP: two calls of a language model's forward(tokens [1, S], input_pos [S]) through
// ExecuTorch's own interface, with its event tracer; writes the ETDump to DUMP. Prints the likeliest
// token after each call.
#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "check.h"

using namespace executorch::runtime;
using executorch::aten::DimOrderType;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

Error set_int64(Method& method, size_t i, int ndim, int64_t* data, SizesType n) {
  SizesType sizes[] = {ndim == 2 ? 1 : n, n};
  StridesType strides[] = {ndim == 2 ? n : 1, 1};
  DimOrderType dim_order[] = {0, 1};
  TensorImpl impl(ScalarType::Long, ndim, sizes, data, dim_order, strides);
  return method.set_input(EValue(Tensor(&impl)), i);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 1;
  runtime_init();
  auto loader = executorch::extension::FileDataLoader::from(argv[1]);
  CHECK(loader.ok());
  if (!loader.ok()) return 1;
  auto program = Program::load(&loader.get());
  CHECK(program.ok());
  if (!program.ok()) return 1;
  const auto meta = program->method_meta("forward");
  CHECK(meta.ok());
  if (!meta.ok()) return 1;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<Span<uint8_t>> spans;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    memory.emplace_back(size_t(meta->memory_planned_buffer_size(i).get()));
    spans.emplace_back(memory.back().data(), memory.back().size());
  }
  HierarchicalAllocator planned({spans.data(), spans.size()});
  executorch::extension::MallocMemoryAllocator method_memory, temporary;
  MemoryManager manager(&method_memory, &planned, &temporary);
  BackendOptions<1> options;
  CHECK(options.set_option("device", argv[2]) == Error::Ok);
  LoadBackendOptionsMap for_backends;
  CHECK(for_backends.set_options("CudaInt4Backend", options.view()) == Error::Ok);

  for (const char* stream : {"", "0x10", "12 ", "-1", "99999999999999999999"}) {
    BackendOptions<1> bad;
    CHECK(bad.set_option("cuda_stream", stream) == Error::Ok);
    LoadBackendOptionsMap bad_options;
    CHECK(bad_options.set_options("CudaInt4Backend", bad.view()) == Error::Ok);
    CHECK(program->load_method("forward", &manager, nullptr, nullptr, &bad_options).error() ==
          Error::InvalidArgument);
  }

  executorch::etdump::ETDumpGen tracer;
  auto method = program->load_method("forward", &manager, &tracer, nullptr, &for_backends);
  CHECK(method.ok());
  if (!method.ok()) return 1;
  for (int64_t start : {0, 2}) {
    int64_t tokens[] = {3, 1}, positions[] = {start, start + 1};
    CHECK(set_int64(*method, 0, 2, tokens, 2) == Error::Ok);
    CHECK(set_int64(*method, 1, 1, positions, 2) == Error::Ok);
    CHECK(method->execute() == Error::Ok);
    const Tensor& logits = method->get_output(0).toTensor();
    CHECK(logits.scalar_type() == ScalarType::Float);
    const auto vocab = logits.size(logits.dim() - 1);
    const float* last = logits.const_data_ptr<float>() + logits.numel() - vocab;
    std::printf("%td\n", std::max_element(last, last + vocab) - last);
  }
  const executorch::etdump::ETDumpResult dump = tracer.get_etdump_data();
  CHECK(dump.buf != nullptr && dump.size > 0);
  std::ofstream(argv[3], std::ios::binary)
      .write(static_cast<const char*>(dump.buf), std::streamsize(dump.size));
  std::free(dump.buf);
  return failures();
}
