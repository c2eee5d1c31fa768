#include "../../csrc/cuda/epilogue.h"

#include <torch/headeronly/util/Half.h>

#include "harness.h"

using namespace pysal::cuda;

namespace {
constexpr double kUpper = 0.75, kSlope = 0.2;

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double value(Activation activation, double x) {
  switch (activation) {
    case Activation::identity:
      return x;
    case Activation::relu:
      return std::fmin(std::fmax(x, 0), kUpper);
    case Activation::silu:
      return x * logistic(x);
    case Activation::hardswish:
      return x * std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Activation::gelu:
      return x * (1 + std::erf(x / std::sqrt(2.0))) / 2;
    case Activation::gelu_tanh:
      return x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2;
    case Activation::sigmoid:
      return logistic(x);
    case Activation::hardsigmoid:
      return std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Activation::leaky_relu:
      return x > 0 ? x : kSlope * x;
  }
  return 0;
}

double derivative(Activation activation, double x) {
  constexpr double kStep = 1e-6;  // of a central difference, whose error is of its square
  if (activation == Activation::relu) return x > 0 && x < kUpper;
  if (activation == Activation::leaky_relu) return x > 0 ? 1 : kSlope;
  return (value(activation, x + kStep) - value(activation, x - kStep)) / (2 * kStep);
}

double parameter_of(Activation activation) { return activation == Activation::relu ? kUpper : kSlope; }

// A bound on what rounding to the dtype, and a few roundings to float before it, make of numbers of this size.
template <class T>
double rounding(double size) {
  return (sizeof(T) == 8 ? 1e-9 : sizeof(T) == 4 ? 1e-6 : 2e-3) * (1 + std::fabs(size));
}

template <class T>
void forth_and_back(DType dtype, Activation activation, int64_t images, int64_t channels, int64_t pixels, bool last,
                    bool with_bias, bool with_shortcut, emu_test::Offsets offsets) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const bool gated = activation == Activation::relu || activation == Activation::leaky_relu;
  const bool smooth = !gated && activation != Activation::identity;
  const int64_t count = images * channels * pixels;
  const size_t n = static_cast<size_t>(count);
  const auto given = emu_test::random<T>(n + offsets.in), shortcut = emu_test::random<T>(n + offsets.out, 2);
  const auto bias = emu_test::random<A>(static_cast<size_t>(channels), 3);
  const auto x = emu_test::random<T>(n + offsets.in);
  const auto sums = emu_test::unwritten<T>(n + offsets.out);
  const std::unique_ptr<uint8_t[]> gates(new uint8_t[(n + 7) / 8]);
  T* const lies = x.get() + offsets.in;
  launch_epilogue(dtype,
                  {lies, with_bias ? bias.get() : nullptr, with_shortcut ? shortcut.get() + offsets.out : nullptr,
                   gated ? gates.get() : nullptr, smooth ? sums.get() + offsets.out : nullptr, count, channels, pixels,
                   last, activation, parameter_of(activation)},
                  nullptr);
  std::vector<double> rounded(n);
  for (size_t i = 0; i < n; ++i) {
    const size_t channel =
        last ? i % static_cast<size_t>(channels) : i / static_cast<size_t>(pixels) % static_cast<size_t>(channels);
    A sum = static_cast<A>(given[i + offsets.in]);
    if (with_bias) sum += bias[channel];
    if (with_shortcut) sum += static_cast<A>(shortcut[i + offsets.out]);
    rounded[i] = static_cast<double>(static_cast<T>(sum));
    const double expected = value(activation, static_cast<double>(sum)), found = static_cast<double>(lies[i]);
    EXPECT(std::fabs(found - expected) <= rounding<T>(expected), std::to_string(i));
    if (gated) {
      const bool gate = rounded[i] > 0 && (activation == Activation::leaky_relu || rounded[i] < kUpper);
      EXPECT((gates[i / 8] >> (i % 8) & 1) == gate, std::to_string(i));
    }
    if (smooth) EXPECT(static_cast<double>(sums[i + offsets.out]) == rounded[i], std::to_string(i));
  }
  for (int64_t times : {1, 3})
    for (int rule = 0; rule < (activation == Activation::relu ? 3 : 1); ++rule) {
      const size_t all = n * static_cast<size_t>(times);
      const auto before = emu_test::random<T>(all + offsets.in, 4), added = emu_test::random<T>(all + offsets.out, 5);
      const auto grad = emu_test::random<T>(all + offsets.in, 4);
      launch_epilogue_backward(
          dtype,
          {grad.get() + offsets.in, with_shortcut ? added.get() + offsets.out : nullptr, gated ? gates.get() : nullptr,
           smooth ? sums.get() + offsets.out : nullptr, count, times, activation, parameter_of(activation), rule},
          nullptr);
      for (size_t i = 0; i < all; ++i) {
        A total = static_cast<A>(before[i + offsets.in]);
        if (with_shortcut) total += static_cast<A>(added[i + offsets.out]);
        const double sum = rounded[i % n], g = static_cast<double>(total);
        double expected = g * derivative(activation, sum);
        if (rule == 1 && g <= 0) expected = 0;
        if (rule == 2) expected = g > 0 ? g : 0;
        EXPECT(std::fabs(static_cast<double>(grad[i + offsets.in]) - expected) <= rounding<T>(expected),
               std::to_string(i));
      }
    }
}

template <class T>
void of_dtype(DType dtype) {
  for (int kind = 0; kind < kActivations; ++kind) {
    const auto activation = static_cast<Activation>(kind);
    for (const emu_test::Offsets offsets : emu_test::kOffsets) {
      forth_and_back<T>(dtype, activation, 2, 16, 65, true, true, true, offsets);   // biases as words
      forth_and_back<T>(dtype, activation, 2, 5, 7, true, true, false, offsets);    // a part of a byte at the end
      forth_and_back<T>(dtype, activation, 2, 3, 129, false, true, true, offsets);  // bytes that cross channels
      forth_and_back<T>(dtype, activation, 1, 3, 3, false, false, false, offsets);
    }
  }
}
}  // namespace

CASE(epilogue_matches_its_formulas_float) { of_dtype<float>(DType::float32); }
CASE(epilogue_matches_its_formulas_double) { of_dtype<double>(DType::float64); }
CASE(epilogue_matches_its_formulas_half) { of_dtype<c10::Half>(DType::float16); }

CASE(epilogue_of_no_elements) {
  launch_epilogue(DType::float32, {nullptr, nullptr, nullptr, nullptr, nullptr, 0, 3, 0, true, Activation::relu, 6.0},
                  nullptr);
  launch_epilogue_backward(DType::float32, {nullptr, nullptr, nullptr, nullptr, 0, 0, Activation::relu, 6.0, 0},
                           nullptr);
}
