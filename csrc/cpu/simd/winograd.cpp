// 3 x 3 convolutions of stride 1 with a quarter of the multiplications (Winograd 1980; Lavin and Gray 2015,
// arXiv:1509.09308): 4 x 4 numbers of the output are polynomials' products at 6 x 6 points, and what a point needs of
// all tiles and channels is one multiplication of matrices. The points of an axis are 0, a, -a, b, -b and infinity with
// a = 11/16 and b = 3/2: with the usual 1 and 2 rounding errors are twice as large. Work split: a task is some tiles,
// of all channels: so many that what lies between the three steps stays in the second-level cache.
#include "winograd_kernels.h"

#include "gates.h"
#include "multiply.h"

namespace pysal::cpu {
namespace {
constexpr float kA = 0.6875f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr int64_t kTile = kWinogradTile, kWindow = kWinogradWindow, kProducts = kWinogradProducts;
// Numbers from the end of one point's matrix to the next point's: their rows would else fall on the same few lines of
// the first-level cache.
constexpr int64_t kApart = 48;

// The values of d[0] + d[1] x + ... at the points, each times a constant that the weights make up for.
PYSAL_INLINE void at_points(const vfloat* d, vfloat* v) {
  const vfloat even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
  const vfloat even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
  v[0] = even_a + (kA2 * kB2 * d[0] - kA2 * d[2]);
  v[1] = even_a + kA * odd_a;
  v[2] = even_a - kA * odd_a;
  v[3] = even_b + kB * odd_b;
  v[4] = even_b - kB * odd_b;
  v[5] = d[5] - kB2 * d[3] - kA2 * odd_a;
}

// Four numbers of the output from the products at the points.
PYSAL_INLINE void from_points(const vfloat* m, vfloat* y) {
  const vfloat sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA3 * difference_a + kB3 * difference_b + m[5];
}

// Where a tile lies.
struct Place {
  int64_t image, row, column;  // of the output's first number

  PYSAL_INLINE Place(const WinogradConvolution& c, int64_t tile) {
    const int64_t in_image = tile % (c.down * c.across);
    image = tile / (c.down * c.across);
    row = in_image / c.across * kTile, column = in_image % c.across * kTile;
  }
};

// The window of a tile at the points: number p of channel k becomes values[p * pitch + k]. Bit i kWindow + j of the
// result says whether pixel (i, j) is zero in every channel.
template <bool kInside>
uint64_t enter_tile(const WinogradConvolution& c, const Place& place, float* values, int64_t pitch) {
  const int64_t row = place.row - c.top, column = place.column - c.left;
  const float* const first = c.input + ((place.image * c.height + row) * c.width + column) * c.channels;
  uint64_t zeros = 0;
  for (int64_t i = 0; i < kWindow; ++i)
    for (int64_t j = 0; j < kWindow; ++j) {
      const bool there = kInside || (row + i >= 0 && row + i < c.height && column + j >= 0 && column + j < c.width);
      int64_t k = there ? 0 : c.channels;
      for (const float* const pixel = first + (i * c.width + j) * c.channels; k < c.channels; k += kLanes)
        if (bits_of(load(pixel + k) != vfloat{})) break;  // true of NaN, too
      zeros |= static_cast<uint64_t>(k >= c.channels) << (i * kWindow + j);
    }
  for (int64_t k = 0; k < c.channels; k += kLanes) {
    vfloat half[kWindow][kWindow];
#pragma GCC unroll 6
    for (int64_t j = 0; j < kWindow; ++j) {
      vfloat d[kWindow], v[kWindow];
#pragma GCC unroll 6
      for (int64_t i = 0; i < kWindow; ++i) {
        const bool there = kInside || (row + i >= 0 && row + i < c.height && column + j >= 0 && column + j < c.width);
        d[i] = there ? load(first + (i * c.width + j) * c.channels + k) : vfloat{};
        // what the tile beside it will see and this one does not
        if (j >= kWindow - kTile) __builtin_prefetch(first + (i * c.width + j + kTile) * c.channels + k, 0, 3);
      }
      at_points(d, v);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kWindow; ++i) half[i][j] = v[i];
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < kWindow; ++i) {
      vfloat v[kWindow];
      at_points(half[i], v);
#pragma GCC unroll 6
      for (int64_t j = 0; j < kWindow; ++j) store(values + (i * kWindow + j) * pitch + k, v[j]);
    }
  }
  return zeros;
}

// What becomes of the sums at element `at` of the output, which is channel k of a pixel.
PYSAL_INLINE void leave(const WinogradConvolution& c, const vfloat* sums, int64_t at, int64_t mask_at, int64_t k) {
  const vfloat bound = broadcast(gate_bound(c.upper)), lower = broadcast(c.lower), upper = broadcast(c.upper);
  uint32_t written = 0, open = ~uint32_t{0};
  if (c.mask) {
    open = 0;
    __builtin_memcpy(&open, c.mask + (mask_at >> 3), kTogether * kLanes / 8);
  }
  for (int v = 0; v < kTogether; ++v) {
    vfloat x = sums[v];
    if (c.bias) x += load(c.bias + k + v * kLanes);
    if (c.added) x += load(c.added + at + v * kLanes);
    if (c.gates) written |= gates_of(x, bound) << (v * kLanes);
    x = lower > x ? lower : x;  // comparisons with NaN are false, so it comes through
    x = x > upper ? upper : x;
    if (c.rule >= 0) x = passed(x, open >> (v * kLanes), c.rule == 0 ? -1 : 0);
    store(c.output + at + v * kLanes, x);
  }
  if (c.gates) __builtin_memcpy(c.gates + (at >> 3), &written, kTogether * kLanes / 8);
}

void leave_tile(const WinogradConvolution& c, const Place& place, const float* products, int64_t pitch,
                uint64_t zeros) {
  constexpr uint64_t kSeen = 7 | 7 << kWindow | 7 << 2 * kWindow;  // by the first number of the tile
  const int64_t rows = least(kTile, c.out_height - place.row), columns = least(kTile, c.out_width - place.column);
  const int64_t pixel = place.row * c.out_width + place.column, map = c.out_height * c.out_width;
  const int64_t first = (place.image * map + pixel) * c.out_channels;
  const int64_t mask_first = c.mask ? (place.image % c.mask_images * map + pixel) * c.out_channels : 0;
  for (int64_t k = 0; k < c.out_channels; k += kTogether * kLanes) {
    vfloat y[kTile][kTile][kTogether];
    for (int t = 0; t < kTogether; ++t) {
      vfloat half[kTile][kWindow];
#pragma GCC unroll 6
      for (int64_t j = 0; j < kWindow; ++j) {
        vfloat m[kWindow], v[kTile];
#pragma GCC unroll 6
        for (int64_t i = 0; i < kWindow; ++i) m[i] = load(products + (i * kWindow + j) * pitch + k + t * kLanes);
        from_points(m, v);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTile; ++i) half[i][j] = v[i];
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTile; ++i) {
        vfloat v[kTile];
        from_points(half[i], v);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTile; ++j) y[i][j][t] = v[j];
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t beyond = (i * c.out_width + j) * c.out_channels + k;
        const uint64_t seen = kSeen << (i * kWindow + j);
        if ((zeros & seen) == seen)
          for (int t = 0; t < kTogether; ++t) y[i][j][t] = vfloat{};
        leave(c, y[i][j], first + beyond, mask_first + beyond, k);
      }
  }
}

int64_t scratch_floats(const WinogradConvolution& c, int64_t tiles) {
  return kProducts * (tiles * (c.channels + c.out_channels) + 2 * kApart) + 2 * tiles;
}

void run(const WinogradConvolution& c, int64_t first, int64_t tiles, float* scratch) {
  const int64_t in_pitch = tiles * c.channels + kApart, out_pitch = tiles * c.out_channels + kApart;
  float* const products = scratch + kProducts * in_pitch;
  uint64_t* const zeros = reinterpret_cast<uint64_t*>(products + kProducts * out_pitch);
  for (int64_t t = 0; t < tiles; ++t) {
    const Place place(c, first + t);
    const int64_t row = place.row - c.top, column = place.column - c.left;
    const bool inside = row >= 0 && column >= 0 && row + kWindow <= c.height && column + kWindow <= c.width;
    zeros[t] = (inside ? enter_tile<true> : enter_tile<false>)(c, place, scratch + t * c.channels, in_pitch);
  }
  const int64_t matrix = c.out_channels * c.channels;
  for (int64_t p = 0; p < kProducts; ++p)
    multiply(scratch + p * in_pitch, c.channels, tiles, c.channels, c.weight + p * matrix, c.out_channels,
             Keep{products + p * out_pitch, c.out_channels});
  for (int64_t t = 0; t < tiles; ++t)
    leave_tile(c, Place(c, first + t), products + t * c.out_channels, out_pitch, zeros[t]);
}
}  // namespace

PYSAL_TABLE(WinogradKernels, winograd) = {scratch_floats, run};
}  // namespace pysal::cpu
