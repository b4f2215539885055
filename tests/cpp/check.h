// CHECK(condition): says where and what, counts, goes on. main() returns failures().
#pragma once

#include <cstdio>

inline int& failures() {
  static int n = 0;
  return n;
}

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                        \
    }                                                                      \
  } while (0)
