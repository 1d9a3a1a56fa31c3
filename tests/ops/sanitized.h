// What the drivers share that run under the sanitizers.
#pragma once

#include <cstdio>
#include <cstdlib>

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(2);                                                              \
    }                                                                            \
  } while (false)

#if defined(__SANITIZE_THREAD__)
constexpr bool kOnlyRaces = true;  // ThreadSanitizer is slow: what one thread does alone is left to the others
#else
constexpr bool kOnlyRaces = false;
#endif
