// Attention and its gradient, a head at a time. Some queries' weights at once stay in the second-level cache; backward
// they are computed anew, which takes less time than to read them from memory.
#include "attention_kernels.h"

#include "multiply.h"
#include "smooth.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kQueries = 56;  // at once: a multiple of the tiles' pixels

int64_t in_panels(int64_t count) { return ceil_div(count, kPanel) * kPanel; }

// Rows (rows, width) as the panels of their transpose, (rows in panels, width, 16): columns are rows. The last panel
// holds the last 16, as multiply wants it.
void pack_transposed(const float* from, int64_t step, int64_t rows, int64_t width, float* to) {
  for (int64_t first = 0; first < rows; first += kPanel, to += width * kPanel) {
    const float* const some = from + least(first, rows - kPanel) * step;
    for (int64_t k = 0; k < width; ++k)
      for (int64_t j = 0; j < kPanel; ++j) to[k * kPanel + j] = some[j * step + k];
  }
}

// Rows (rows, width) in panels of their columns, (width / 16, rows, 16).
void pack(const float* from, int64_t step, int64_t rows, int64_t width, float* to) {
  for (int64_t first = 0; first < width; first += kPanel, to += rows * kPanel)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < kPanel; j += kLanes) store(to + row * kPanel + j, load(from + row * step + first + j));
}

// Both halve a vector again and again: one lane after the other would wait for the last one each time.
PYSAL_INLINE float sum_of(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}
PYSAL_INLINE float largest_of(vfloat v) {  // NaN may be lost: it comes through the sum
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t k = 0; k < half; ++k) lanes[k] = lanes[k + half] > lanes[k] ? lanes[k + half] : lanes[k];
  return lanes[0];
}

struct Onto {  // sums added to what is there
  float* out;
  int64_t pitch;

  template <int kCount>
  PYSAL_INLINE void finish(const vfloat* sums, int64_t at, int64_t /*column*/, int64_t next) const {
    for (int v = 0; v < kCount; ++v) store(out + at + v * next, load(out + at + v * next) + sums[v]);
  }
};

// The weights of some queries: softmax(scale Q K^T + bias) by rows, `pitch` numbers apart, zero beyond the keys.
void weigh(const Attention& a, int64_t first, int64_t count, const float* keys, float* weights, int64_t pitch) {
  multiply(a.query + first * a.query_step, a.query_step, count, a.width, keys, a.keys, Keep{weights, pitch});
  const float factor = a.bias ? 1.0f : a.scale;  // left for after the subtraction of the largest
  float peaks[kQueries], inverses[kQueries];
  // one step for all rows after the other: a row's steps wait for each other
  for (int64_t i = 0; i < count; ++i) {
    float* const row = weights + i * pitch;
    for (int64_t j = a.keys; j < pitch; ++j) row[j] = a.bias ? 0.0f : -__builtin_inff();
    const float* const bias = a.bias ? a.bias + (first + i) * pitch : nullptr;
    vfloat most = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < pitch; j += kLanes) {
      vfloat x = load(row + j);
      if (bias) {
        x = x * a.scale + load(bias + j);
        store(row + j, x);
      }
      most = x > most ? x : most;
    }
    peaks[i] = largest_of(most);
  }
  for (int64_t i = 0; i < count; ++i) {
    float* const row = weights + i * pitch;
    const float peak = peaks[i];
    vfloat total = {};
    for (int64_t j = 0; j < pitch; j += kLanes) {
      const vfloat e = exponential((load(row + j) - peak) * factor);
      store(row + j, e);
      total += e;
    }
    inverses[i] = 1.0f / sum_of(total);
  }
  for (int64_t i = 0; i < count; ++i) {
    float* const row = weights + i * pitch;
    const float inverse = inverses[i];
    for (int64_t j = 0; j < pitch; j += kLanes) store(row + j, load(row + j) * inverse);
  }
}

int64_t scratch_floats(const Attention& a, bool forward) {
  const int64_t pitch = in_panels(a.keys), both = a.width + a.value_width, block = kQueries * pitch;
  return forward ? pitch * both + block : pitch * (both + a.width) + 2 * block + kQueries * both;
}

void forward(const Attention& a, float* scratch) {
  const int64_t pitch = in_panels(a.keys);
  float *const keys = scratch, *const values = keys + pitch * a.width, *const weights = values + pitch * a.value_width;
  pack_transposed(a.key, a.key_step, a.keys, a.width, keys);
  pack(a.value, a.value_step, a.keys, a.value_width, values);
  for (int64_t first = 0; first < a.queries; first += kQueries) {
    const int64_t count = least(kQueries, a.queries - first);
    weigh(a, first, count, keys, weights, pitch);
    multiply(weights, pitch, count, a.keys, values, a.value_width,
             Keep{a.output + first * a.output_step, a.output_step});
  }
}

// With weights P, S before the softmax and O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - the row's sum of P dP),
// dQ = scale dS K, dK = scale dS^T Q.
void backward(const Attention& a, float* scratch) {
  const int64_t pitch = in_panels(a.keys), rows = pitch * a.width;
  float *const keys = scratch, *const values = keys + rows, *const key_columns = values + pitch * a.value_width;
  float *const weights = key_columns + rows, *const grads = weights + kQueries * pitch;
  float *const query_columns = grads + kQueries * pitch, *const grad_columns = query_columns + kQueries * a.width;
  pack_transposed(a.key, a.key_step, a.keys, a.width, keys);
  pack_transposed(a.value, a.value_step, a.keys, a.value_width, values);
  pack(a.key, a.key_step, a.keys, a.width, key_columns);
  for (int64_t first = 0; first < a.queries; first += kQueries) {
    const int64_t count = least(kQueries, a.queries - first);
    const float* const grad = a.grad + first * a.grad_step;
    weigh(a, first, count, keys, weights, pitch);
    pack(grad, a.grad_step, count, a.value_width, grad_columns);
    pack(a.query + first * a.query_step, a.query_step, count, a.width, query_columns);
    multiply<true>(weights, pitch, a.keys, count, grad_columns, a.value_width, Onto{a.value_grad, a.value_grad_step});
    multiply(grad, a.grad_step, count, a.value_width, values, a.keys, Keep{grads, pitch});
    for (int64_t i = 0; i < count; ++i) {
      const float* const p = weights + i * pitch;
      float* const g = grads + i * pitch;
      for (int64_t j = a.keys; j < pitch; ++j) g[j] = 0.0f;
      vfloat total = {};
      for (int64_t j = 0; j < pitch; j += kLanes) total += load(p + j) * load(g + j);
      const float mean = sum_of(total);
      for (int64_t j = 0; j < pitch; j += kLanes) store(g + j, load(p + j) * (load(g + j) - mean) * a.scale);
    }
    multiply(grads, pitch, count, a.keys, key_columns, a.width,
             Keep{a.query_grad + first * a.query_grad_step, a.query_grad_step});
    multiply<true>(grads, pitch, a.keys, count, query_columns, a.width, Onto{a.key_grad, a.key_grad_step});
  }
}
}  // namespace

PYSAL_TABLE(AttentionKernels, attention) = {scratch_floats, forward, backward};
}  // namespace pysal::cpu
