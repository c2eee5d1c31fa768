// Memory that a thread computes in.
#pragma once
#include <stdint.h>

#include <memory>

namespace pysal::cpu {
// Returns memory of this thread that begins on a line of the caches. It is kept from one call to the next, which may
// overwrite it: fresh pages would cost as much as a small convolution.
inline void* scratch_of(int64_t bytes) {
  constexpr uintptr_t line = 64;
  thread_local std::unique_ptr<char[]> scratch;
  thread_local int64_t size = 0;
  const int64_t needed = bytes + static_cast<int64_t>(line);
  if (size < needed) {
    scratch.reset(new char[needed]);
    size = needed;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.get()) + line - 1) / line * line);
}
}  // namespace pysal::cpu
