// Depthwise convolutions whose input passes by in a ring of rows: the loops that the blocks of inverted residuals
// share. For the per-ISA kernels alone, like isa.h. A block has the members of InvertedResidual that say what lies
// where.
#pragma once
#include "gates.h"
#include "multiply.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kMostRows = 128;  // of a depthwise kernel: as many as its taps, which the callers count

[[maybe_unused]] PYSAL_INLINE int64_t floor_divided(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

constexpr int64_t kPixelsTogether = 56;  // that are multiplied at once, where rows are shorter

// Rows of a map of that width that are multiplied at once: large matrices come from beyond the second-level cache.
[[maybe_unused]] PYSAL_INLINE int64_t together(int64_t width) { return most(1, kPixelsTogether / most(width, 1)); }

// Rows of the ring: those that an output row sees, and what came with the last of them.
template <class Block>
PYSAL_INLINE int64_t slots(const Block& b) {
  return b.kernel_height + together(b.in_width) - 1;
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

// What an output row sees at the columns of a phase, those that see the same taps.
struct Windows {
  struct Row {
    const float* source;  // what the first tap reads for pixel 0
    const float* weight;
  } rows[kMostRows];
  int64_t count, wide;  // rows, and taps of each
  int64_t apart, next;  // from one tap to the next: of what they read, and of the weights
};

template <int kRows, class Finish>
__attribute__((noinline)) void combine_tile(const Windows& seen, int64_t channels, int64_t step, int64_t first,
                                            const Finish& given) {
  const Finish finish = given;
  for (int64_t c = 0; c < channels; c += kTogether * kLanes) {
    vfloat sums[kRows][kTogether] = {};
    for (int64_t i = 0; i < seen.count; ++i)
      for (int64_t k = 0; k < seen.wide; ++k) {
        const Bases<kRows> bases(seen.rows[i].source + k * seen.apart + first * step + c, step);
        vfloat w[kTogether];
#pragma GCC unroll 2
        for (int v = 0; v < kTogether; ++v) w[v] = load(seen.rows[i].weight + k * seen.next + c + v * kLanes);
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

// The same where neighbouring outputs see neighbouring pixels: each is loaded once for all taps of a row.
template <int kRows, int kWide, class Finish>
__attribute__((noinline)) void slide_tile(const Windows& seen, int64_t channels, int64_t step, int64_t first,
                                          const Finish& given) {
  const Finish finish = given;
  constexpr int kSeen = kRows + kWide - 1;
  for (int64_t c = 0; c < channels; c += kLanes) {
    vfloat sums[kRows][1] = {};
    for (int64_t i = 0; i < seen.count; ++i) {
      const Bases<kSeen> bases(seen.rows[i].source + first * step + c, step);
      vfloat w[kWide];
#pragma GCC unroll 8
      for (int k = 0; k < kWide; ++k) w[k] = load(seen.rows[i].weight + k * seen.next + c);
#pragma GCC unroll 32
      for (int q = 0; q < kSeen; ++q) {
        const vfloat x = load(bases.of[q / 4] + q % 4 * step);
#pragma GCC unroll 8
        for (int k = 0; k < kWide; ++k)
          if (q >= k && q - k < kRows) sums[q - k][0] += x * w[k];
      }
    }
    int64_t at = first * finish.pitch + c;
#pragma GCC unroll 16
    for (int p = 0; p < kRows; ++p, at += finish.pitch) finish.template finish<1>(sums[p], at, c, kLanes);
  }
}

template <int kRows, class Finish>
PYSAL_INLINE void combine_some(const Windows& seen, int64_t channels, int64_t step, int64_t first,
                               const Finish& finish) {
  if (kTogether == 1 && kRows >= 4 && seen.apart == step) {  // with fewer registers, sums would not stay in them
    if (seen.wide == 2) return slide_tile<kRows, 2>(seen, channels, step, first, finish);
    if (seen.wide == 3) return slide_tile<kRows, 3>(seen, channels, step, first, finish);
    if (seen.wide == 5) return slide_tile<kRows, 5>(seen, channels, step, first, finish);
    if (seen.wide == 7) return slide_tile<kRows, 7>(seen, channels, step, first, finish);
  }
  combine_tile<kRows>(seen, channels, step, first, finish);
}

// The sum over taps at each of some pixels, whose sources lie `step` apart.
template <class Finish>
PYSAL_INLINE void combine(const Windows& seen, int64_t channels, int64_t step, int64_t pixels, const Finish& finish) {
  int64_t p = 0;
  for (; p + kPixels <= pixels; p += kPixels) combine_some<kPixels>(seen, channels, step, p, finish);
  if (kPixels > 7 && pixels - p >= 7) {
    combine_some<7>(seen, channels, step, p, finish);
    p += 7;
  }
  if (pixels - p >= 4) {
    combine_some<4>(seen, channels, step, p, finish);
    p += 4;
  }
  if (pixels - p >= 2) {
    combine_tile<2>(seen, channels, step, p, finish);
    p += 2;
  }
  if (p < pixels) combine_tile<1>(seen, channels, step, p, finish);
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

// Finds what output row y sees at the columns of a phase. `ring` returns a row with its margins, pixels lie `pitch`
// apart.
template <bool kForward, class Block, class Ring>
PYSAL_INLINE void look(const Block& b, const Margins& margins, int64_t y, int64_t phase, const Ring& ring,
                       int64_t pitch, Windows& seen) {
  // backward, the last tap comes first: it reads the pixel furthest to the left
  const int64_t stride = kForward ? 1 : b.column_stride, begin = kForward ? 0 : (phase + b.left) % stride;
  seen.wide = begin < b.kernel_width ? (b.kernel_width - begin - 1) / stride + 1 : 0;
  const int64_t kx = kForward ? 0 : begin + (seen.wide - 1) * stride;
  const int64_t column = kForward ? margins.before - b.left : margins.before + (phase + b.left - kx) / stride;
  seen.apart = pitch, seen.next = kForward ? pitch : -stride * pitch;
  seen.count = 0;
  if (seen.wide == 0) return;
  for (int64_t ky = 0; ky < b.kernel_height; ++ky) {
    const int64_t up = kForward ? y * b.row_stride - b.top + ky : y + b.top - ky;
    const int64_t row = kForward ? up : up / b.row_stride;
    if (up < 0 || row >= b.in_height || (!kForward && up % b.row_stride)) continue;
    seen.rows[seen.count++] = {ring(row) + column * pitch, b.depthwise + (ky * b.kernel_width + kx) * pitch};
  }
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
