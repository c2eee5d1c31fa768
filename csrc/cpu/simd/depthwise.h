// Depthwise convolutions whose input passes by in a ring of rows: the loops that the blocks of inverted residuals
// share. For the per-ISA kernels alone, like isa.h. A block has the members of InvertedResidual that say what lies
// where.
#pragma once
#include "gates.h"
#include "multiply.h"

namespace pysal::cpu {
namespace {
[[maybe_unused]] PYSAL_INLINE int64_t floor_divided(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// What becomes of sums, as multiply.h says: they are added to.
struct Add {  // the output: sum + bias + added
  const float* bias;
  const float* added;
  float* out;
  int64_t pitch;

  template <int kCount>
  PYSAL_INLINE void finish(const vfloat* sums, int64_t at, int64_t column, int64_t next) const {
    for (int v = 0; v < kCount; ++v) {
      vfloat x = sums[v];
      if (bias) x += load(bias + column + v * next);
      if (added) x += load(added + at + v * next);
      store(out + at + v * next, x);
    }
  }
};

struct Tap {
  const float* source;  // what it reads for pixel 0
  const float* weight;
};

template <int kRows, class Finish>
__attribute__((noinline)) void combine_tile(const Tap* taps, int64_t count, int64_t channels, int64_t step,
                                            int64_t first, const Finish& given) {
  const Finish finish = given;
  for (int64_t c = 0; c < channels; c += kTogether * kLanes) {
    vfloat sums[kRows][kTogether] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Bases<kRows> bases(taps[i].source + first * step + c, step);
      vfloat w[kTogether];
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) w[v] = load(taps[i].weight + c + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kRows; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kTogether; ++v) sums[p][v] += load(bases.of[p / 4] + p % 4 * step + v * kLanes) * w[v];
    }
    int64_t at = first * finish.pitch + c;
#pragma GCC unroll 16
    for (int p = 0; p < kRows; ++p, at += finish.pitch) finish.template finish<kTogether>(sums[p], at, c, kLanes);
  }
}

// The sum over taps at each of some pixels, whose sources lie `step` apart.
template <class Finish>
PYSAL_INLINE void combine(const Tap* taps, int64_t count, int64_t channels, int64_t step, int64_t pixels,
                          const Finish& finish) {
  int64_t p = 0;
  for (; p + kPixels <= pixels; p += kPixels) combine_tile<kPixels>(taps, count, channels, step, p, finish);
  if (kPixels > 7 && pixels - p >= 7) {
    combine_tile<7>(taps, count, channels, step, p, finish);
    p += 7;
  }
  if (pixels - p >= 4) {
    combine_tile<4>(taps, count, channels, step, p, finish);
    p += 4;
  }
  if (pixels - p >= 2) {
    combine_tile<2>(taps, count, channels, step, p, finish);
    p += 2;
  }
  if (p < pixels) combine_tile<1>(taps, count, channels, step, p, finish);
}

// Columns of zeros before and after a row of the ring: what the windows see beyond its edges.
struct Margins {
  int64_t before, after;

  template <class Block>
  Margins(const Block& b, bool forward) {
    const int64_t low = forward ? -b.left : floor_divided(b.left - b.kernel_width + 1, b.column_stride);
    const int64_t high = forward ? (b.out_width - 1) * b.column_stride - b.left + b.kernel_width - 1
                                 : floor_divided(b.out_width - 1 + b.left, b.column_stride);
    before = most(0, -low);
    after = most(0, high - b.in_width + 1);
  }
};

// Lists what output row y sees at the columns of a phase, those that see the same taps; returns how many. `ring`
// returns a row with its margins, pixels lie `pitch` apart.
template <bool kForward, class Block, class Ring>
PYSAL_INLINE int64_t taps_of(const Block& b, const Margins& margins, int64_t y, int64_t phase, const Ring& ring,
                             int64_t pitch, Tap* taps) {
  const int64_t first_tap = kForward ? 0 : (phase + b.left) % b.column_stride;
  const int64_t shift = kForward ? 0 : margins.before + (phase + b.left - first_tap) / b.column_stride;
  int64_t count = 0;
  for (int64_t ky = 0; ky < b.kernel_height; ++ky) {
    const int64_t up = kForward ? y * b.row_stride - b.top + ky : y + b.top - ky;
    const int64_t row = kForward ? up : up / b.row_stride;
    if (up < 0 || row >= b.in_height || (!kForward && up % b.row_stride)) continue;
    for (int64_t kx = first_tap, j = 0; kx < b.kernel_width; kx += kForward ? 1 : b.column_stride, ++j) {
      const int64_t column = kForward ? margins.before - b.left + kx : shift - j;
      taps[count++] = {ring(row) + column * pitch, b.depthwise + (ky * b.kernel_width + kx) * pitch};
    }
  }
  return count;
}

// The first and the last row of the ring that an output row sees; the last may be beyond the map.
template <bool kForward, class Block>
PYSAL_INLINE int64_t first_row(const Block& b, int64_t y) {
  const int64_t stride = b.row_stride;
  return most(0, kForward ? y * stride - b.top : floor_divided(y + b.top - b.kernel_height + stride, stride));
}
template <bool kForward, class Block>
PYSAL_INLINE int64_t last_row(const Block& b, int64_t y) {
  return kForward ? y * b.row_stride - b.top + b.kernel_height - 1 : floor_divided(y + b.top, b.row_stride);
}
}  // namespace
}  // namespace pysal::cpu
