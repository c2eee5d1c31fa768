// Smooth activations with the gates of squeeze-and-excitation: one pass over memory each, for the output, for the
// gradient in place, and for the sums over pixels that a gate is made from and that its own gradient is. Only the input
// is ever kept: it costs less to compute an exponential anew than to write it down.
#include "activation_kernels.h"

#include "smooth.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kTogether = 64;  // pixels whose sums are added to the whole at once: so they round like 64 numbers

// Calls vector(first) for whole vectors of [0, count), and last(first, n) for the n numbers that are left over.
template <class Vector, class Last>
PYSAL_INLINE void each_vector(int64_t count, const Vector& vector, const Last& last) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) vector(c);
  if (c < count) last(c, count - c);
}

PYSAL_INLINE vfloat load_some(const float* p, int64_t n) {
  vfloat v = {};
  __builtin_memcpy(&v, p, static_cast<unsigned long>(n) * sizeof(float));
  return v;
}
PYSAL_INLINE void store_some(float* p, vfloat v, int64_t n) {
  __builtin_memcpy(p, &v, static_cast<unsigned long>(n) * sizeof(float));
}

template <class Function>
void forward_of(const Function& f, const Activated& a, float* output) {
  for (int64_t pixel = 0; pixel < a.pixels; ++pixel) {
    const float* const x = a.input + pixel * a.channels;
    float* const y = output + pixel * a.channels;
    each_vector(
        a.channels,
        [&](int64_t c) {
          const vfloat value = f.value(load(x + c));
          store(y + c, a.gate ? value * load(a.gate + c) : value);
        },
        [&](int64_t c, int64_t n) {
          const vfloat value = f.value(load_some(x + c, n));
          store_some(y + c, a.gate ? value * load_some(a.gate + c, n) : value, n);
        });
  }
}

template <class Function>
void backward_of(const Function& f, const Activated& a, float* grad) {
  for (int64_t pixel = 0; pixel < a.pixels; ++pixel) {
    const float* const x = a.input + pixel * a.channels;
    float* const g = grad + pixel * a.channels;
    each_vector(
        a.channels,
        [&](int64_t c) {
          vfloat passed = load(g + c);
          if (a.gate) passed *= load(a.gate + c);
          if (a.added) passed += load(a.added + c);
          store(g + c, passed * f.derivative(load(x + c)));
        },
        [&](int64_t c, int64_t n) {
          vfloat passed = load_some(g + c, n);
          if (a.gate) passed *= load_some(a.gate + c, n);
          if (a.added) passed += load_some(a.added + c, n);
          store_some(g + c, passed * f.derivative(load_some(x + c, n)), n);
        });
  }
}

template <class Function>
void sums_of(const Function& f, const Activated& a, const float* grad, float* partial, float* sums) {
  for (int64_t c = 0; c < a.channels; ++c) sums[c] = 0.0f;  // no memset, which takes no null pointer for no channel
  for (int64_t first = 0; first < a.pixels; first += kTogether) {
    const int64_t end = first + kTogether < a.pixels ? first + kTogether : a.pixels;
    for (int64_t c = 0; c < a.channels; ++c) partial[c] = 0.0f;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const float* const x = a.input + pixel * a.channels;
      const float* const g = grad ? grad + pixel * a.channels : nullptr;
      each_vector(
          a.channels,
          [&](int64_t c) {
            const vfloat value = f.value(load(x + c));
            store(partial + c, load(partial + c) + (g ? value * load(g + c) : value));
          },
          [&](int64_t c, int64_t n) {
            const vfloat value = f.value(load_some(x + c, n));
            store_some(partial + c, load_some(partial + c, n) + (g ? value * load_some(g + c, n) : value), n);
          });
    }
    for (int64_t c = 0; c < a.channels; ++c) sums[c] += partial[c];
  }
}

void forward(const Activated& a, float* output) {
  with_function(a.activation, a.slope, [&](const auto& f) { forward_of(f, a, output); });
}
void backward(const Activated& a, float* grad) {
  with_function(a.activation, a.slope, [&](const auto& f) { backward_of(f, a, grad); });
}
void sums(const Activated& a, const float* grad, float* partial, float* sums) {
  with_function(a.activation, a.slope, [&](const auto& f) { sums_of(f, a, grad, partial, sums); });
}
}  // namespace

PYSAL_TABLE(ActivationKernels, activation) = {forward, backward, sums};
}  // namespace pysal::cpu
