// Input values are split into three bf16 numbers whose sum they are, and arranged in tiles of 16 pixels by 32 channels;
// for each block of 32 pixels by 32 output channels the matrix unit adds up six of the nine products of such tiles.
// Loops, from the outside: slabs of channels and taps that keep the split pixels in the second-level cache, 32 output
// channels, parts of a slab whose weights stay in the first-level cache, 32 pixels. Sums wait in scratch in between.
#include "bf16x6_kernels.h"

#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pysal::cpu {
namespace {
constexpr int64_t kRows = 16;              // of a tile: pixels, pairs of channels of a weight
constexpr int64_t kDepth = 32;             // channels of a tile
constexpr int64_t kTile = kRows * kDepth;  // bf16 numbers
constexpr int64_t kStep = 3 * kTile;       // the three parts of a tile lie side by side
constexpr int64_t kSum = kRows * kRows;    // float sums of a tile
constexpr int64_t kSlabTiles = 192;        // tiles of split pixels in a slab: 576 KB
constexpr int64_t kPartTiles = 4;          // of a slab: 24 KB of weights for 32 channels

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Tiles along the sum: of every tap, so many of its channels.
int64_t depth_tiles(const Bf16x6Convolution& c) { return c.kernel_height * c.kernel_width * up(c.channels, kDepth); }

int64_t slab_tiles(const Bf16x6Convolution& c) {
  const int64_t all = depth_tiles(c), most = kSlabTiles / (kBf16x6Pixels / kRows);
  return all < most ? all : most;
}

// x = high + middle + low to 24 bits; each part is rounded to bf16.
inline void split(__m512 x, uint16_t* high, uint16_t* middle, uint16_t* low) {
  const auto widened = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  const __m256i first = (__m256i)_mm512_cvtneps_pbh(x);
  x = _mm512_sub_ps(x, widened(first));
  const __m256i second = (__m256i)_mm512_cvtneps_pbh(x);
  x = _mm512_sub_ps(x, widened(second));
  _mm256_store_si256((__m256i*)high, first);
  _mm256_store_si256((__m256i*)middle, second);
  _mm256_store_si256((__m256i*)low, (__m256i)_mm512_cvtneps_pbh(x));
}

// Tiles [from, to) along the sum of `count` pixels: pixel m, tile k at ((m / 16) (to - from) + k - from) kStep.
void arrange(const Bf16x6Convolution& c, int64_t first, int64_t count, int64_t from, int64_t to, uint16_t* target) {
  const int64_t per_tap = up(c.channels, kDepth), tail = c.channels - (per_tap - 1) * kDepth;
  const __mmask16 near = tail >= 16 ? 0xffff : (1u << tail) - 1, far = tail >= 32  ? 0xffff
                                                                       : tail > 16 ? (1u << (tail - 16)) - 1
                                                                                   : 0;
  const int64_t plane = c.out_height * c.out_width;
  for (int64_t m = 0; m < up(count, kRows) * kRows; ++m) {
    uint16_t* to_row = target + (m / kRows) * (to - from) * kStep + m % kRows * kDepth;
    const int64_t pixel = first + m, image = pixel / plane, y = pixel % plane / c.out_width, x = pixel % c.out_width;
    int64_t tap = from / per_tap, at = from % per_tap;
    for (int64_t k = from; k < to; ++tap, at = 0) {
      const int64_t row = y * c.row_stride - c.top + tap / c.kernel_width * c.row_dilation;
      const int64_t column = x * c.column_stride - c.left + tap % c.kernel_width * c.column_dilation;
      const bool inside = m < count && row >= 0 && row < c.height && column >= 0 && column < c.width;
      const float* source = c.input + ((image * c.height + row) * c.width + column) * c.channels;
      for (; at < per_tap && k < to; ++at, ++k, to_row += kStep) {
        if (!inside) {
          for (int64_t part = 0; part < 3; ++part) _mm512_store_si512(to_row + part * kTile, _mm512_setzero_si512());
          continue;
        }
        const bool last = at + 1 == per_tap;
        const float* const values = source + at * kDepth;
        split(_mm512_maskz_loadu_ps(last ? near : 0xffff, values), to_row, to_row + kTile, to_row + 2 * kTile);
        split(_mm512_maskz_loadu_ps(last ? far : 0xffff, values + 16), to_row + 16, to_row + kTile + 16,
              to_row + 2 * kTile + 16);
      }
    }
  }
}

// Lines of memory that will be wanted soon, fetched while tiles are multiplied: the weights of two blocks of channels.
struct Ahead {
  const char* first = nullptr;
  const char* second = nullptr;
  int64_t from = 0, to = 0;  // lines, those of `second` after kLines of `first`
  int64_t lines = 0;         // of each block

  void fetch(int64_t step, int64_t steps) const {
    for (int64_t i = from + (to - from) * step / steps; i < from + (to - from) * (step + 1) / steps; ++i)
      _mm_prefetch((i < lines ? first + i * 64 : second + (i - lines) * 64), _MM_HINT_T1);
  }
};

// Adds to sums [2][2] the products of some tiles, `a_next` and `b_next` from one block of 16 to the other. Six of nine
// products: what is left out is below 2^-26 of the largest. The five small ones are added up first, and the sum of
// these tiles from nothing, so that few roundings are of the size of the whole sum. `fresh`: sums hold nothing yet.
template <int kPixels, int kChannels>
inline void multiply(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next, int64_t tiles, float* sums,
                     int64_t sums_next, bool fresh, const Ahead& ahead) {
  _tile_zero(0);
  if (kChannels == 2) _tile_zero(1);
  if (kPixels == 2) _tile_zero(2);
  if (kPixels == 2 && kChannels == 2) _tile_zero(3);
#define PYSAL_LOAD_A(part)                            \
  _tile_loadd(4, a + k * kStep + (part) * kTile, 64); \
  if (kPixels == 2) _tile_loadd(5, a + a_next + k * kStep + (part) * kTile, 64)
#define PYSAL_LOAD_B(part)                            \
  _tile_loadd(6, b + k * kStep + (part) * kTile, 64); \
  if (kChannels == 2) _tile_loadd(7, b + b_next + k * kStep + (part) * kTile, 64)
#define PYSAL_MULTIPLY                         \
  _tile_dpbf16ps(0, 4, 6);                     \
  if (kChannels == 2) _tile_dpbf16ps(1, 4, 7); \
  if (kPixels == 2) _tile_dpbf16ps(2, 5, 6);   \
  if (kPixels == 2 && kChannels == 2) _tile_dpbf16ps(3, 5, 7)
  for (int64_t k = 0; k < tiles; ++k) {
    PYSAL_LOAD_A(2);
    PYSAL_LOAD_B(0);
    PYSAL_MULTIPLY;
    ahead.fetch(k, tiles);
    PYSAL_LOAD_A(1);
    PYSAL_MULTIPLY;
    PYSAL_LOAD_B(1);
    PYSAL_MULTIPLY;
    PYSAL_LOAD_A(0);
    PYSAL_MULTIPLY;
    PYSAL_LOAD_B(2);
    PYSAL_MULTIPLY;
  }
  for (int64_t k = 0; k < tiles; ++k) {
    PYSAL_LOAD_A(0);
    PYSAL_LOAD_B(0);
    PYSAL_MULTIPLY;
  }
#undef PYSAL_LOAD_A
#undef PYSAL_LOAD_B
#undef PYSAL_MULTIPLY
  alignas(64) float found[4 * kSum];
  float* const to = fresh ? sums : found;
  const int64_t to_next = fresh ? sums_next : 2 * kSum;
  _tile_stored(0, to, 64);
  if (kChannels == 2) _tile_stored(1, to + kSum, 64);
  if (kPixels == 2) _tile_stored(2, to + to_next, 64);
  if (kPixels == 2 && kChannels == 2) _tile_stored(3, to + to_next + kSum, 64);
  if (fresh) return;
  for (int64_t i = 0; i < kPixels; ++i)
    for (int64_t j = 0; j < kChannels * kSum; j += 16) {
      float* const sum = sums + i * sums_next + j;
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(found + i * 2 * kSum + j)));
    }
}

// Writes `rows` pixels by up to 16 channels.
void finish(const Bf16x6Convolution& c, const float* sums, int64_t pixel, int64_t rows, int64_t channel) {
  const int64_t columns = c.out_channels - channel;
  const __mmask16 mask = columns >= 16 ? 0xffff : (1u << columns) - 1;
  const __m512 bias = c.bias ? _mm512_maskz_loadu_ps(mask, c.bias + channel) : _mm512_setzero_ps();
  const __m512 lower = _mm512_set1_ps(c.lower), upper = _mm512_set1_ps(c.upper);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (pixel + r) * c.out_channels + channel;
    __m512 value = _mm512_add_ps(_mm512_load_ps(sums + r * 16), bias);
    if (c.shortcut) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, c.shortcut + place));
    value = _mm512_min_ps(upper, _mm512_max_ps(lower, value));  // the second operand where one is NaN
    _mm512_mask_storeu_ps(c.output + place, mask, value);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
}  // namespace

int64_t bf16x6_scratch_bytes(const Bf16x6Convolution& c) {
  const int64_t channel_tiles = slab_tiles(c) == depth_tiles(c) ? 2 : 2 * up(c.out_channels, 2 * kRows);
  return kBf16x6Pixels / kRows * (slab_tiles(c) * kStep * 2 + channel_tiles * kSum * 4);
}

void bf16x6_pixels(const Bf16x6Convolution& c, int64_t first, int64_t last, void* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t all = depth_tiles(c), slab = slab_tiles(c), count = last - first;
  const int64_t pixel_tiles = up(count, kRows), channel_tiles = up(c.out_channels, kRows);
  uint16_t* const pixels = (uint16_t*)scratch;
  float* const sums = (float*)(pixels + kBf16x6Pixels / kRows * slab * kStep);
  // sums of a block of 32 channels: only where they wait for the next slab has each block its own
  const int64_t sums_row = 2 * kSum, sums_block = slab == all ? 0 : pixel_tiles * sums_row;
  for (int64_t from = 0; from < all; from += slab) {
    const int64_t tiles = all - from < slab ? all - from : slab;
    arrange(c, first, count, from, from + tiles, pixels);
    for (int64_t n = 0; n < channel_tiles; n += 2) {
      const bool two = n + 1 < channel_tiles;
      float* const block = sums + n / 2 * sums_block;
      for (int64_t part = 0; part < tiles; part += kPartTiles) {
        const int64_t some = tiles - part < kPartTiles ? tiles - part : kPartTiles;
        const bool fresh = from + part == 0, whole = from + part + some == all;
        const uint16_t* const weight = c.weight + (n * all + from + part) * kStep;
        const bool more = part + some < tiles;
        const int64_t next_n = more ? n : n + 2 < channel_tiles ? n + 2 : 0, next_part = more ? part + some : 0;
        const uint16_t* const next = c.weight + (next_n * all + from + next_part) * kStep;
        Ahead ahead;
        ahead.first = (const char*)next;
        ahead.second = (const char*)(next_n + 1 < channel_tiles ? next + all * kStep : next);
        ahead.lines = (tiles - next_part < kPartTiles ? tiles - next_part : kPartTiles) * kStep * 2 / 64;
        for (int64_t m = 0; m < pixel_tiles; m += 2) {
          ahead.from = 2 * ahead.lines * m / (pixel_tiles + 1);
          ahead.to = 2 * ahead.lines * (m + 2) / (pixel_tiles + 1);
          if (ahead.to > 2 * ahead.lines) ahead.to = 2 * ahead.lines;
          if (whole) {
            const int64_t left = count - m * kRows, rows = left < 2 * kRows ? left : 2 * kRows;
            const float* const line = c.output + (first + m * kRows) * c.out_channels + n * kRows;
            const float* const other = c.shortcut + (first + m * kRows) * c.out_channels + n * kRows;
            for (int64_t r = 0; r < rows; ++r) {
              __builtin_prefetch(line + r * c.out_channels, 1);
              __builtin_prefetch(line + r * c.out_channels + 16, 1);
              if (c.shortcut) {
                __builtin_prefetch(other + r * c.out_channels);
                __builtin_prefetch(other + r * c.out_channels + 16);
              }
            }
          }
          const uint16_t* const a = pixels + (m * tiles + part) * kStep;
          float* const at = block + m * sums_row;
          const bool pair = m + 1 < pixel_tiles;
          if (pair && two)
            multiply<2, 2>(a, tiles * kStep, weight, all * kStep, some, at, sums_row, fresh, ahead);
          else if (two)
            multiply<1, 2>(a, 0, weight, all * kStep, some, at, sums_row, fresh, ahead);
          else if (pair)
            multiply<2, 1>(a, tiles * kStep, weight, 0, some, at, sums_row, fresh, ahead);
          else
            multiply<1, 1>(a, 0, weight, 0, some, at, sums_row, fresh, ahead);
          if (!whole) continue;
          for (int64_t i = 0; i < 2 && m + i < pixel_tiles; ++i)
            for (int64_t j = 0; j < 2 && n + j < channel_tiles; ++j) {
              const int64_t pixel = (m + i) * kRows, left = count - pixel;
              finish(c, at + i * sums_row + j * kSum, first + pixel, left < kRows ? left : kRows, (n + j) * kRows);
            }
        }
      }
    }
  }
  _tile_release();
}

bool bf16x6_available() {
  static const bool granted = [] {
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512bf16")) return false;
    unsigned a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
}
}  // namespace pysal::cpu
