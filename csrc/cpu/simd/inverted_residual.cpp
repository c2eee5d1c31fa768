// Inverted residual blocks row by row. The maps in between have many times the channels of input and output: written to
// memory and read again they cost more than the arithmetic. Here the rows that a depthwise kernel sees wait in a ring
// in the second-level cache, row r in slot r % kernel_height, between columns of zeros that stand for the padding; each
// output row is combined from them into a row buffer, and that is multiplied into the output. What reaches memory of
// the maps in between is a bit per element. Work split: the caller gives each task rows of one image. Rows that two
// tasks need are computed by both, and the gates of each row are written by one.
#include "inverted_residual_kernels.h"

#include "depthwise.h"
#include "gates.h"

namespace pysal::cpu {
namespace {
// What becomes of sums, as multiply.h says.
struct Gate {  // forward: min(max(sum + bias, 0), upper), and its gates
  const float* bias;
  vfloat upper, bound;
  float* out;
  uint8_t* gates;
  int64_t pitch;  // from one pixel to the next

  template <int kCount>
  PYSAL_INLINE void finish(const vfloat* sums, int64_t at, int64_t column, int64_t /*next*/) const {
    uint32_t bits = 0;
    for (int v = 0; v < kCount; ++v) {
      const vfloat zero = {}, x = sums[v] + load(bias + column + v * kLanes);
      const vfloat floored = zero > x ? zero : x;  // comparisons with NaN are false, so it comes through
      store(out + at + v * kLanes, floored > upper ? upper : floored);
      bits |= gates_of(x, bound) << (v * kLanes);
    }
    __builtin_memcpy(gates + (at >> 3), &bits, kCount * kLanes / 8);
  }
};

struct Mask {  // backward: what the rule lets pass
  const uint8_t* gates;
  float* out;
  int64_t pitch;
  int any_gate, any_sign;  // -1 where the rule does not ask

  template <int kCount>
  PYSAL_INLINE void finish(const vfloat* sums, int64_t at, int64_t /*column*/, int64_t /*next*/) const {
    uint32_t bits = 0;
    __builtin_memcpy(&bits, gates + (at >> 3), kCount * kLanes / 8);
    bits |= static_cast<uint32_t>(any_gate);
    for (int v = 0; v < kCount; ++v) store(out + at + v * kLanes, passed(sums[v], bits >> (v * kLanes), any_sign));
  }
};

int64_t scratch_floats(const InvertedResidual& b, bool forward) {
  const Margins margins(b, forward);
  const int64_t ring = b.kernel_height * (margins.before + b.in_width + margins.after);
  return (ring + b.out_width + ceil_div(b.in_width, 32)) * b.channels;
}

template <bool kForward>
void run_rows(const InvertedResidual& b, int64_t image, int64_t begin, int64_t end, float* scratch) {
  const Margins margins(b, kForward);
  const int64_t channels = b.channels, taps_down = b.kernel_height;
  const int64_t slot = (margins.before + b.in_width + margins.after) * channels;
  float* const row_buffer = scratch + taps_down * slot;
  uint8_t* const unwanted = reinterpret_cast<uint8_t*>(row_buffer + b.out_width * channels);
  const auto ring = [&](int64_t row) { return scratch + row % taps_down * slot; };
  for (int64_t i = 0; i < taps_down; ++i) {
    __builtin_memset(ring(i), 0, sizeof(float) * margins.before * channels);
    __builtin_memset(ring(i) + slot - margins.after * channels, 0, sizeof(float) * margins.after * channels);
  }
  const int64_t gates_image = image % b.images;
  const int any_gate = b.rule == 2 ? -1 : 0, any_sign = b.rule == 0 ? -1 : 0;
  // whose gates are written here: up to what the next task begins with
  const int64_t own_begin = begin == 0 ? 0 : first_row<kForward>(b, begin);
  const int64_t own_end = end == b.out_height ? b.in_height : least(first_row<kForward>(b, end), b.in_height);
  const auto enter = [&](int64_t row) {
    const float* const source = b.input + (image * b.in_height + row) * b.in_width * b.in_channels;
    float* const target = ring(row) + margins.before * channels;
    const int64_t at = (gates_image * b.in_height + row) * b.in_width * channels / 8;
    if (!kForward) {
      const Mask mask{b.depthwise_gates + at, target, channels, any_gate, any_sign};
      multiply(source, b.in_channels, b.in_width, b.in_channels, b.enter, channels, mask);
    } else if (b.expands) {
      uint8_t* const gates = row >= own_begin && row < own_end ? b.enter_gates + at : unwanted;
      const Gate gate{b.enter_bias, broadcast(b.enter_upper), broadcast(gate_bound(b.enter_upper)), target, gates,
                      channels};
      multiply(source, b.in_channels, b.in_width, b.in_channels, b.enter, channels, gate);
    } else {
      __builtin_memcpy(target, source, sizeof(float) * b.in_width * channels);
    }
  };
  Windows seen;
  int64_t next = first_row<kForward>(b, begin);
  for (int64_t y = begin; y < end; ++y) {
    for (const int64_t last = least(last_row<kForward>(b, y), b.in_height - 1); next <= last; ++next) enter(next);
    const int64_t out_row = (image * b.out_height + y) * b.out_width * b.out_channels;
    const float* const added = b.added ? b.added + out_row : nullptr;
    const int64_t at = (gates_image * b.out_height + y) * b.out_width * channels / 8;
    // a phase: the columns that see the same taps
    const int64_t phases = kForward ? 1 : least(b.column_stride, b.out_width);
    for (int64_t phase = 0; phase < phases; ++phase) {
      look<kForward>(b, margins, y, phase, ring, channels, seen);
      if (kForward) {
        const Gate gate{b.depthwise_bias, broadcast(b.depthwise_upper), broadcast(gate_bound(b.depthwise_upper)),
                        row_buffer,       b.depthwise_gates + at,       channels};
        combine(seen, channels, b.column_stride * channels, b.out_width, gate);
        continue;
      }
      const int64_t pitch = b.column_stride * channels, pixels = (b.out_width - phase - 1) / b.column_stride + 1;
      const int64_t from = phase * channels;
      if (b.expands) {
        const Mask mask{b.enter_gates + at + from / 8, row_buffer + from, pitch, any_gate, any_sign};
        combine(seen, channels, channels, pixels, mask);
      } else {
        const Add add{nullptr, added ? added + from : nullptr, b.output + out_row + from, pitch};
        combine(seen, channels, channels, pixels, add);
      }
    }
    if (!kForward && !b.expands) continue;
    const Add add{b.leave_bias, added, b.output + out_row, b.out_channels};
    multiply(row_buffer, channels, b.out_width, channels, b.leave, b.out_channels, add);
  }
  // rows that no window reaches have gates, too
  for (; kForward && b.expands && next < own_end; ++next) enter(next);
}
}  // namespace

PYSAL_TABLE(InvertedResidualKernels, inverted_residual) = {scratch_floats, run_rows<true>, run_rows<false>};
}  // namespace pysal::cpu
