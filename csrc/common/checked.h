// Numbers that come from outside, checked before they are multiplied: a size, a stride or a dilation may be anything
// that 64 bits hold, and a product that wraps around says that little memory is enough.
#pragma once
#include <initializer_list>

#include "torch_stable.h"

namespace pysal {
// The furthest that positions of images and maps go: those that come in tensors are int32.
constexpr int64_t kMostReach = (int64_t{1} << 31) - 1;
// The largest product, which leaves room to add a few.
constexpr int64_t kMostProduct = int64_t{1} << 60;

// So many things, so far apart.
struct Spaced {
  int64_t count, step;
};

// How far it is from the first to the last of all that are spaced, one within the other.
inline int64_t reach(const char* op, const char* what, std::initializer_list<Spaced> all) {
  int64_t sum = 0;
  for (const Spaced& one : all) {
    if (one.count <= 1) continue;
    PYSAL_CHECK(one.step >= 0 && one.step <= (kMostReach - sum) / (one.count - 1), op, ": ", what,
                " must reach less than 2^31, got ", one.count, " with steps of ", one.step);
    sum += (one.count - 1) * one.step;
  }
  return sum;
}

inline int64_t product(const char* op, const char* what, std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors)
    if (factor == 0) return 0;
  for (const int64_t factor : factors) {
    PYSAL_CHECK(factor > 0 && result <= kMostProduct / factor, op, ": ", what,
                " must be at least 0 and less than 2^60 in all, got a factor of ", factor);
    result *= factor;
  }
  return result;
}
}  // namespace pysal
