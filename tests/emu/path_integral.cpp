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

// offset != 0: no 16-byte words. eps: of the totals' dtype or the target's, whichever rounds more
template <class S, class T>
void points(DType source, DType target, Shape shape, bool source_last, bool out_last, size_t offset, double eps) {
  const size_t size = shape.size();
  const auto x = emu_test::random<S>(kBatch * size + offset), b = emu_test::random<S>(kBatch * size + offset, 2);
  const auto alphas = emu_test::random<double>(kRows, 3);
  const auto out = emu_test::unwritten<T>(kRows * size + offset);
  launch_path_points(
      source, target,
      {x.get() + offset, b.get() + offset, source_last, kImages.data(), alphas.get(), out.get() + offset, out_last,
       kBatch, kRows, static_cast<int64_t>(shape.channels), static_cast<int64_t>(shape.pixels)},
      nullptr);
  for (size_t n = 0; n < kRows; ++n)
    each(shape, [&](size_t c, size_t p) {
      const double got = value(out, n * size + shape.at(out_last, c, p) + offset);
      if (!inside(n)) return EXPECT(std::isnan(got), std::to_string(n));
      const size_t i = static_cast<size_t>(kImages[n]) * size + shape.at(source_last, c, p) + offset;
      const double expected = value(b, i) + alphas[n] * (value(x, i) - value(b, i));
      EXPECT(std::abs(got - expected) <= 8 * eps, std::to_string(n));
    });
}

template <class A, class G>
void sums(DType total, DType gradient, Shape shape, int lasts, bool with_factors, size_t offset, double eps) {
  const size_t size = shape.size();
  const bool totals_last = lasts & 1, gradients_last = lasts & 2, factors_last = lasts & 4;
  const auto totals = emu_test::random<A>(kBatch * size + offset);
  const auto before = emu_test::random<A>(kBatch * size + offset);
  const auto g = emu_test::random<G>(kRows * size + offset, 2);
  const auto f = emu_test::random<float>(kRows * size + offset, 3);
  const auto weights = emu_test::random<double>(kRows, 4);
  launch_path_accumulate(total, gradient,
                         {totals.get() + offset, g.get() + offset, with_factors ? f.get() + offset : nullptr,
                          DType::float32, totals_last, gradients_last, factors_last, kImages.data(), weights.get(),
                          kBatch, kRows, static_cast<int64_t>(shape.channels), static_cast<int64_t>(shape.pixels)},
                         nullptr);
  for (size_t b = 0; b < kBatch; ++b)
    each(shape, [&](size_t c, size_t p) {
      const size_t at = b * size + shape.at(totals_last, c, p) + offset;
      double expected = value(before, at);
      for (size_t n = 0; n < kRows; ++n)
        if (kImages[n] == static_cast<int32_t>(b))
          expected += weights[n] * value(g, n * size + shape.at(gradients_last, c, p) + offset) *
                      (with_factors ? value(f, n * size + shape.at(factors_last, c, p) + offset) : 1.0);
      EXPECT(std::abs(value(totals, at) - expected) <= eps * kRows * kRows, std::to_string(b));
    });
}

template <class A, class S>
void moments(DType total, DType sample, Shape shape, bool totals_last, bool samples_last, size_t offset, double eps) {
  const size_t size = shape.size();
  const auto mean = emu_test::random<A>(kBatch * size + offset), before = emu_test::random<A>(kBatch * size + offset);
  const auto squares = emu_test::random<A>(kBatch * size + offset, 2);
  const auto squares_before = emu_test::random<A>(kBatch * size + offset, 2);
  const auto samples = emu_test::random<S>(kRows * size + offset, 3);
  const std::unique_ptr<int64_t[]> counts(new int64_t[kBatch]{4, 0, 7});
  const int64_t taken[kBatch] = {4, 0, 7};
  launch_path_moments(
      total, sample,
      {mean.get() + offset, squares.get() + offset, counts.get(), samples.get() + offset, totals_last, samples_last,
       kImages.data(), kBatch, kRows, static_cast<int64_t>(shape.channels), static_cast<int64_t>(shape.pixels)},
      nullptr);
  for (size_t b = 0; b < kBatch; ++b) {
    int64_t seen = taken[b];
    for (const int32_t row : kImages) seen += row == static_cast<int32_t>(b);
    EXPECT(counts[b] == seen, std::to_string(counts[b]));
    each(shape, [&](size_t c, size_t p) {
      const size_t at = b * size + shape.at(totals_last, c, p) + offset;
      double m = value(before, at), s = value(squares_before, at), count = static_cast<double>(taken[b]);
      for (size_t n = 0; n < kRows; ++n) {
        if (kImages[n] != static_cast<int32_t>(b)) continue;
        const double v = value(samples, n * size + shape.at(samples_last, c, p) + offset), deviation = v - m;
        m += deviation / ++count;
        s += deviation * (v - m);
      }
      EXPECT(std::abs(value(mean, at) - m) <= eps * kRows && std::abs(value(squares, at) - s) <= eps * kRows * kRows,
             std::to_string(b));
    });
  }
}

template <class A, class T>
void product(DType total, DType input, size_t count, size_t offset, double eps) {
  const auto x = emu_test::random<T>(count + offset), b = emu_test::random<T>(count + offset, 2);
  const auto totals = emu_test::random<A>(count + offset, 3), out = emu_test::unwritten<A>(count + offset);
  launch_path_product(
      total, input,
      {x.get() + offset, b.get() + offset, totals.get() + offset, out.get() + offset, static_cast<int64_t>(count)},
      nullptr);
  for (size_t i = offset; i < count + offset; ++i)
    EXPECT(std::abs(value(out, i) - (value(x, i) - value(b, i)) * value(totals, i)) <= 4 * eps, std::to_string(i));
}

constexpr double kFloat = 0x1p-23, kDouble = 0x1p-52, kHalf = 0x1p-10;
// whole words, more of them than a block has threads, no whole words, nothing
const Shape kShapes[] = {{3, 8}, {1, 1040}, {3, 45}, {2, 0}};
}  // namespace

CASE(path_integral_points_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 1, 2, 3})
      for (const size_t offset : {0, 1}) {
        const bool source_last = lasts & 1, out_last = lasts & 2;
        points<float, float>(DType::float32, DType::float32, shape, source_last, out_last, offset, kFloat);
        points<float, c10::Half>(DType::float32, DType::float16, shape, source_last, out_last, offset, kHalf);
        points<c10::Half, double>(DType::float16, DType::float64, shape, source_last, out_last, offset, kFloat);
        points<double, double>(DType::float64, DType::float64, shape, source_last, out_last, offset, kDouble);
      }
}

CASE(path_integral_sums_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 7, 1, 2, 4})
      for (const size_t offset : {0, 1})
        for (const bool with_factors : {false, true}) {
          sums<float, float>(DType::float32, DType::float32, shape, lasts, with_factors, offset, kFloat);
          sums<float, c10::Half>(DType::float32, DType::float16, shape, lasts, with_factors, offset, kFloat);
          sums<double, double>(DType::float64, DType::float64, shape, lasts, with_factors, offset, kDouble);
        }
}

CASE(path_integral_moments_match_their_formula) {
  for (const Shape shape : kShapes)
    for (const int lasts : {0, 1, 2, 3})
      for (const size_t offset : {0, 1}) {
        moments<float, c10::Half>(DType::float32, DType::float16, shape, lasts & 1, lasts & 2, offset, kFloat);
        moments<double, double>(DType::float64, DType::float64, shape, lasts & 1, lasts & 2, offset, kDouble);
      }
}

CASE(path_integral_product_matches_its_formula) {
  for (const size_t count : {0, 1, 8, 1000, 1003})
    for (const size_t offset : {0, 1}) {
      product<float, c10::Half>(DType::float32, DType::float16, count, offset, kFloat);
      product<double, double>(DType::float64, DType::float64, count, offset, kDouble);
    }
}
