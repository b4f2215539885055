#include "cublaslt.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace cuda_int4 {
namespace cublaslt {

namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open_named() {
  for (const int only_loaded : {RTLD_NOLOAD, 0})
    for (const char* name : kNames)
      if (void* file = dlopen(name, RTLD_NOW | RTLD_LOCAL | only_loaded)) return file;
  return nullptr;
}

// PyTorch's wheels bring it as a package of its own: site-packages/nvidia/..., next to ours.
void* open_beside_us() {
  Dl_info ours{};
  if (dladdr(reinterpret_cast<const void*>(&library), &ours) == 0 || ours.dli_fname == nullptr)
    return nullptr;
  std::string folder = ours.dli_fname;
  folder.resize(folder.rfind('/') == std::string::npos ? 0 : folder.rfind('/'));
  for (const char* package : {"nvidia/cu13/lib", "nvidia/cublas/lib"})
    for (const char* name : kNames) {
      const std::string path = folder + "/../../" + package + "/" + name;
      if (void* file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return file;
    }
  return nullptr;
}

void* open_library() {
  const char* chosen = std::getenv("CUDA_INT4_CUBLASLT");
  if (chosen != nullptr && chosen[0] != '\0') {
    if (std::strcmp(chosen, "off") == 0) return nullptr;
    void* file = dlopen(chosen, RTLD_NOW | RTLD_LOCAL);
    if (file == nullptr)
      std::fprintf(stderr,
                   "CUDA_INT4_CUBLASLT: expected \"off\" or a libcublasLt that opens, got %s; "
                   "going on without it\n",
                   dlerror());
    return file;
  }
  void* file = open_named();
  return file != nullptr ? file : open_beside_us();
}

template <typename Function>
bool find(void* file, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(file, name));
  return *function != nullptr;
}

bool load(Library* lib) {
  void* file = open_library();
  if (file == nullptr) return false;
  // Never closed: its kernels may be in a CUDA graph that outlives any object of ours.
  return find(file, "cublasLtCreate", &lib->create) &&
         find(file, "cublasLtMatmulDescCreate", &lib->desc_create) &&
         find(file, "cublasLtMatmulDescSetAttribute", &lib->desc_set) &&
         find(file, "cublasLtMatmulDescDestroy", &lib->desc_destroy) &&
         find(file, "cublasLtMatrixLayoutCreate", &lib->layout_create) &&
         find(file, "cublasLtMatrixLayoutSetAttribute", &lib->layout_set) &&
         find(file, "cublasLtMatrixLayoutDestroy", &lib->layout_destroy) &&
         find(file, "cublasLtMatmulPreferenceCreate", &lib->preference_create) &&
         find(file, "cublasLtMatmulPreferenceSetAttribute", &lib->preference_set) &&
         find(file, "cublasLtMatmulPreferenceDestroy", &lib->preference_destroy) &&
         find(file, "cublasLtMatmulAlgoGetHeuristic", &lib->get_heuristic) &&
         find(file, "cublasLtMatmul", &lib->matmul);
}

}  // namespace

const Library* library() {
  static const struct Loaded {
    Loaded() : there(load(&functions)) {}
    Library functions{};
    bool there;
  } loaded;
  return loaded.there ? &loaded.functions : nullptr;
}

}  // namespace cublaslt
}  // namespace cuda_int4
