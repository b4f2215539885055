// The library is built with hidden symbols; this marks what C++ programs that link it may use.
#pragma once

#define CUDA_INT4_EXPORT __attribute__((visibility("default")))
