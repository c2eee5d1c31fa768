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
  const int64_t ring = slots(b) * (margins.before + b.in_width + margins.after);
  const int64_t entering = together(b.in_width) * b.in_width, leaving = together(b.out_width) * b.out_width;
  return (ring + entering + leaving + ceil_div(entering, 32)) * b.channels;
}

template <bool kForward>
void run_rows(const InvertedResidual& b, int64_t image, int64_t begin, int64_t end, float* scratch) {
  const Margins margins(b, kForward);
  const int64_t channels = b.channels, in_wide = b.in_width * channels, out_wide = b.out_width * channels;
  const int64_t slot = margins.before * channels + in_wide + margins.after * channels;
  float* const stage = scratch + slots(b) * slot;
  float* const combined = stage + together(b.in_width) * in_wide;
  uint8_t* const apart = reinterpret_cast<uint8_t*>(combined + together(b.out_width) * out_wide);  // gates
  const auto ring = [&](int64_t row) { return scratch + row % slots(b) * slot; };
  for (int64_t i = 0; i < slots(b); ++i) {
    __builtin_memset(ring(i), 0, sizeof(float) * margins.before * channels);
    __builtin_memset(ring(i) + slot - margins.after * channels, 0, sizeof(float) * margins.after * channels);
  }
  const int64_t gates_image = image % b.images;
  const int any_gate = b.rule == 2 ? -1 : 0, any_sign = b.rule == 0 ? -1 : 0;
  // whose gates are written here: up to what the next task begins with
  const int64_t own_begin = begin == 0 ? 0 : first_row<kForward>(b, begin);
  const int64_t own_end = end == b.out_height ? b.in_height : least(first_row<kForward>(b, end), b.in_height);
  int64_t next = first_row<kForward>(b, begin);
  const auto enter = [&] {
    const int64_t count = least(together(b.in_width), b.in_height - next), pixels = count * b.in_width;
    const float* const source = b.input + (image * b.in_height + next) * b.in_width * b.in_channels;
    // a single row goes where it belongs
    float* const target = count == 1 ? ring(next) + margins.before * channels : stage;
    const float* made = target;
    const int64_t at = (gates_image * b.in_height + next) * in_wide / 8;
    if (!kForward) {
      const Mask mask{b.depthwise_gates + at, target, channels, any_gate, any_sign};
      multiply(source, b.in_channels, pixels, b.in_channels, b.enter, channels, mask);
    } else if (b.expands) {
      const int64_t from = most(own_begin - next, 0), to = least(own_end - next, count);  // of these rows
      uint8_t* const gates = from == 0 && to == count ? b.enter_gates + at : apart;
      const Gate gate{b.enter_bias, broadcast(b.enter_upper), broadcast(gate_bound(b.enter_upper)), target, gates,
                      channels};
      multiply(source, b.in_channels, pixels, b.in_channels, b.enter, channels, gate);
      if (gates == apart && from < to)
        __builtin_memcpy(b.enter_gates + at + from * in_wide / 8, apart + from * in_wide / 8,
                         (to - from) * in_wide / 8);
    } else {
      made = source;
    }
    for (int64_t i = 0; i < count; ++i, ++next)
      if (made != ring(next) + margins.before * channels)
        __builtin_memcpy(ring(next) + margins.before * channels, made + i * in_wide, sizeof(float) * in_wide);
  };
  Windows seen;
  const int64_t at_once = together(b.out_width);
  for (int64_t top = begin; top < end; top += at_once) {
    const int64_t count = least(at_once, end - top);
    const int64_t out = (image * b.out_height + top) * b.out_width * b.out_channels;
    const float* const added = b.added ? b.added + out : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = top + i, last = least(last_row<kForward>(b, y), b.in_height - 1);
      while (next <= last) enter();
      float* const row_buffer = combined + i * out_wide;
      const int64_t at = (gates_image * b.out_height + y) * out_wide / 8;
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
          const int64_t here = i * out_wide + from;
          const Add add{nullptr, added ? added + here : nullptr, b.output + out + here, pitch};
          combine(seen, channels, channels, pixels, add);
        }
      }
    }
    if (!kForward && !b.expands) continue;
    const Add add{b.leave_bias, added, b.output + out, b.out_channels};
    multiply(combined, channels, count * b.out_width, channels, b.leave, b.out_channels, add);
  }
  // rows that no window reaches have gates, too
  while (kForward && b.expands && next < own_end) enter();
}
}  // namespace

PYSAL_TABLE(InvertedResidualKernels, inverted_residual) = {scratch_floats, run_rows<true>, run_rows<false>};
}  // namespace pysal::cpu
