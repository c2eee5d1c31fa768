// The number of pieces of a size that cover all. In an anonymous namespace, because the files of simd and amx include
// it, too: csrc/cpu/simd/isa.h says why.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
namespace {
// all / size, rounded up: all >= 0, size > 0.
[[maybe_unused]] inline __attribute__((always_inline)) constexpr int64_t ceil_div(int64_t all, int64_t size) {
  return (all + size - 1) / size;
}
}  // namespace
}  // namespace pysal::cpu
