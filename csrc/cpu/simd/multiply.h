// Matrices times pixels: the loops that the blocks and Winograd's convolutions share. For the per-ISA kernels alone,
// like isa.h. What becomes of the sums is up to whoever asks: `finish` takes kCount vectors of one pixel's channels,
// the first of which is element `at` of the output and channel `column`; each is `next` channels further.
#pragma once
#include "../ceil_div.h"
#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int kPixels = kLanes == 16 ? 14 : 6;  // of a tile: with two vectors each its sums fill the registers
constexpr int64_t kPanel = 16;

[[maybe_unused]] PYSAL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] PYSAL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Addresses of a tile's pixels as few bases, each with the same three steps: a pointer per pixel would not fit into the
// registers, and the compiler would keep some in vectors. It is not told that the bases belong together.
template <int kRows>
struct Bases {
  static constexpr int kBases = ceil_div(kRows, 4);
  const float* of[kBases];

  PYSAL_INLINE Bases(const float* first, int64_t step) {
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) {
      of[i] = first + 4 * i * step;
#if defined(__x86_64__)
      __asm__("" : "+r"(of[i]));
#endif
    }
  }
};

// Number k of pixel p is a[p * step + k], or a[p + k * step] where the matrix lies transposed.
template <int kRows, int kVectors, bool kTransposed, class Finish>
__attribute__((noinline)) void multiply_tile(const float* a, int64_t step, const float* b, int64_t depth,
                                             int64_t b_next, const Finish& given, int64_t pixel, int64_t column,
                                             int64_t next) {
  const Finish finish = given;  // in registers: what is written could be the original
  vfloat sums[kRows][kVectors] = {};
  const Bases<kRows> bases(a, kTransposed ? 1 : step);
  for (int64_t k = 0; k < depth; ++k) {
    vfloat w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(b + k * kPanel + v * b_next);
#pragma GCC unroll 2  // of the columns that come next: large matrices come from beyond the second-level cache
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(b + k * kPanel + (v + 2) * b_next, 0, 2);
#pragma GCC unroll 16
    for (int p = 0; p < kRows; ++p) {
      const vfloat x = broadcast(bases.of[p / 4][kTransposed ? p % 4 + k * step : p % 4 * step + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[p][v] += x * w[v];
    }
  }
  int64_t at = pixel * finish.pitch + column;
#pragma GCC unroll 16
  for (int p = 0; p < kRows; ++p, at += finish.pitch) finish.template finish<kVectors>(sums[p], at, column, next);
}

template <int kVectors, bool kTransposed, class Finish>
PYSAL_INLINE void multiply_columns(const float* a, int64_t step, const float* b, int64_t depth, int64_t b_next,
                                   const Finish& finish, int64_t pixels, int64_t column, int64_t next) {
  const int64_t apart = kTransposed ? 1 : step;
  int64_t p = 0;
  for (; p + kPixels <= pixels; p += kPixels)
    multiply_tile<kPixels, kVectors, kTransposed>(a + p * apart, step, b, depth, b_next, finish, p, column, next);
  if (kPixels > 7 && pixels - p >= 7) {
    multiply_tile<7, kVectors, kTransposed>(a + p * apart, step, b, depth, b_next, finish, p, column, next);
    p += 7;
  }
  if (pixels - p >= 4) {
    multiply_tile<4, kVectors, kTransposed>(a + p * apart, step, b, depth, b_next, finish, p, column, next);
    p += 4;
  }
  if (pixels - p >= 2) {
    multiply_tile<2, kVectors, kTransposed>(a + p * apart, step, b, depth, b_next, finish, p, column, next);
    p += 2;
  }
  if (p < pixels)
    multiply_tile<1, kVectors, kTransposed>(a + p * apart, step, b, depth, b_next, finish, p, column, next);
}

// Pixels (pixels, depth), whose rows lie `step` apart, times a matrix in panels; or (depth, pixels) transposed.
template <bool kTransposed = false, class Finish>
PYSAL_INLINE void multiply(const float* a, int64_t step, int64_t pixels, int64_t depth, const float* b, int64_t columns,
                           const Finish& finish) {
  const int64_t panels = ceil_div(columns, kPanel);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const float* const from = b + panel * depth * kPanel;
    const int64_t column = least(panel * kPanel, columns - kPanel);
    if (kLanes < kPanel) {
      for (int64_t half = 0; half < kPanel; half += 2 * kLanes)
        multiply_columns<2, kTransposed>(a, step, from + half, depth, kLanes, finish, pixels, column + half, kLanes);
    } else if (panel + 1 < panels) {
      const int64_t second = least(column + kPanel, columns - kPanel);
      multiply_columns<2, kTransposed>(a, step, from, depth, depth * kPanel, finish, pixels, column, second - column);
      ++panel;
    } else {
      multiply_columns<1, kTransposed>(a, step, from, depth, 0, finish, pixels, column, 0);
    }
  }
}

struct Keep {  // sums as they are
  float* out;
  int64_t pitch;

  template <int kCount>
  PYSAL_INLINE void finish(const vfloat* sums, int64_t at, int64_t /*column*/, int64_t next) const {
    for (int v = 0; v < kCount; ++v) store(out + at + v * next, sums[v]);
  }
};
}  // namespace
}  // namespace pysal::cpu
