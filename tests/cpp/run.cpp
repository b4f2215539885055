// run PATH: prefills and decodes with a language model's forward(tokens, input_pos), then counts the
// heap allocations of 100 further steps. Prints the greedy tokens, then "allocations N".
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "runtime/c_api.h"
#include "runtime/model.h"

using namespace cuda_int4;
using executorch::runtime::Error;

namespace {
std::atomic<bool> counting{false};
std::atomic<int> allocations{0};
}  // namespace

// Every allocation of the process ends up here: this file's malloc is found before libc's.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) {
  if (counting) ++allocations;
  return __libc_malloc(n);
}
void* calloc(size_t n, size_t size) {
  if (counting) ++allocations;
  return __libc_calloc(n, size);
}
void* realloc(void* p, size_t n) {
  if (counting) ++allocations;
  return __libc_realloc(p, n);
}
void* aligned_alloc(size_t alignment, size_t n) {
  if (counting) ++allocations;
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** p, size_t alignment, size_t n) {
  if (counting) ++allocations;
  *p = __libc_memalign(alignment, n);
  return *p == nullptr;
}
}

namespace {

TensorView int64_view(int64_t* data, int32_t ndim, int64_t n) {
  TensorView view{};
  view.data = data;
  view.nbytes = uint64_t(n) * 8;
  view.dtype = DType::kInt64;
  view.ndim = ndim;
  view.sizes[0] = 1;
  view.sizes[ndim - 1] = n;
  view.strides[0] = n;
  view.strides[ndim - 1] = 1;
  return view;
}

/// The likeliest token after tokens[0, n) at `position`; -1 where the model failed.
int64_t step(Model& model, int64_t* tokens, int64_t n, int64_t position) {
  int64_t positions[64];
  for (int64_t i = 0; i < n; ++i) positions[i] = position + i;
  const TensorView inputs[] = {int64_view(tokens, 2, n), int64_view(positions, 1, n)};
  size_t n_outputs = 0;
  TensorView logits;
  if (model.forward("forward", inputs, 2, &n_outputs) != Error::Ok || n_outputs != 1 ||
      model.output(0, &logits) != Error::Ok || logits.dtype != DType::kFloat32) {
    std::fprintf(stderr, "%s\n", cuda_int4_last_error());
    return -1;
  }
  const int64_t vocab = logits.sizes[logits.ndim - 1];
  const float* last = static_cast<const float*>(logits.data) + logits.nbytes / 4 - vocab;
  int64_t best = 0;
  for (int64_t i = 1; i < vocab; ++i)
    if (last[i] > last[best]) best = i;
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  std::unique_ptr<Model> model;
  CHECK(Model::open(argv[1], nullptr, "cpu", true, &model) == Error::Ok);
  if (model == nullptr) return 1;
  CHECK(model->has_method("forward") && !model->has_method("backward"));
  CHECK(model->n_inputs("forward") == 2 && model->n_outputs("backward") == 0);
  TensorView info;
  CHECK(model->input_info("forward", 0, &info) == Error::Ok && info.ndim == 2);
  CHECK(model->input_info("forward", 2, &info) == Error::InvalidArgument);
  CHECK(model->output(0, &info) == Error::InvalidState);
  CHECK(model->forward("backward", nullptr, 0, nullptr) == Error::InvalidArgument);
  CHECK(model->forward("forward", nullptr, 0, nullptr) == Error::InvalidArgument);

  int64_t prompt[] = {3, 1, 4, 1, 5};
  for (int round = 0; round < 2; ++round) {  // the second after a reset: the same tokens
    int64_t token = step(*model, prompt, 5, 0);
    for (int64_t position = 5; position < 15; ++position) {
      std::printf("%lld ", static_cast<long long>(token));
      token = step(*model, &token, 1, position);
    }
    std::printf("\n");
    CHECK(model->reset() == Error::Ok);
  }
  int64_t token = 7;
  step(*model, &token, 1, 0);
  counting = true;
  for (int i = 0; i < 100; ++i) step(*model, &token, 1, i % 32);
  counting = false;
  std::printf("allocations %d\n", allocations.load());
  return failures();
}
