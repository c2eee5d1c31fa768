// Inverted residual blocks with smooth activations, and squeeze-and-excitation between their halves. The first half
// runs row by row as inverted_residual does: what the first 1 x 1 convolution makes stays in a ring in the second-level
// cache. What reaches memory is what the depthwise convolution gives, the sums of its activation that the gates are
// made of, and, past the caches, the derivative of the first activation. The second half multiplies activation and
// gates on the way into the last 1 x 1 convolution. Backward, one pass gives the gradient of the gates, one that of the
// input. Where rows are short, several are multiplied at once: large matrices come from beyond the second-level cache.
// Work split: the caller gives each task rows or pixels of one image. Rows that two tasks need are computed by both,
// and the derivatives of each are written by one.
#include "smooth_residual_kernels.h"

#include "depthwise.h"
#include "smooth.h"

#if PYSAL_VECTOR_BYTES >= 32
#include <immintrin.h>  // whose functions leave no symbols behind
#endif

namespace pysal::cpu {
namespace {
void zero(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;  // no memset, which takes no null pointer for nothing
}

void times(const float* factors, int64_t count, float* numbers) {
  for (int64_t i = 0; i < count; i += kLanes) store(numbers + i, load(numbers + i) * load(factors + i));
}

// Stores what is next read in another pass; the address is a multiple of the vector's size.
PYSAL_INLINE void store_past_caches(float* p, vfloat v) {
#if PYSAL_VECTOR_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__) && PYSAL_VECTOR_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

// Values to `to`, which may be `from`; derivatives to `slopes` unless that is null.
__attribute__((noinline)) void activate(Activation kind, float slope, const float* from, int64_t count, float* to,
                                        float* slopes) {
  with_function(kind, slope, [&](const auto& f) {
    for (int64_t i = 0; i < count; i += kLanes) {
      vfloat derivative;
      const vfloat value = with_derivative(f, load(from + i), derivative);
      store(to + i, value);
      if (slopes) store_past_caches(slopes + i, derivative);
    }
  });
}

// (grad gate + added) f'(from), for pixels of `pitch` numbers; gate and added may be null, `to` may be grad.
__attribute__((noinline)) void pull_back(Activation kind, float slope, const float* from, const float* gate,
                                         const float* added, const float* grad, int64_t pixels, int64_t pitch,
                                         float* to) {
  with_function(kind, slope, [&](const auto& f) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < pitch; c += kLanes) {
        vfloat passed = load(grad + p * pitch + c);
        if (gate) passed *= load(gate + c);
        if (added) passed += load(added + c);
        store(to + p * pitch + c, passed * f.derivative(load(from + p * pitch + c)));
      }
  });
}

// f(from) gate, likewise.
__attribute__((noinline)) void activate_gated(Activation kind, float slope, const float* from, const float* gate,
                                              int64_t pixels, int64_t pitch, float* to) {
  with_function(kind, slope, [&](const auto& f) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < pitch; c += kLanes) {
        const vfloat value = f.value(load(from + p * pitch + c));
        store(to + p * pitch + c, gate ? value * load(gate + c) : value);
      }
  });
}

// Sums over pixels of f(from), times others where those are not null.
__attribute__((noinline)) void sums_of(Activation kind, float slope, const float* from, const float* times,
                                       int64_t pixels, int64_t pitch, float* sums) {
  zero(sums, pitch);
  with_function(kind, slope, [&](const auto& f) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < pitch; c += kLanes) {
        const vfloat value = f.value(load(from + p * pitch + c));
        store(sums + c, load(sums + c) + (times ? value * load(times + p * pitch + c) : value));
      }
  });
}

int64_t slot_of(const SmoothResidual& b, const Margins& margins) {
  return (margins.before + b.in_width + margins.after) * b.pitch;
}

// Zeros where nothing is written but the windows read: the columns beside each row, and what is beyond the channels.
void clear(const SmoothResidual& b, const Margins& margins, float* scratch, int64_t floats) {
  const int64_t slot = slot_of(b, margins);
  if (b.pitch != b.channels) return zero(scratch, floats);
  for (int64_t i = 0; i < slots(b); ++i) {
    zero(scratch + i * slot, margins.before * b.pitch);
    zero(scratch + (i + 1) * slot - margins.after * b.pitch, margins.after * b.pitch);
  }
}

int64_t scratch_floats(const SmoothResidual& b, bool forward) {
  const int64_t ring = slots(b) * slot_of(b, Margins(b, forward)), stage = together(b.in_width) * b.in_width * b.pitch;
  return ring + stage + (forward ? 1 : together(b.out_width)) * b.out_width * b.pitch;
}

void enter(const SmoothResidual& b, int64_t image, int64_t begin, int64_t end, float* scratch) {
  const Margins margins(b, true);
  const int64_t pitch = b.pitch, slot = slot_of(b, margins), wide = b.in_width * pitch, out_wide = b.out_width * pitch;
  float* const stage = scratch + slots(b) * slot;
  float* const combined = stage + together(b.in_width) * wide;
  clear(b, margins, scratch, scratch_floats(b, true));
  const auto ring = [&](int64_t row) { return scratch + row % slots(b) * slot; };
  // the rows whose derivatives are written here: up to what the next task begins with
  const int64_t own_begin = begin == 0 ? 0 : first_row<true>(b, begin);
  const int64_t own_end = end == b.out_height ? b.in_height : least(first_row<true>(b, end), b.in_height);
  int64_t next = first_row<true>(b, begin);
  const auto fill = [&] {
    const int64_t count = least(together(b.in_width), b.in_height - next), at = image * b.in_height + next;
    if (b.expand) {
      const Add add{b.expand_bias, nullptr, stage, pitch};
      multiply(b.input + at * b.in_width * b.first_channels, b.first_channels, count * b.in_width, b.first_channels,
               b.expand, b.channels, add);
    }
    for (int64_t i = 0; i < count; ++i, ++next) {
      float* const target = ring(next) + margins.before * pitch;
      const bool own = next >= own_begin && next < own_end;
      if (b.expand)
        activate(b.first, b.first_slope, stage + i * wide, wide, target,
                 own ? b.first_slopes + (at + i) * wide : nullptr);
      else
        __builtin_memcpy(target, b.input + (at + i) * wide, sizeof(float) * wide);
    }
  };
  Windows seen;
  for (int64_t y = begin; y < end; ++y) {
    const int64_t last = least(last_row<true>(b, y), b.in_height - 1), out = image * b.out_height + y;
    while (next <= last) fill();
    look<true>(b, margins, y, 0, ring, pitch, seen);
    const Add add{b.depthwise_bias, nullptr, combined, pitch};
    combine(seen, pitch, b.column_stride * pitch, b.out_width, add);
    // in the order of memory, which tiles do not keep
    __builtin_memcpy(b.middle + out * out_wide, combined, sizeof(float) * out_wide);
    if (b.sums) sums_of(b.second, b.second_slope, combined, nullptr, b.out_width, pitch, b.sums + out * pitch);
  }
  // rows that no window reaches have derivatives, too
  while (b.expand && next < own_end) fill();
#if defined(__SSE2__)
  __builtin_ia32_sfence();  // before others read what went past the caches
#endif
}

void leave(const SmoothResidual& b, int64_t image, int64_t first, int64_t count, float* scratch) {
  const int64_t at = image * b.out_height * b.out_width + first, out = at * b.last_channels;
  activate_gated(b.second, b.second_slope, b.middle + at * b.pitch, b.gate ? b.gate + image * b.pitch : nullptr, count,
                 b.pitch, scratch);
  const Add add{b.project_bias, b.onto ? b.onto + out : nullptr, b.output + out, b.last_channels};
  multiply(scratch, b.pitch, count, b.channels, b.project, b.last_channels, add);
}

void gate_sums(const SmoothResidual& b, int64_t row, int64_t first, int64_t count, float* sums) {
  const int64_t pixels = b.in_height * b.in_width;
  float* const passed = b.passed + (row * pixels + first) * b.pitch;
  if (b.pitch != b.channels) zero(passed, count * b.pitch);
  const Keep keep{passed, b.pitch};
  multiply(b.grad + (row * pixels + first) * b.last_channels, b.last_channels, count, b.last_channels,
           b.project_transposed, b.channels, keep);
  sums_of(b.second, b.second_slope, b.middle + (row % b.images * pixels + first) * b.pitch, passed, count, b.pitch,
          sums);
}

void backward(const SmoothResidual& b, int64_t row, int64_t begin, int64_t end, float* scratch) {
  const Margins margins(b, false);
  const int64_t pitch = b.pitch, slot = slot_of(b, margins), image = row % b.images, wide = b.in_width * pitch;
  const int64_t at_once = together(b.out_width), out_wide = b.out_width * pitch;
  float* const stage = scratch + slots(b) * slot;
  float* const combined = stage + together(b.in_width) * wide;
  clear(b, margins, scratch, scratch_floats(b, false));
  const auto ring = [&](int64_t y) { return scratch + y % slots(b) * slot; };
  int64_t next = first_row<false>(b, begin);
  const auto fill = [&] {
    const int64_t count = least(together(b.in_width), b.in_height - next), at = row * b.in_height + next;
    const float* const passed = b.passed ? b.passed + at * wide : stage;
    if (!b.passed) {
      const Keep keep{stage, pitch};
      multiply(b.grad + at * b.in_width * b.last_channels, b.last_channels, count * b.in_width, b.last_channels,
               b.project_transposed, b.channels, keep);
    }
    for (int64_t i = 0; i < count; ++i, ++next)
      pull_back(b.second, b.second_slope, b.middle + (image * b.in_height + next) * wide,
                b.gate ? b.gate + image * pitch : nullptr, b.added ? b.added + row * pitch : nullptr, passed + i * wide,
                b.in_width, pitch, ring(next) + margins.before * pitch);
  };
  Windows seen;
  for (int64_t top = begin; top < end; top += at_once) {
    const int64_t count = least(at_once, end - top), out = (row * b.out_height + top) * b.out_width * b.first_channels;
    const float* const onto = b.onto ? b.onto + out : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = top + i, last = least(last_row<false>(b, y), b.in_height - 1);
      while (next <= last) fill();
      const int64_t phases = least(b.column_stride, b.out_width);  // the columns that see the same taps
      for (int64_t phase = 0; phase < phases; ++phase) {
        look<false>(b, margins, y, phase, ring, pitch, seen);
        const int64_t from = i * out_wide + phase * pitch, apart = b.column_stride * pitch;
        const int64_t pixels = (b.out_width - phase - 1) / b.column_stride + 1;
        if (b.first_slopes) {
          combine(seen, pitch, pitch, pixels, Keep{combined + from, apart});
        } else {
          combine(seen, pitch, pitch, pixels, Add{nullptr, onto ? onto + from : nullptr, b.output + out + from, apart});
        }
      }
    }
    if (!b.first_slopes) continue;
    times(b.first_slopes + (image * b.out_height + top) * out_wide, count * out_wide, combined);
    const Add add{nullptr, onto, b.output + out, b.first_channels};
    multiply(combined, pitch, count * b.out_width, b.channels, b.expand_transposed, b.first_channels, add);
  }
}
}  // namespace

PYSAL_TABLE(SmoothResidualKernels, smooth_residual) = {scratch_floats, enter, leave, gate_sums, backward};
}  // namespace pysal::cpu
