// A library for LD_PRELOAD that counts allocations and, when the program ends, writes their number to
// the file that COUNT_ALLOCATIONS names. C++'s operator new ends in malloc, so it is counted too.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

std::atomic<long> n_allocations{0};

template <typename Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

struct Report {
  ~Report() {
    const long n = n_allocations;
    const char* path = std::getenv("COUNT_ALLOCATIONS");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (file == nullptr) return;
    std::fprintf(file, "%ld\n", n);
    std::fclose(file);
  }
} report;

}  // namespace

extern "C" void* malloc(size_t size) {
  static const auto real = next<void* (*)(size_t)>("malloc");
  ++n_allocations;
  return real(size);
}

extern "C" void* realloc(void* pointer, size_t size) {
  static const auto real = next<void* (*)(void*, size_t)>("realloc");
  ++n_allocations;
  return real(pointer, size);
}

extern "C" int posix_memalign(void** out, size_t alignment, size_t size) {
  static const auto real = next<int (*)(void**, size_t, size_t)>("posix_memalign");
  ++n_allocations;
  return real(out, alignment, size);
}

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  static const auto real = next<void* (*)(size_t, size_t)>("aligned_alloc");
  ++n_allocations;
  return real(alignment, size);
}
