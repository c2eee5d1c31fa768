#include "../../csrc/cuda/path_integral.h"

#include <torch/headeronly/util/Half.h>

#include <vector>

#include "harness.h"

using namespace pysal::cuda;

namespace {
// rows 1, 3 and 5 lie outside a batch of 3; the last of the 37 makes a second ballot
constexpr size_t kRows = 37, kBatch = 3;
const std::vector<int32_t> kImages = [] {
  std::vector<int32_t> rows(kRows);
  for (size_t n = 0; n < kRows; ++n) rows[n] = static_cast<int32_t>(n % 7 < 4 ? 2 : n % 2);
  rows[1] = -1;
  rows[3] = 3;
  rows[5] = 0x7fffffff;
  return rows;
}();
bool inside(size_t n) { return kImages[n] >= 0 && kImages[n] < static_cast<int32_t>(kBatch); }

struct Shape {
  size_t channels, pixels;
  size_t size() const { return channels * pixels; }
  size_t at(bool last, size_t c, size_t p) const { return last ? p * channels + c : c * pixels + p; }
};

template <class T>
double value(const std::unique_ptr<T[]>& values, size_t i) {
  return static_cast<double>(values[i]);
}

// Calls body(c, p) for every element of an image.
template <class Body>
void each(Shape shape, Body body) {
  for (size_t c = 0; c < shape.channels; ++c)
    for (size_t p = 0; p < shape.pixels; ++p) body(c, p);
}

// eps: of the totals' dtype or the target's, whichever rounds more
template <class S, class T>
void points(DType source, DType target, Shape shape, bool source_last, bool out_last, emu_test::Offsets offsets,
            double eps) {
  const size_t size = shape.size();
  const auto x = emu_test::random<S>(kBatch * size + offsets.in),
             b = emu_test::random<S>(kBatch * size + offsets.in, 2);
  const auto alphas = emu_test::random<double>(kRows, 3);
  const auto out = emu_test::unwritten<T>(kRows * size + offsets.out);
  launch_path_points(
      source, target,
      {x.get() + offsets.in, b.get() + offsets.in, source_last, kImages.data(), alphas.get(), out.get() + offsets.out,
       out_last, kBatch, kRows, static_cast<int64_t>(shape.channels), static_cast<int64_t>(shape.pixels)},
      nullptr);
  for (size_t n = 0; n < kRows; ++n)
    each(shape, [&](size_t c, size_t p) {
      const double got = value(out, n * size + shape.at(out_last, c, p) + offsets.out);
      if (!inside(n)) return EXPECT(std::isnan(got), std::to_string(n));
      const size_t i = static_cast<size_t>(kImages[n]) * size + shape.at(source_last, c, p) + offsets.in;
      const double expected = value(b, i) + alphas[n] * (value(x, i) - value(b, i));
      EXPECT(std::abs(got - expected) <= 8 * eps, std::to_string(n));
    });
}

template <class A, class G>
void sums(DType total, DType gradient, Shape shape, int lasts, bool with_factors, emu_test::Offsets offsets,
          double eps) {
  const size_t size = shape.size();
  const bool totals_last = lasts & 1, gradients_last = lasts & 2, factors_last = lasts & 4;
  const auto totals = emu_test::random<A>(kBatch * size + offsets.out);
  const auto before = emu_test::random<A>(kBatch * size + offsets.out);
  const auto g = emu_test::random<G>(kRows * size + offsets.in, 2);
  const auto f = emu_test::random<float>(kRows * size + offsets.in, 3);
  const auto weights = emu_test::random<double>(kRows, 4);
  launch_path_accumulate(
      total, gradient,
      {totals.get() + offsets.out, g.get() + offsets.in, with_factors ? f.get() + offsets.in : nullptr, DType::float32,
       totals_last, gradients_last, factors_last, kImages.data(), weights.get(), kBatch, kRows,
       static_cast<int64_t>(shape.channels), static_cast<int64_t>(shape.pixels)},
      nullptr);
  for (size_t b = 0; b < kBatch; ++b)
    each(shape, [&](size_t c, size_t p) {
      const size_t at = b * size + shape.at(totals_last, c, p) + offsets.out;
      double expected = value(before, at);
      for (size_t n = 0; n < kRows; ++n)
        if (kImages[n] == static_cast<int32_t>(b))
          expected += weights[n] * value(g, n * size + shape.at(gradients_last, c, p) + offsets.in) *
                      (with_factors ? value(f, n * size + shape.at(factors_last, c, p) + offsets.in) : 1.0);
      EXPECT(std::abs(value(totals, at) - expected) <= eps * kRows * kRows, std::to_string(b));
    });
}

template <class A, class S>
void moments(DType total, DType sample, Shape shape, bool totals_last, bool samples_last, emu_test::Offsets offsets,
             double eps) {
  const size_t size = shape.size();
  const auto mean = emu_test::random<A>(kBatch * size + offsets.out),
             before = emu_test::random<A>(kBatch * size + offsets.out);
  const auto squares = emu_test::random<A>(kBatch * size + offsets.out, 2);
  const auto squares_before = emu_test::random<A>(kBatch * size + offsets.out, 2);
  const auto samples = emu_test::random<S>(kRows * size + offsets.in, 3);
  const std::unique_ptr<int64_t[]> counts(new int64_t[kBatch]{4, 0, 7});
  const int64_t taken[kBatch] = {4, 0, 7};
  launch_path_moments(total, sample,
                      {mean.get() + offsets.out, squares.get() + offsets.out, counts.get(), samples.get() + offsets.in,
                       totals_last, samples_last, kImages.data(), kBatch, kRows, static_cast<int64_t>(shape.channels),
                       static_cast<int64_t>(shape.pixels)},
                      nullptr);
  for (size_t b = 0; b < kBatch; ++b) {
    int64_t seen = taken[b];
    for (const int32_t row : kImages) seen += row == static_cast<int32_t>(b);
    EXPECT(counts[b] == seen, std::to_string(counts[b]));
    each(shape, [&](size_t c, size_t p) {
      const size_t at = b * size + shape.at(totals_last, c, p) + offsets.out;
      double m = value(before, at), s = value(squares_before, at), count = static_cast<double>(taken[b]);
      for (size_t n = 0; n < kRows; ++n) {
        if (kImages[n] != static_cast<int32_t>(b)) continue;
        const double v = value(samples, n * size + shape.at(samples_last, c, p) + offsets.in), deviation = v - m;
        m += deviation / ++count;
        s += deviation * (v - m);
      }
      EXPECT(std::abs(value(mean, at) - m) <= eps * kRows && std::abs(value(squares, at) - s) <= eps * kRows * kRows,
             std::to_string(b));
    });
  }
}

template <class A, class T>
void product(DType total, DType input, size_t count, emu_test::Offsets offsets, double eps) {
  const auto x = emu_test::random<T>(count + offsets.in), b = emu_test::random<T>(count + offsets.in, 2);
  const auto totals = emu_test::random<A>(count + offsets.out, 3), out = emu_test::unwritten<A>(count + offsets.out);
  launch_path_product(total, input,
                      {x.get() + offsets.in, b.get() + offsets.in, totals.get() + offsets.out, out.get() + offsets.out,
                       static_cast<int64_t>(count)},
                      nullptr);
  for (size_t i = 0; i < count; ++i) {
    const double along = value(x, i + offsets.in) - value(b, i + offsets.in);
    EXPECT(std::abs(value(out, i + offsets.out) - along * value(totals, i + offsets.out)) <= 4 * eps,
           std::to_string(i));
  }
}

constexpr double kFloat = 0x1p-23, kDouble = 0x1p-52, kHalf = 0x1p-10;
// whole words, more of them than a block has threads, no whole words, nothing
const Shape kShapes[] = {{3, 8}, {1, 1040}, {3, 45}, {2, 0}};
}  // namespace

CASE(path_integral_points_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 1, 2, 3})
      for (const emu_test::Offsets offsets : emu_test::kOffsets) {
        const bool source_last = lasts & 1, out_last = lasts & 2;
        points<float, float>(DType::float32, DType::float32, shape, source_last, out_last, offsets, kFloat);
        points<float, c10::Half>(DType::float32, DType::float16, shape, source_last, out_last, offsets, kHalf);
        points<c10::Half, double>(DType::float16, DType::float64, shape, source_last, out_last, offsets, kFloat);
        points<double, double>(DType::float64, DType::float64, shape, source_last, out_last, offsets, kDouble);
      }
}

CASE(path_integral_sums_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 7, 1, 2, 4})
      for (const emu_test::Offsets offsets : emu_test::kOffsets)
        for (const bool with_factors : {false, true}) {
          sums<float, float>(DType::float32, DType::float32, shape, lasts, with_factors, offsets, kFloat);
          sums<float, c10::Half>(DType::float32, DType::float16, shape, lasts, with_factors, offsets, kFloat);
          sums<double, double>(DType::float64, DType::float64, shape, lasts, with_factors, offsets, kDouble);
        }
}

CASE(path_integral_moments_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 1, 2, 3})
      for (const emu_test::Offsets offsets : emu_test::kOffsets) {
        moments<float, c10::Half>(DType::float32, DType::float16, shape, lasts & 1, lasts & 2, offsets, kFloat);
        moments<double, double>(DType::float64, DType::float64, shape, lasts & 1, lasts & 2, offsets, kDouble);
      }
}

CASE(path_integral_product_matches_its_formula) {
  for (const size_t count : {0, 1, 8, 1000, 1003})
    for (const emu_test::Offsets offsets : emu_test::kOffsets) {
      product<float, c10::Half>(DType::float32, DType::float16, count, offsets, kFloat);
      product<double, double>(DType::float64, DType::float64, count, offsets, kDouble);
    }
}
