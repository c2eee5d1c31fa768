// Input values are split into three bf16 numbers whose sum they are, once for all taps of the kernel: they are laid out
// as a map with zeros around it, so that a tap sees the same positions, moved by a constant. For each block of 32
// positions by 32 output channels the matrix unit adds up six of the nine products of tiles of 16 x 32 such numbers.
// Loops, from the outside: slabs of channels that keep the split map in the second-level cache, 32 output channels,
// parts of a slab whose weights stay in the first-level cache, 32 positions. Sums wait in scratch in between.
#include "../ceil_div.h"
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

int64_t up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }
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
    return most(0, least(ceil_div(input - of_phase, stride), output + highest()));
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
    all = ceil_div(c.channels, kDepth);
    const int64_t plane = 3 * places * kDepth * 2;
    const int64_t slabs = least(all, ceil_div(all * grids * plane, kSlabBytes));
    slab = ceil_div(all, slabs);
    steps = c.kernel_height * c.kernel_width * slab;
    sums = slab == all ? 1 : ceil_div(c.out_channels, 2 * kRows);
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

// The parts of a number, of which each is what the one before cuts off.
enum Part : int64_t { kHigh = 0, kMiddle = 1, kLow = 2 };

// Which tiles along a sum are multiplied.
struct Along {
  const uint16_t* positions;    // of the split map
  const int64_t* positions_at;  // where each tile begins from there on
  int64_t part;                 // from one part of a position to the next
  const uint16_t* weights;      // of the first block of channels
  const int64_t* weights_at;    // where each tile begins from there on
  int64_t next_channels;        // from one block of channels to the next
  int64_t tiles;
};

// One or two blocks of 16 positions times one or two of 16 output channels. Registers 0 to 3 hold the sums, 4 and 5
// positions, 6 and 7 weights.
template <int kPositionTiles, int kChannelTiles>
struct Tiles {
  static constexpr bool kFour = kPositionTiles == 2 && kChannelTiles == 2;
  const Along& along;

  static void clear() {
    _tile_zero(0);
    if (kChannelTiles == 2) _tile_zero(1);
    if (kPositionTiles == 2) _tile_zero(2);
    if (kFour) _tile_zero(3);
  }
  void load_positions(int64_t tile, Part which) const {
    const uint16_t* const from = along.positions + along.positions_at[tile] + which * along.part;
    _tile_loadd(4, from, 2 * kDepth);
    if (kPositionTiles == 2) _tile_loadd(5, from + kTile, 2 * kDepth);
  }
  void load_weights(int64_t tile, Part which) const {
    const uint16_t* const from = along.weights + along.weights_at[tile] + which * kTile;
    _tile_loadd(6, from, 2 * kDepth);
    if (kChannelTiles == 2) _tile_loadd(7, from + along.next_channels, 2 * kDepth);
  }
  static void add_product() {
    _tile_dpbf16ps(0, 4, 6);
    if (kChannelTiles == 2) _tile_dpbf16ps(1, 4, 7);
    if (kPositionTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if (kFour) _tile_dpbf16ps(3, 5, 7);
  }
  static void store(float* found) {
    _tile_stored(0, found, 64);
    if (kChannelTiles == 2) _tile_stored(1, found + kSum, 64);
    if (kPositionTiles == 2) _tile_stored(2, found + 2 * kSum, 64);
    if (kFour) _tile_stored(3, found + 3 * kSum, 64);
  }
};

// Writes to found, tiles of sums (2, 2), the products of some tiles, and what waits to be written meanwhile. Six of
// nine products: what is left out is below 2^-25 of the largest. The five small ones are added up first, and the sum of
// these tiles from nothing, so that few roundings are of the size of the whole sum.
template <int kPositionTiles, int kChannelTiles>
void multiply(const Bf16x6Convolution& c, const Along& along, float* found, const Ahead& ahead, Finished& finished) {
  using Some = Tiles<kPositionTiles, kChannelTiles>;
  const Some some{along};
  const int64_t tiles = along.tiles;
  // of those that wait, for each of the six products of a tile: all are written before new sums replace those before
  const int64_t rows = ceil_div(2 * kRows, 6 * tiles);
  const auto add_product = [&] {
    Some::add_product();
    finished.write(c, rows);
  };
  Some::clear();
  for (int64_t k = 0; k < tiles; ++k) {
    some.load_positions(k, kLow);
    some.load_weights(k, kHigh);
    add_product();  // low x high
    ahead.fetch(k, tiles);
    some.load_positions(k, kMiddle);
    add_product();  // middle x high
    some.load_weights(k, kMiddle);
    add_product();  // middle x middle
    some.load_positions(k, kHigh);
    add_product();  // high x middle
    some.load_weights(k, kLow);
    add_product();  // high x low
  }
  for (int64_t k = 0; k < tiles; ++k) {
    some.load_positions(k, kHigh);
    some.load_weights(k, kHigh);
    add_product();  // high x high
  }
  Some::store(found);
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

// Where everything lies in a task's scratch.
struct Scratch {
  uint16_t* planes;       // of a slab: the split map
  float* sums;            // those that wait for the next part or slab
  int64_t* where;         // for each position the pixel of the output, -1 where there is none
  int64_t* positions_at;  // where each tile along a sum begins in the planes
  int64_t* weights_at;    // and in the weights

  Scratch(const Layout& at, void* scratch) {
    planes = (uint16_t*)scratch;
    sums = (float*)((char*)planes + at.split_bytes());
    where = (int64_t*)((char*)sums + at.sum_bytes());
    positions_at = (int64_t*)((char*)where + at.where_bytes());
    weights_at = positions_at + at.steps;
  }
};

// One task: its loops, from the outside in, each a function.
class Run {
 public:
  Run(const Bf16x6Convolution& convolution, const Bf16x6Task& task, void* scratch)
      : c_(convolution), task_(task), at_(convolution, task), scratch_(at_, scratch) {
    positions_ = up(at_.count, 2 * kRows);
    taps_ = c_.kernel_height * c_.kernel_width;
    channel_tiles_ = ceil_div(c_.out_channels, kRows);
    part_ = at_.places * kDepth;
    weight_block_ = taps_ * at_.all * kStep;
    sums_block_ = at_.sums == 1 ? 0 : positions_ * 2 * kRows;
  }

  void all() {
    find_pixels();
    for (int64_t from = 0; from < at_.all; from += at_.slab) slab({from, least(at_.slab, at_.all - from)});
    finished_.write(c_, 2 * kRows);
  }

 private:
  // Blocks of 32 channels that are split together.
  struct Slab {
    int64_t from, blocks;
  };
  // A part of a slab's sum whose weights stay in the first-level cache, for some blocks of 16 output channels.
  struct PartOfSum {
    int64_t channels_from, channels_to;  // blocks of 16 output channels
    int64_t first, tiles;                // along the sum
    bool fresh, whole;                   // whether it begins the sum, and ends it
    int64_t lines;                       // of the cache: weights that will be wanted next
  };

  void find_pixels() {
    for (int64_t p = 0; p < positions_; ++p) {
      const int64_t image = task_.first_image + p % task_.images, column = p / task_.images % at_.width,
                    row = task_.first_row + p / (task_.images * at_.width);
      const bool inside = p < at_.count && column < c_.out_width;
      scratch_.where[p] = inside ? (image * c_.out_height + row) * c_.out_width + column : -1;
    }
  }

  void find_tiles(const Slab& slab) {
    const int64_t column_grids = at_.columns.grids(at_.columns.stride);
    for (int64_t tap = 0, k = 0; tap < taps_; ++tap) {
      const int64_t i = tap / c_.kernel_width, j = tap % c_.kernel_width;
      const int64_t grid = at_.rows.grids(at_.rows.phase(i)) * column_grids + at_.columns.grids(at_.columns.phase(j));
      const int64_t moved = (at_.rows.shift(i) - at_.rows.lowest()) * at_.width + at_.columns.shift(j);
      for (int64_t block = 0; block < slab.blocks; ++block, ++k) {
        scratch_.positions_at[k] =
            (grid * slab.blocks + block) * 3 * part_ + (at_.lead + moved * task_.images) * kDepth;
        scratch_.weights_at[k] = (tap * at_.all + slab.from + block) * kStep;
      }
    }
  }

  void slab(const Slab& slab) {
    arrange(c_, task_, at_, slab.from, slab.from + slab.blocks, scratch_.planes);
    find_tiles(slab);
    const int64_t steps = taps_ * slab.blocks;
    // a sum of one part: weights stay in the second-level cache and outputs are written one after the other
    const int64_t group = steps > kPart ? 2 : channel_tiles_;
    for (int64_t channels = 0; channels < channel_tiles_; channels += group)
      for (int64_t first = 0; first < steps; first += kPart) {
        PartOfSum part;
        part.channels_from = channels;
        part.channels_to = least(channels + group, channel_tiles_);
        part.first = first;
        part.tiles = least(kPart, steps - first);
        part.fresh = slab.from + first == 0;
        part.whole = slab.from + slab.blocks == at_.all && first + part.tiles == steps;
        // the next part of this sum, or the first of the next block's
        const bool more = first + part.tiles < steps;
        const int64_t next = more ? channels : part.channels_to < channel_tiles_ ? part.channels_to : 0;
        const int64_t next_first = more ? first + part.tiles : 0;
        part.lines = steps > kPart ? least(kPart, steps - next_first) * 2 * kStep * 2 / kLine : 0;
        ahead_.first = c_.weight + next * weight_block_;
        ahead_.second = ahead_.first + (next + 1 < channel_tiles_ ? weight_block_ : 0);
        ahead_.steps = scratch_.weights_at + next_first;
        part_of_sum(part);
      }
  }

  void part_of_sum(const PartOfSum& part) {
    for (int64_t p = 0; p < positions_; p += 2 * kRows) {
      ahead_.from = part.lines * p / positions_;
      ahead_.to = part.lines * (p + 2 * kRows) / positions_;
      for (int64_t n = part.channels_from; n < part.channels_to; n += 2) block(part, p, n);
    }
  }

  // 32 positions from p on by 32 output channels, which begin with block n of 16.
  void block(const PartOfSum& part, int64_t p, int64_t n) {
    const int64_t* const where = scratch_.where + p;
    if (part.whole) announce(c_, where, n * kRows);
    const bool pair = p + kRows < at_.count, two = n + 1 < channel_tiles_;
    Along along;
    along.positions = scratch_.planes + p * kDepth;
    along.positions_at = scratch_.positions_at + part.first;
    along.part = part_;
    along.weights = c_.weight + n * weight_block_;
    along.weights_at = scratch_.weights_at + part.first;
    along.next_channels = weight_block_;
    along.tiles = part.tiles;
    float* const waiting = scratch_.sums + n / 2 * sums_block_ + p * 2 * kRows;
    float* const found = part.fresh && !part.whole ? waiting : local_[turn_];
    const auto multiply_tiles = pair && two ? multiply<2, 2>
                                : two       ? multiply<1, 2>
                                : pair      ? multiply<2, 1>
                                            : multiply<1, 1>;
    multiply_tiles(c_, along, found, ahead_, finished_);
    finished_.write(c_, 2 * kRows);
    if (part.whole) {
      finished_.found = found;
      finished_.before = part.fresh ? nullptr : waiting;
      finished_.where = where;
      finished_.channel = n * kRows;
      finished_.rows = kRows * (1 + pair);
      finished_.row = 0;
      turn_ = 1 - turn_;
    } else if (!part.fresh) {
      add(found, waiting);
    }
  }

  alignas(64) float local_[2][4 * kSum];
  const Bf16x6Convolution& c_;
  const Bf16x6Task& task_;
  const Layout at_;
  const Scratch scratch_;
  int64_t positions_, taps_, channel_tiles_;
  int64_t part_;          // from one part of a split map to the next
  int64_t weight_block_;  // from one block of 16 output channels to the next
  int64_t sums_block_;    // from the waiting sums of 32 output channels to the next
  int64_t turn_ = 0;
  Ahead ahead_;
  Finished finished_;
};
}  // namespace

Bf16x6Task bf16x6_task(const Bf16x6Convolution& c, int64_t threads) {
  const int64_t width = grid_width(columns_of(c)), all = c.images * c.out_height * width;
  const int64_t wanted = most(2 * kRows, least(kPositions, ceil_div(all, threads)));
  const int64_t image = c.out_height * width;
  if (image <= wanted) {  // whole images, groups of equal size
    const int64_t together = least(c.images, wanted / image), groups = ceil_div(c.images, together);
    return {0, ceil_div(c.images, groups), 0, c.out_height};
  }
  const int64_t rows = most(1, wanted / width), groups = ceil_div(c.out_height, rows);
  return {0, 1, 0, ceil_div(c.out_height, groups)};
}

int64_t bf16x6_scratch_bytes(const Bf16x6Convolution& c, const Bf16x6Task& task) {
  const Layout at(c, task);
  return at.split_bytes() + at.sum_bytes() + at.where_bytes() + at.step_bytes();
}

void bf16x6_run(const Bf16x6Convolution& c, const Bf16x6Task& task, void* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  Run(c, task, scratch).all();
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
