// Smooth activations and their derivatives, vector by vector. For the per-ISA kernels alone, like isa.h.
#pragma once
#include "activation_kernels.h"
#include "isa.h"

#if PYSAL_VECTOR_BYTES == 64
#include <immintrin.h>  // whose functions leave no symbols behind
#endif

namespace pysal::cpu {
namespace {
// e^x to 2 units in the last place: 2^n e^r with n the integer nearest to x / ln 2, and Taylor's series of e^r.
// Infinite from where float is, 0 below the normal numbers or below all; NaN comes through.
[[maybe_unused]] PYSAL_INLINE vfloat exponential(vfloat x) {
#if PYSAL_VECTOR_BYTES == 64          // which has instructions for the bounds, the nearest integer and the power of two
  constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own functions without a mask
  const __m512 least = _mm512_set1_ps(-104.0f), most = _mm512_set1_ps(89.0f);  // where it is 0 and infinite
  const vfloat within = (vfloat)_mm512_maskz_min_ps(
      kAll, most, _mm512_maskz_max_ps(kAll, least, (__m512)x));  // NaN comes through, as second
  const vfloat n = (vfloat)_mm512_maskz_roundscale_ps(kAll, (__m512)(within * 1.44269504f), 0);
  const vfloat r = (within - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, of which the first is exact
  vfloat series = broadcast(1.0f / 5040.0f);
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return (vfloat)_mm512_maskz_scalef_ps(kAll, (__m512)series, (__m512)n);
#else
  constexpr float kMost = 88.722839f, kLeast = -87.336544f;
  vfloat within = x > kMost ? broadcast(kMost) : x;
  within = within < kLeast ? broadcast(kLeast) : within;
  // added to a number of less than 2^22, it leaves the nearest integer in the lowest bits
  const vfloat shifter = broadcast(12582912.0f);
  const vfloat shifted = within * 1.44269504f + shifter, n = shifted - shifter;
  const vfloat r = (within - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, of which the first is exact
  vfloat series = broadcast(1.0f / 5040.0f);
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  // n may be 128, for which there is no power of two: half of it, and twice the result
  const vint half = reinterpret_cast<vint>(shifted) - 1;
  const vfloat scaled = reinterpret_cast<vfloat>(reinterpret_cast<vint>(series) + (half << 23)) * 2.0f;
  const vfloat bounded = x > kMost ? broadcast(__builtin_inff()) : (x < kLeast ? vfloat{} : scaled);
  return x == x ? bounded : x;
#endif
}

[[maybe_unused]] PYSAL_INLINE vfloat logistic(vfloat x) { return 1.0f / (1.0f + exponential(-x)); }
[[maybe_unused]] PYSAL_INLINE vfloat magnitude(vfloat x) { return x < vfloat{} ? -x : x; }

// Each has `value`, the activation, and `derivative`.
struct Identity {
  PYSAL_INLINE vfloat value(vfloat x) const { return x; }
  PYSAL_INLINE vfloat derivative(vfloat) const { return broadcast(1.0f); }
};

struct Silu {  // x s(x), s the logistic function
  PYSAL_INLINE vfloat value(vfloat x) const { return x / (1.0f + exponential(-x)); }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    const vfloat s = logistic(x);
    return s * (1.0f + x * (1.0f - s));
  }
};

struct Hardsigmoid {  // min(max(x + 3, 0), 6) / 6
  PYSAL_INLINE vfloat value(vfloat x) const {
    const vfloat raised = x + 3.0f, floored = raised < vfloat{} ? vfloat{} : raised;
    return (floored > 6.0f ? broadcast(6.0f) : floored) * (1.0f / 6.0f);
  }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    return ((x > -3.0f) & (x < 3.0f)) ? broadcast(1.0f / 6.0f) : vfloat{};
  }
};

struct Hardswish {  // x hardsigmoid(x)
  PYSAL_INLINE vfloat value(vfloat x) const { return x * Hardsigmoid{}.value(x); }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    const vfloat between = x * (1.0f / 3.0f) + 0.5f, above = x >= 3.0f ? broadcast(1.0f) : between;
    return x <= -3.0f ? vfloat{} : above;
  }
};

struct Sigmoid {
  PYSAL_INLINE vfloat value(vfloat x) const { return logistic(x); }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    const vfloat s = logistic(x);
    return s * (1.0f - s);
  }
};

struct Gelu {  // x P(x), P the normal distribution's function
  // `density` becomes that of the normal distribution. With z = |x| / sqrt(2) and t = 1 / (1 + 0.3275911 z) (Hastings
  // 1955), erfc(z) e^(z^2) is a polynomial in t to 6e-8 of itself, fitted here by least squares.
  PYSAL_INLINE vfloat distribution(vfloat x, vfloat& density) const {
    const vfloat z = magnitude(x) * 0.707106781f, t = 1.0f / (1.0f + z * 0.3275911f);
    const vfloat gauss = exponential(x * x * -0.5f);
    vfloat tail = broadcast(-0.144511998f);
    tail = tail * t + 0.511190951f;
    tail = tail * t - 0.431797415f;
    tail = tail * t + 0.478166074f;
    tail = tail * t + 0.0114780450f;
    tail = tail * t + 0.210426793f;
    tail = tail * t + 0.179937154f;
    tail = tail * t + 0.185110345f;
    tail = tail * t * gauss * 0.5f;
    density = gauss * 0.398942280f;
    return x < vfloat{} ? tail : 1.0f - tail;
  }
  PYSAL_INLINE vfloat value(vfloat x) const {
    vfloat density;
    return x * distribution(x, density);
  }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    vfloat density;
    const vfloat p = distribution(x, density);
    return p + x * density;
  }
};

struct GeluTanh {  // x (1 + tanh(u)) / 2 = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  PYSAL_INLINE vfloat twice(vfloat x) const { return x * (1.59576912f + x * x * 0.0713548162f); }
  PYSAL_INLINE vfloat value(vfloat x) const { return x / (1.0f + exponential(-twice(x))); }
  PYSAL_INLINE vfloat derivative(vfloat x) const {
    const vfloat s = logistic(twice(x));
    return s + x * s * (1.0f - s) * (1.59576912f + x * x * 0.214064449f);
  }
};

struct LeakyRelu {  // x above zero, slope x below
  float slope;
  PYSAL_INLINE vfloat value(vfloat x) const { return x > vfloat{} ? x : x * slope; }
  PYSAL_INLINE vfloat derivative(vfloat x) const { return x > vfloat{} ? broadcast(1.0f) : broadcast(slope); }
};

// Value and derivative at once.
template <class Function>
PYSAL_INLINE vfloat with_derivative(const Function& f, vfloat x, vfloat& derivative) {
  derivative = f.derivative(x);
  return f.value(x);
}
[[maybe_unused]] PYSAL_INLINE vfloat with_derivative(const Silu&, vfloat x, vfloat& derivative) {  // one division
  const vfloat s = logistic(x), value = x * s;
  derivative = s * (1.0f + x * (1.0f - s));
  return value;
}

template <class Run>
PYSAL_INLINE void with_function(Activation activation, float slope, const Run& run) {
  switch (activation) {
    case Activation::identity:
      return run(Identity{});
    case Activation::silu:
      return run(Silu{});
    case Activation::hardswish:
      return run(Hardswish{});
    case Activation::gelu:
      return run(Gelu{});
    case Activation::gelu_tanh:
      return run(GeluTanh{});
    case Activation::sigmoid:
      return run(Sigmoid{});
    case Activation::hardsigmoid:
      return run(Hardsigmoid{});
    case Activation::leaky_relu:
      return run(LeakyRelu{slope});
  }
}
}  // namespace
}  // namespace pysal::cpu
