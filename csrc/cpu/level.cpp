// Chooses the instruction set of the CPU kernels at first use.
#include "simd/level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pysal::cpu {
namespace {
Level supported() {
#if defined(PYSAL_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
#else
  return Level::baseline;
#endif
}

Level choose() {
  const char* cap = std::getenv("PYSAL_SIMD");
  if (cap == nullptr || *cap == '\0') return supported();
  for (const Level level : {Level::baseline, Level::avx2, Level::avx512})
    if (std::strcmp(cap, name(level)) == 0) return level < supported() ? level : supported();
  throw std::runtime_error(std::string("pysal: PYSAL_SIMD must be baseline, avx2 or avx512, got ") + cap);
}
}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* name(Level level) { return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "baseline"; }

const char* compiled_levels() {
#if defined(PYSAL_X86)
  return "baseline,avx2,avx512";
#else
  return "baseline";
#endif
}
}  // namespace pysal::cpu
