// Input values are split into three bf16 numbers whose sum they are, once for all taps of the kernel: they are laid out
// as a map with zeros around it, so that a tap sees the same positions, moved by a constant. For each block of 32
// positions by 32 output channels the matrix unit adds up six of the nine products of tiles of 16 x 32 such numbers.
// Loops, from the outside: slabs of channels that keep the split map in the second-level cache, 32 output channels,
// parts of a slab whose weights stay in the first-level cache, 32 positions. Sums wait in scratch in between.
#include "bf16x6_kernels.h"

#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pysal::cpu {
namespace {
constexpr int64_t kRows = 16;              // of a tile: positions, pairs of channels of a weight
constexpr int64_t kDepth = 32;             // channels of a tile
constexpr int64_t kTile = kRows * kDepth;  // bf16 numbers
constexpr int64_t kStep = 3 * kTile;       // the three parts of a tile of weights lie side by side
constexpr int64_t kSum = kRows * kRows;    // float sums of a tile
constexpr int64_t kLine = 64;              // bytes of a line of the caches
constexpr int64_t kPositions = 1024;       // of a task
constexpr int64_t kSlabBytes = 1 << 20;    // of a split map
constexpr int64_t kPart = 4;               // tiles along the sum: 24 KB of weights for 32 channels
constexpr int64_t kTogether = 4;  // blocks split together: 12 streams of stores, for which the TLB has 16 pages
constexpr int64_t kAhead = 8;     // positions that input is fetched ahead of its splitting

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
// The first `count` of 16 lanes.
__mmask16 lanes(int64_t count) { return (1u << most(0, least(count, 16))) - 1; }

// Rows or columns. The input falls into phases, those with the same remainder by the stride, and for output i tap t
// reads number i + shift(t) of phase(t): a convolution of stride 1.
struct Axis {
  int64_t taps, dilation, before, stride, input, output;

  int64_t shift(int64_t tap) const {
    const int64_t offset = tap * dilation - before;
    return offset >= 0 ? offset / stride : -((stride - 1 - offset) / stride);
  }
  int64_t phase(int64_t tap) const { return tap * dilation - before - shift(tap) * stride; }
  int64_t lowest() const { return shift(0); }
  int64_t highest() const { return shift(taps - 1); }
  bool seen(int64_t phase_asked) const {
    for (int64_t tap = 0; tap < taps; ++tap)
      if (phase(tap) == phase_asked) return true;
    return false;
  }
  // Phases that some tap sees, of those below one.
  int64_t grids(int64_t below) const {
    int64_t found = 0;
    for (int64_t each = 0; each < below; ++each) found += seen(each);
    return found;
  }
  // Numbers of a phase that some tap sees.
  int64_t length(int64_t of_phase) const {
    return most(0, least((input - of_phase + stride - 1) / stride, output + highest()));
  }
};

Axis rows_of(const Bf16x6Convolution& c) {
  return {c.kernel_height, c.row_dilation, c.top, c.row_stride, c.height, c.out_height};
}

Axis columns_of(const Bf16x6Convolution& c) {
  return {c.kernel_width, c.column_dilation, c.left, c.column_stride, c.width, c.out_width};
}

// Columns of a grid: a row is followed by zeros, which are also what the next one has on its left.
int64_t grid_width(const Axis& columns) {
  return most(columns.length(0) + most(0, -columns.lowest()), columns.output + most(0, columns.highest()));
}

// A position is a column of a row of an image; images are what changes fastest, then columns.
struct Layout {
  Axis rows, columns;
  int64_t width;      // columns of a row
  int64_t lead;       // positions before the first row
  int64_t height;     // rows that taps reach
  int64_t count;      // positions of the output
  int64_t places;     // positions of a plane: of one part of 32 channels
  int64_t grids;      // phases of rows times those of columns
  int64_t all, slab;  // blocks of 32 channels
  int64_t steps;      // tiles along the sum in a slab
  int64_t sums;       // blocks of 32 output channels whose sums wait

  Layout(const Bf16x6Convolution& c, const Bf16x6Task& task) : rows(rows_of(c)), columns(columns_of(c)) {
    width = grid_width(columns);
    lead = most(0, -columns.lowest()) * task.images;
    height = task.rows + rows.highest() - rows.lowest();
    count = (task.rows * width - (width - c.out_width)) * task.images;
    const int64_t last = up(count, 2 * kRows) + (height - task.rows) * width * task.images;
    places = lead + most(last + most(0, columns.highest()) * task.images, height * width * task.images);
    places = up(places + kRows, 2 * kRows) - kRows;  // planes begin in different sets of the caches
    grids = rows.grids(rows.stride) * columns.grids(columns.stride);
    all = up(c.channels, kDepth) / kDepth;
    const int64_t plane = 3 * places * kDepth * 2;
    const int64_t slabs = least(all, up(all * grids * plane, kSlabBytes) / kSlabBytes);
    slab = (all + slabs - 1) / slabs;
    steps = c.kernel_height * c.kernel_width * slab;
    sums = slab == all ? 1 : up(c.out_channels, 2 * kRows) / (2 * kRows);
  }
  int64_t split_bytes() const { return grids * slab * 3 * places * kDepth * 2; }
  int64_t sum_bytes() const { return sums * up(count, 2 * kRows) * 2 * kRows * 4; }
  int64_t where_bytes() const { return up(count, 2 * kRows) * 8; }
  int64_t step_bytes() const { return steps * 2 * 8; }
};

// x = high + middle + low exactly: each part is what the one before cuts off. Of 32 values.
inline void split(__m512 x, __m512 y, uint16_t* to, int64_t part) {
  const __m512i upper_half = _mm512_set1_epi32((int)0xffff0000);
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  for (int64_t i = 0; i < 3; ++i) {
    const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    _mm512_store_si512(to + i * part, _mm512_permutex2var_epi16(a, odd, b));
    if (i == 2) break;
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(a, upper_half)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(b, upper_half)));
  }
}

// Splits blocks [from, to) of 32 channels of what a task sees: planes [grid][block][part][position][32].
void arrange(const Bf16x6Convolution& c, const Bf16x6Task& task, const Layout& at, int64_t from, int64_t to,
             uint16_t* planes) {
  const int64_t part = at.places * kDepth, block = 3 * part, blocks = to - from;
  const int64_t tail = c.channels - (at.all - 1) * kDepth;
  const __mmask16 near = lanes(tail), far = lanes(tail - 16);
  const auto clear = [&](uint16_t* first, int64_t positions) {
    for (int64_t plane = 0; plane < 3 * blocks; ++plane) memset(first + plane * part, 0, positions * kDepth * 2);
  };
  for (int64_t a = 0; a < at.rows.stride; ++a) {
    if (!at.rows.seen(a)) continue;
    for (int64_t b = 0; b < at.columns.stride; ++b) {
      if (!at.columns.seen(b)) continue;
      const int64_t length = at.columns.length(b), row_length = at.rows.length(a);
      clear(planes, at.lead);
      uint16_t* place = planes + at.lead * kDepth;
      for (int64_t i = 0; i < at.height; ++i) {
        const int64_t row = task.first_row + at.rows.lowest() + i;
        const int64_t filled = row >= 0 && row < row_length ? length : 0;
        for (int64_t first = from; first < to; first += kTogether) {
          uint16_t* at_column = place;
          for (int64_t column = 0; column < filled; ++column)
            for (int64_t n = 0; n < task.images; ++n, at_column += kDepth) {
              const float* const source =
                  c.input + (((task.first_image + n) * c.height + row * c.row_stride + a) * c.width +
                             column * c.column_stride + b) *
                                c.channels;
              for (int64_t k = first; k < least(to, first + kTogether); ++k) {
                const float* const values = source + k * kDepth;
                const bool last = k + 1 == at.all;
                _mm_prefetch((const char*)(values + kAhead * c.channels), _MM_HINT_T0);
                _mm_prefetch((const char*)(values + kAhead * c.channels + 16), _MM_HINT_T0);
                split(_mm512_maskz_loadu_ps(last ? near : 0xffff, values),
                      _mm512_maskz_loadu_ps(last ? far : 0xffff, values + 16), at_column + (k - from) * block, part);
              }
            }
        }
        place += filled * task.images * kDepth;
        clear(place, (at.width - filled) * task.images);
        place += (at.width - filled) * task.images * kDepth;
      }
      clear(place, at.places - at.lead - at.height * at.width * task.images);
      planes += blocks * block;
    }
  }
}

// Lines of memory that will be wanted soon, fetched while tiles are multiplied: weights of the next part of a sum.
struct Ahead {
  const uint16_t* first = nullptr;  // of two blocks of channels
  const uint16_t* second = nullptr;
  const int64_t* steps = nullptr;
  int64_t from = 0, to = 0;  // lines

  void fetch(int64_t step, int64_t of) const {
    constexpr int64_t kLines = kStep * 2 / kLine;
    for (int64_t i = from + (to - from) * step / of; i < from + (to - from) * (step + 1) / of; ++i) {
      const int64_t line = i % (2 * kLines), each = steps[i / (2 * kLines)];
      _mm_prefetch((const char*)((line < kLines ? first : second) + each) + line % kLines * kLine, _MM_HINT_T1);
    }
  }
};

// Sums of 32 positions by 32 channels that wait to be written: row by row, while the next tiles are multiplied.
struct Finished {
  const float* found = nullptr;   // tiles of sums (2, 2)
  const float* before = nullptr;  // sums of the parts before, or null
  const int64_t* where = nullptr;
  int64_t channel = 0, rows = 0, row = 0;

  void write(const Bf16x6Convolution& c, int64_t some) {
    if (row == rows) return;
    const int64_t end = least(row + some, rows), left = c.out_channels - channel;
    const __mmask16 near = lanes(left), far = lanes(left - 16);
    for (; row < end; ++row) {
      if (where[row] < 0) continue;
      const int64_t sum = row / kRows * 2 * kSum + row % kRows * kRows;
      write_row(c, where[row], channel, sum, near);
      if (far) write_row(c, where[row], channel + kRows, sum + kSum, far);
    }
  }

 private:
  void write_row(const Bf16x6Convolution& c, int64_t pixel, int64_t first, int64_t sum, __mmask16 inside) const {
    const int64_t place = pixel * c.out_channels + first;
    __m512 value = _mm512_load_ps(found + sum);
    if (before) value = _mm512_add_ps(_mm512_load_ps(before + sum), value);
    if (c.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(inside, c.bias + first));
    if (c.shortcut) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(inside, c.shortcut + place));
    const __m512 upper = _mm512_set1_ps(c.upper);
    value = _mm512_max_ps(_mm512_set1_ps(c.lower), value);  // the second operand where one is NaN
    value = _mm512_min_ps(upper, value);
    if (c.gates) {
      // as guided_relu has it: NaN opens a gate, and so does infinity where upper is that
      const __mmask16 positive = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);
      const __mmask16 below = _mm512_mask_cmp_ps_mask(positive, value, upper, _CMP_NGE_UQ);
      const __mmask16 open = c.upper == __builtin_inff() ? positive : below;
      memcpy(c.gates + place / 8, &open, 2);
    }
    if (c.rule != Bf16x6Rule::none) {
      __mmask16 open = 0xffff;
      if (c.rule != Bf16x6Rule::deconvnet) {
        const int64_t own = pixel < c.mask_pixels ? pixel : pixel % c.mask_pixels;
        memcpy(&open, c.mask + (own * c.out_channels + first) / 8, 2);
      }
      if (c.rule != Bf16x6Rule::plain) open = _mm512_mask_cmp_ps_mask(open, value, _mm512_setzero_ps(), _CMP_NLE_UQ);
      value = _mm512_maskz_mov_ps(open, value);
    }
    _mm512_mask_storeu_ps(c.output + place, inside, value);
  }
};

// Writes to found, tiles of sums (2, 2), the products of some tiles, and what waits to be written meanwhile. Six of
// nine products: what is left out is below 2^-25 of the largest. The five small ones are added up first, and the sum of
// these tiles from nothing, so that few roundings are of the size of the whole sum.
template <int kPositionTiles, int kChannelTiles>
inline void multiply(const Bf16x6Convolution& c, const uint16_t* a, const int64_t* a_steps, int64_t part,
                     const uint16_t* b, const int64_t* b_steps, int64_t b_next, int64_t tiles, float* found,
                     const Ahead& ahead, Finished& finished) {
  // of those that wait, for each of the six products of a tile: all are written before new sums replace those before
  const int64_t rows = (2 * kRows + 6 * tiles - 1) / (6 * tiles);
  _tile_zero(0);
  if (kChannelTiles == 2) _tile_zero(1);
  if (kPositionTiles == 2) _tile_zero(2);
  if (kPositionTiles == 2 && kChannelTiles == 2) _tile_zero(3);
#define PYSAL_LOAD_A(which)                                    \
  _tile_loadd(4, a + a_steps[k] + (which) * part, 2 * kDepth); \
  if (kPositionTiles == 2) _tile_loadd(5, a + a_steps[k] + (which) * part + kTile, 2 * kDepth)
#define PYSAL_LOAD_B(which)                                     \
  _tile_loadd(6, b + b_steps[k] + (which) * kTile, 2 * kDepth); \
  if (kChannelTiles == 2) _tile_loadd(7, b + b_next + b_steps[k] + (which) * kTile, 2 * kDepth)
#define PYSAL_MULTIPLY                                                    \
  _tile_dpbf16ps(0, 4, 6);                                                \
  if (kChannelTiles == 2) _tile_dpbf16ps(1, 4, 7);                        \
  if (kPositionTiles == 2) _tile_dpbf16ps(2, 5, 6);                       \
  if (kPositionTiles == 2 && kChannelTiles == 2) _tile_dpbf16ps(3, 5, 7); \
  finished.write(c, rows)
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
  _tile_stored(0, found, 64);
  if (kChannelTiles == 2) _tile_stored(1, found + kSum, 64);
  if (kPositionTiles == 2) _tile_stored(2, found + 2 * kSum, 64);
  if (kPositionTiles == 2 && kChannelTiles == 2) _tile_stored(3, found + 3 * kSum, 64);
}

// Adds tiles of sums (2, 2) to others.
void add(const float* some, float* to) {
  for (int64_t i = 0; i < 4 * kSum; i += 16)
    _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(some + i), _mm512_load_ps(to + i)));
}

// Fetches what 32 positions of 32 channels will be written to.
void announce(const Bf16x6Convolution& c, const int64_t* where, int64_t channel) {
  for (int64_t r = 0; r < 2 * kRows; ++r) {
    if (where[r] < 0) continue;
    const int64_t place = where[r] * c.out_channels + channel;
    __builtin_prefetch(c.output + place, 1);
    __builtin_prefetch(c.output + place + 16, 1);
    if (!c.shortcut) continue;
    __builtin_prefetch(c.shortcut + place);
    __builtin_prefetch(c.shortcut + place + 16);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
}  // namespace

Bf16x6Task bf16x6_task(const Bf16x6Convolution& c, int64_t threads) {
  const int64_t width = grid_width(columns_of(c)), all = c.images * c.out_height * width;
  const int64_t wanted = most(2 * kRows, least(kPositions, (all + threads - 1) / threads));
  const int64_t image = c.out_height * width;
  if (image <= wanted) {  // whole images, groups of equal size
    const int64_t together = least(c.images, wanted / image), groups = (c.images + together - 1) / together;
    return {0, (c.images + groups - 1) / groups, 0, c.out_height};
  }
  const int64_t rows = most(1, wanted / width), groups = (c.out_height + rows - 1) / rows;
  return {0, 1, 0, (c.out_height + groups - 1) / groups};
}

int64_t bf16x6_scratch_bytes(const Bf16x6Convolution& c, const Bf16x6Task& task) {
  const Layout at(c, task);
  return at.split_bytes() + at.sum_bytes() + at.where_bytes() + at.step_bytes();
}

void bf16x6_run(const Bf16x6Convolution& c, const Bf16x6Task& task, void* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const Layout at(c, task);
  uint16_t* const planes = (uint16_t*)scratch;
  float* const sums = (float*)((char*)planes + at.split_bytes());
  int64_t* const where = (int64_t*)((char*)sums + at.sum_bytes());
  int64_t* const a_steps = (int64_t*)((char*)where + at.where_bytes());
  int64_t* const b_steps = a_steps + at.steps;

  const int64_t positions = up(at.count, 2 * kRows);
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t column = p / task.images % at.width, row = p / (task.images * at.width);
    const bool inside = p < at.count && column < c.out_width;
    where[p] = inside
                   ? ((task.first_image + p % task.images) * c.out_height + task.first_row + row) * c.out_width + column
                   : -1;
  }
  const int64_t taps = c.kernel_height * c.kernel_width, channel_tiles = up(c.out_channels, kRows) / kRows;
  const int64_t part = at.places * kDepth, weight_block = taps * at.all * kStep;
  const int64_t column_grids = at.columns.grids(at.columns.stride);
  const int64_t sums_block = at.sums == 1 ? 0 : positions * 2 * kRows;
  alignas(64) float local[2][4 * kSum];
  int64_t turn = 0;
  Finished finished;
  for (int64_t from = 0; from < at.all; from += at.slab) {
    const int64_t blocks = least(at.slab, at.all - from), steps = taps * blocks;
    arrange(c, task, at, from, from + blocks, planes);
    for (int64_t tap = 0, k = 0; tap < taps; ++tap) {
      const int64_t i = tap / c.kernel_width, j = tap % c.kernel_width;
      const int64_t grid = at.rows.grids(at.rows.phase(i)) * column_grids + at.columns.grids(at.columns.phase(j));
      const int64_t moved = (at.rows.shift(i) - at.rows.lowest()) * at.width + at.columns.shift(j);
      for (int64_t block = 0; block < blocks; ++block, ++k) {
        a_steps[k] = (grid * blocks + block) * 3 * part + (at.lead + moved * task.images) * kDepth;
        b_steps[k] = (tap * at.all + from + block) * kStep;
      }
    }
    // a sum of one part: weights stay in the second-level cache and outputs are written one after the other
    const int64_t group = steps > kPart ? 2 : channel_tiles;
    for (int64_t group_first = 0; group_first < channel_tiles; group_first += group)
      for (int64_t first = 0; first < steps; first += kPart) {
        const int64_t some = least(kPart, steps - first), group_last = least(group_first + group, channel_tiles);
        const bool fresh = from + first == 0, whole = from + blocks == at.all && first + some == steps;
        // the next part of this sum, or the first of the next block's
        const bool more = first + some < steps;
        const int64_t next = more ? group_first : group_last < channel_tiles ? group_last : 0;
        const int64_t next_first = more ? first + some : 0;
        const int64_t lines = steps > kPart ? least(kPart, steps - next_first) * 2 * kStep * 2 / kLine : 0;
        Ahead ahead;
        ahead.first = c.weight + next * weight_block;
        ahead.second = ahead.first + (next + 1 < channel_tiles ? weight_block : 0);
        ahead.steps = b_steps + next_first;
        for (int64_t p = 0; p < positions; p += 2 * kRows) {
          ahead.from = lines * p / positions;
          ahead.to = lines * (p + 2 * kRows) / positions;
          const bool pair = p + kRows < at.count;
          for (int64_t n = group_first; n < group_last; n += 2) {
            if (whole) announce(c, where + p, n * kRows);
            const bool two = n + 1 < channel_tiles;
            const uint16_t* const weight = c.weight + n * weight_block;
            const uint16_t* const a = planes + p * kDepth;
            float* const waiting = sums + n / 2 * sums_block + p * 2 * kRows;
            float* const found = fresh && !whole ? waiting : local[turn];
            const int64_t* const a_at = a_steps + first;
            const int64_t* const b_at = b_steps + first;
            const auto multiply_tiles = pair && two ? multiply<2, 2>
                                        : two       ? multiply<1, 2>
                                        : pair      ? multiply<2, 1>
                                                    : multiply<1, 1>;
            multiply_tiles(c, a, a_at, part, weight, b_at, weight_block, some, found, ahead, finished);
            finished.write(c, 2 * kRows);
            if (whole) {
              finished = {found, fresh ? nullptr : waiting, where + p, n * kRows, kRows * (1 + pair)};
              turn = 1 - turn;
            } else if (!fresh) {
              add(found, waiting);
            }
          }
        }
      }
  }
  finished.write(c, 2 * kRows);
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
