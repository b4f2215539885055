// refuse PATH [PTD]: tries to load a file that must not load, through our Model and through
// ExecuTorch's own Module. Prints a line for each: its name, the error number, our reason.
#include <executorch/extension/module/module.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "runtime/c_api.h"
#include "runtime/model.h"

using executorch::extension::Module;
using executorch::runtime::Error;

namespace {

void print(const char* loader, Error error) {
  std::printf("%s\t%d\t%s\n", loader, int(error), cuda_int4_last_error());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const char* data_path = argc > 2 ? argv[2] : nullptr;
  std::unique_ptr<cuda_int4::Model> model;
  cuda_int4_clear_last_error();
  print("model", cuda_int4::Model::open(argv[1], data_path, "cpu", true, &model));

  cuda_int4_clear_last_error();
  std::vector<std::string> data_files;
  if (data_path != nullptr) data_files.emplace_back(data_path);
  Module module(argv[1], data_files, Module::LoadMode::Mmap);
  print("module", module.load_forward());

  cuda_int4_model* handle = nullptr;
  print("c", Error(cuda_int4_model_open(argv[1], data_path, "cpu", 1, &handle)));
  cuda_int4_model_close(handle);
}
