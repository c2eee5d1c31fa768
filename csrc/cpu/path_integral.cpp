// path_integral: points b + alpha (x - b) on straight paths, sums of gradients along them (Sundararajan et al. 2017,
// equation 3), their running mean and squared deviations (Welford 1962), and the final product (x - b) times the sum.
// Layouts: inputs, baselines (B, C, H, W), points, gradients, factors, samples (N, ...), totals (B, ...), each
// contiguous or channels_last on its own; other strides are copied first.
// Work split: points: a task is a band of image lines for a run of rows n; b and x - b of the band are brought into the
// output's format once, and again only where rows[n] changes. Sums: a task is a piece of an image, small enough for
// the first-level cache, for all n in order, so each element sees its terms in order whatever the number of threads.
// Bytes: points writes each element once, sums read each gradient and factor once and keep the totals in cache.
#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "images.h"
#include "indices.h"
#include "pages.h"
#include "parallel.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kPieceBytes =
    8 << 10;                      // four gradients, four factors and the total fit a first-level cache or nearly
constexpr int64_t kRunRows = 32;  // points per task: staging a band costs about two points
constexpr int64_t kTaskBytes = 128 << 10;  // a thread's least work, some ten times the cost of waking it

const double* float64_values(const char* op, const char* argument, const Tensor& values, int64_t count) {
  PYSAL_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Double && values.numel() == count, "pysal::", op,
              ": ", argument, " must be ", count, " float64 on the CPU, got ", values.numel(), " elements of ",
              torch::headeronly::toString(values.scalar_type()));
  return values.const_data_ptr<double>();
}

void check_alike(const char* op, const char* argument, const Tensor& values, const Tensor& like) {
  PYSAL_CHECK(values.is_cpu() && values.scalar_type() == like.scalar_type() && values.sizes().equals(like.sizes()),
              "pysal::", op, ": ", argument, " must have the shape, dtype and device of what it goes with");
}

template <class Source, class Target>
void write_points(const Source* inputs, const Source* baselines, bool source_last, const int32_t* rows,
                  const double* alphas, int64_t count, Shape shape, Target* out, bool target_last) {
  using A = arithmetic_t<Source>;
  const int64_t channels = shape.channels, width = shape.width, image_size = shape.size(), line_size = channels * width;
  const int64_t lines = std::clamp<int64_t>(kPieceBytes / (line_size * sizeof(A)), 1, shape.height);
  const int64_t bands = ceil_div(shape.height, lines), runs = ceil_div(count, kRunRows);
  const int64_t task_bytes = lines * line_size * sizeof(A) * std::min(count, kRunRows);
  parallel_for(0, runs * bands, 1 + kTaskBytes / task_bytes, [&](int64_t begin, int64_t end) {
    std::vector<A> origin(lines * line_size), path(lines * line_size);  // b and x - b of the band
    for (int64_t task = begin; task < end; ++task) {
      const int64_t y0 = task % bands * lines, y1 = std::min(y0 + lines, shape.height);
      const int64_t first = y0 * width, pixels = (y1 - y0) * width;
      const int64_t n0 = task / bands * kRunRows, n1 = std::min(n0 + kRunRows, count);
      for (int64_t n = n0; n < n1; ++n) {
        if (n == n0 || rows[n] != rows[n - 1]) {
          const Image<const Source> x{inputs + rows[n] * image_size, source_last};
          const Image<const Source> b{baselines + rows[n] * image_size, source_last};
          copy_pixels(x, shape, first, pixels, path.data(), target_last, pixels);
          copy_pixels(b, shape, first, pixels, origin.data(), target_last, pixels);
          for (int64_t i = 0; i < channels * pixels; ++i) path[i] -= origin[i];
        }
        const A alpha = static_cast<A>(alphas[n]);
        const int64_t pieces = target_last ? 1 : channels, length = target_last ? channels * pixels : pixels;
        for (int64_t c = 0; c < pieces; ++c) {
          const A* __restrict b = origin.data() + c * length;
          const A* __restrict d = path.data() + c * length;
          Target* __restrict target =
              out + n * image_size + (target_last ? first * channels : c * shape.pixels() + first);
          for (int64_t i = 0; i < length; ++i) target[i] = convert<Target>(b[i] + alpha * d[i]);
        }
      }
    }
  });
}

Tensor path_integral_points_cpu(const Tensor& inputs, const Tensor& baselines, const Tensor& rows, const Tensor& alphas,
                                ScalarType dtype, bool channels_last) {
  PYSAL_CHECK(inputs.dim() == 4, "pysal::path_integral_points: inputs must have 4 dimensions, got ", inputs.dim());
  check_alike("path_integral_points", "baselines", baselines, inputs);
  const int64_t count = rows.numel();
  const Shape shape{inputs.size(1), inputs.size(2), inputs.size(3)};
  const Tensor checked_rows = image_rows("path_integral_points", rows, count, inputs.size(0));
  const Tensor dense_alphas = dense(alphas);
  const double* alpha = float64_values("path_integral_points", "alphas", dense_alphas, count);
  const bool source_last = is_channels_last(inputs);
  const Tensor dense_inputs = dense(inputs, source_last), dense_baselines = dense(baselines, source_last);
  Tensor out = empty(inputs, {count, shape.channels, shape.height, shape.width}, dtype, channels_last);
  if (out.numel() == 0) return out;
  prefer_large_pages(out);
  const int32_t* row = checked_rows.const_data_ptr<int32_t>();
  PYSAL_DISPATCH_FLOATING(inputs.scalar_type(), "path_integral_points", [&] {
    const scalar_t* x = dense_inputs.const_data_ptr<scalar_t>();
    const scalar_t* b = dense_baselines.const_data_ptr<scalar_t>();
    PYSAL_DISPATCH_FLOATING(dtype, "path_integral_points", [&] {
      write_points(x, b, source_last, row, alpha, count, shape, out.mutable_data_ptr<scalar_t>(), channels_last);
    });
  });
  return out;
}

// Totals (B, ...) that a sum changes in place: worked on where they lie if they are dense, else on a dense copy that
// finish() writes back.
struct Totals {
  Tensor given, dense_totals;
  bool channels_last;

  explicit Totals(const Tensor& totals) : Totals(totals, is_channels_last(totals)) {}
  Totals(const Tensor& totals, bool last) : given(totals), dense_totals(dense(totals, last)), channels_last(last) {}
  void finish() const {
    if (dense_totals.const_data_ptr() != given.const_data_ptr()) torch::stable::copy_(given_mutable(), dense_totals);
  }
  Tensor& given_mutable() const { return const_cast<Tensor&>(given); }
};

// Values (N, ...) that go into totals: row n is an image in its own dtype and format.
struct Rows {
  Tensor values;
  bool channels_last;

  Rows(const char* op, const char* argument, const Tensor& given, const Tensor& totals, int64_t count)
      : values(dense(given, is_channels_last(given))), channels_last(is_channels_last(given)) {
    bool alike = given.is_cpu() && given.dim() == totals.dim() && given.dim() > 0 && given.size(0) == count;
    for (int64_t dim = 1; alike && dim < given.dim(); ++dim) alike = given.size(dim) == totals.size(dim);
    PYSAL_CHECK(alike, "pysal::", op, ": ", argument, " must be ", count, " rows of the totals' shape on the CPU");
  }
};

// An image as pieces of at most kPieceBytes: pixels of all channels where formats differ and pixels must be brought
// into the totals' order, elements in memory order where they do not.
struct Pieces {
  Shape shape;
  int64_t length, count;

  Pieces(const Tensor& totals, bool same_format, int64_t element_bytes) {
    const int64_t size = totals.numel() / totals.size(0);
    shape = same_format ? Shape{1, 1, size} : Shape{totals.size(1), totals.size(2), totals.size(3)};
    length = std::max<int64_t>(1, kPieceBytes / (shape.channels * element_bytes));
    count = ceil_div(shape.pixels(), length);
  }
};

// Where row n's piece is in the totals' dtype and format: where it lies, or converted into the buffer.
template <class A, class T>
const A* piece_of(const T* values, int64_t n, bool values_last, bool totals_last, Shape shape, int64_t first,
                  int64_t pixels, A* buffer) {
  const T* image = values + n * shape.size();
  if constexpr (std::is_same_v<A, T>)
    if (shape.channels == 1) return image + first;
  copy_pixels(Image<const T>{image, values_last}, shape, first, pixels, buffer, totals_last, pixels);
  return buffer;
}

// Calls body(offset of the piece in an image of the totals, offset in a piece in memory order, length) once where the
// totals hold the piece's channels together, else for each channel.
template <class Body>
void each_stretch(Shape shape, bool totals_last, int64_t first, int64_t pixels, Body body) {
  if (totals_last) return body(first * shape.channels, int64_t{0}, pixels * shape.channels);
  for (int64_t c = 0; c < shape.channels; ++c) body(c * shape.pixels() + first, c * pixels, pixels);
}

// total[i] += w g[i] f[i] for kTerms terms in order. Four at a time spare the totals three trips to the cache.
template <int kTerms, bool kFactors, class A>
void add_terms(A* __restrict total, const A* const* gradients, const A* const* factors, const A* weights,
               int64_t length) {
  const A* __restrict g0 = gradients[0];
  const A* __restrict g1 = gradients[kTerms > 1 ? 1 : 0];
  const A* __restrict g2 = gradients[kTerms > 1 ? 2 : 0];
  const A* __restrict g3 = gradients[kTerms > 1 ? 3 : 0];
  const A* __restrict f0 = factors[0];
  const A* __restrict f1 = factors[kTerms > 1 ? 1 : 0];
  const A* __restrict f2 = factors[kTerms > 1 ? 2 : 0];
  const A* __restrict f3 = factors[kTerms > 1 ? 3 : 0];
  const A w0 = weights[0], w1 = weights[kTerms > 1 ? 1 : 0], w2 = weights[kTerms > 1 ? 2 : 0],
          w3 = weights[kTerms > 1 ? 3 : 0];
  for (int64_t i = 0; i < length; ++i) {
    A sum = total[i] + (kFactors ? w0 * g0[i] * f0[i] : w0 * g0[i]);
    if (kTerms > 1) {
      sum += kFactors ? w1 * g1[i] * f1[i] : w1 * g1[i];
      sum += kFactors ? w2 * g2[i] * f2[i] : w2 * g2[i];
      sum += kFactors ? w3 * g3[i] * f3[i] : w3 * g3[i];
    }
    total[i] = sum;
  }
}

template <class A, class T, class U>
void accumulate(A* totals, bool totals_last, const T* gradients, bool gradients_last, const U* factors,
                bool factors_last, const int32_t* rows, const double* weights, int64_t rows_count, Pieces pieces) {
  constexpr int64_t kGroup = 4;
  const Shape shape = pieces.shape;
  const int64_t piece_size = pieces.length * shape.channels;
  const int64_t work = rows_count * piece_size * static_cast<int64_t>(sizeof(A));
  parallel_for(0, pieces.count, 1 + kTaskBytes / work, [&](int64_t begin, int64_t end) {
    std::vector<A> gradient_buffer(kGroup * piece_size), factor_buffer(factors ? kGroup * piece_size : 0);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * pieces.length, pixels = std::min(pieces.length, shape.pixels() - first);
      for (int64_t n = 0, terms; n < rows_count; n += terms) {
        terms = 1;
        while (n + terms < rows_count && terms < kGroup && rows[n + terms] == rows[n]) ++terms;
        if (terms < kGroup) terms = 1;
        const A *g[kGroup] = {}, *f[kGroup] = {};
        A w[kGroup] = {};
        for (int64_t k = 0; k < terms; ++k) {
          w[k] = static_cast<A>(weights[n + k]);
          g[k] = piece_of(gradients, n + k, gradients_last, totals_last, shape, first, pixels,
                          gradient_buffer.data() + k * piece_size);
          if (factors)
            f[k] = piece_of(factors, n + k, factors_last, totals_last, shape, first, pixels,
                            factor_buffer.data() + k * piece_size);
        }
        A* image = totals + rows[n] * shape.size();
        each_stretch(shape, totals_last, first, pixels, [&](int64_t offset, int64_t at, int64_t length) {
          const A *gradient[kGroup] = {}, *factor[kGroup] = {};
          for (int64_t k = 0; k < terms; ++k) {
            gradient[k] = g[k] + at;
            if (factors) factor[k] = f[k] + at;
          }
          if (terms == 1 && factors)
            add_terms<1, true>(image + offset, gradient, factor, w, length);
          else if (terms == 1)
            add_terms<1, false>(image + offset, gradient, factor, w, length);
          else if (factors)
            add_terms<kGroup, true>(image + offset, gradient, factor, w, length);
          else
            add_terms<kGroup, false>(image + offset, gradient, factor, w, length);
        });
      }
    }
  });
}

void path_integral_accumulate_cpu(const Tensor& accumulator, const Tensor& gradients,
                                  const std::optional<Tensor>& factors, const Tensor& rows, const Tensor& weights) {
  const char* op = "path_integral_accumulate_";
  const int64_t count = rows.numel();
  const bool is_double = accumulator.scalar_type() == ScalarType::Double;
  PYSAL_CHECK(accumulator.is_cpu() && (is_double || accumulator.scalar_type() == ScalarType::Float), "pysal::", op,
              ": accumulator must be float32 or float64 on the CPU");
  const Rows gradient(op, "gradients", gradients, accumulator, count);
  const Rows factor(op, "factors", factors.value_or(gradient.values), accumulator, count);
  const Tensor checked_rows = image_rows(op, rows, count, accumulator.size(0)), dense_weights = dense(weights);
  const double* weight = float64_values(op, "weights", dense_weights, count);
  if (gradients.numel() == 0) return;
  const Totals totals(accumulator);
  const bool last = totals.channels_last;
  const Pieces pieces(accumulator, gradient.channels_last == last && factor.channels_last == last, is_double ? 8 : 4);
  const int32_t* row = checked_rows.const_data_ptr<int32_t>();
  const auto run = [&](auto* total) {
    PYSAL_DISPATCH_FLOATING(gradients.scalar_type(), "path_integral_accumulate_", [&] {
      const scalar_t* g = gradient.values.const_data_ptr<scalar_t>();
      PYSAL_DISPATCH_FLOATING(factor.values.scalar_type(), "path_integral_accumulate_", [&] {
        const scalar_t* f = factors ? factor.values.const_data_ptr<scalar_t>() : nullptr;
        accumulate(total, last, g, gradient.channels_last, f, factor.channels_last, row, weight, count, pieces);
      });
    });
  };
  if (is_double)
    run(totals.dense_totals.mutable_data_ptr<double>());
  else
    run(totals.dense_totals.mutable_data_ptr<float>());
  totals.finish();
}

template <class A, class T>
void take_moments(A* means, A* squares, bool totals_last, const T* samples, bool samples_last, const int32_t* rows,
                  const std::vector<A>& taken, Pieces pieces) {
  const Shape shape = pieces.shape;
  const int64_t rows_count = static_cast<int64_t>(taken.size());
  const int64_t work = rows_count * pieces.length * shape.channels * static_cast<int64_t>(sizeof(A));
  parallel_for(0, pieces.count, 1 + kTaskBytes / work, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(pieces.length * shape.channels);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * pieces.length, pixels = std::min(pieces.length, shape.pixels() - first);
      for (int64_t n = 0; n < rows_count; ++n) {
        const A* values = piece_of(samples, n, samples_last, totals_last, shape, first, pixels, buffer.data());
        const int64_t image = rows[n] * shape.size();
        each_stretch(shape, totals_last, first, pixels, [&](int64_t offset, int64_t at, int64_t length) {
          A* __restrict mean = means + image + offset;
          A* __restrict square = squares + image + offset;
          const A* __restrict sample = values + at;
          const A samples_taken = taken[n];
          for (int64_t i = 0; i < length; ++i) {
            const A deviation = sample[i] - mean[i];
            mean[i] += deviation / samples_taken;
            square[i] += deviation * (sample[i] - mean[i]);
          }
        });
      }
    }
  });
}

void path_integral_moments_cpu(const Tensor& mean, const Tensor& squares, const Tensor& counts, const Tensor& samples,
                               const Tensor& rows) {
  const char* op = "path_integral_moments_";
  const int64_t count = rows.numel();
  const bool is_double = mean.scalar_type() == ScalarType::Double;
  PYSAL_CHECK(mean.is_cpu() && (is_double || mean.scalar_type() == ScalarType::Float), "pysal::", op,
              ": mean must be float32 or float64 on the CPU");
  check_alike(op, "squares", squares, mean);
  const Rows sample(op, "samples", samples, mean, count);
  PYSAL_CHECK(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.numel() == mean.size(0),
              "pysal::", op, ": counts must be ", mean.size(0), " int64 on the CPU");
  const Tensor checked_rows = image_rows(op, rows, count, mean.size(0));
  const int32_t* row = checked_rows.const_data_ptr<int32_t>();
  const Totals counted(counts);
  int64_t* seen = counted.dense_totals.mutable_data_ptr<int64_t>();
  const bool last = is_channels_last(mean);
  const Totals means(mean, last), deviations(squares, last);
  const auto run = [&](auto* first_mean, auto* first_square) {
    using A = std::remove_pointer_t<decltype(first_mean)>;
    std::vector<A> taken;  // samples of its image up to and with n
    taken.reserve(count);
    for (int64_t n = 0; n < count; ++n) taken.push_back(static_cast<A>(++seen[row[n]]));
    if (samples.numel() == 0) return;
    const Pieces pieces(mean, sample.channels_last == last, sizeof(A));
    PYSAL_DISPATCH_FLOATING(samples.scalar_type(), "path_integral_moments_", [&] {
      take_moments(first_mean, first_square, last, sample.values.const_data_ptr<scalar_t>(), sample.channels_last, row,
                   taken, pieces);
    });
  };
  if (is_double)
    run(means.dense_totals.mutable_data_ptr<double>(), deviations.dense_totals.mutable_data_ptr<double>());
  else
    run(means.dense_totals.mutable_data_ptr<float>(), deviations.dense_totals.mutable_data_ptr<float>());
  counted.finish();
  means.finish();
  deviations.finish();
}

template <class A, class T>
void multiply(const T* inputs, const T* baselines, const A* accumulator, A* out, int64_t count) {
  parallel_for(0, count, kTaskBytes / static_cast<int64_t>(sizeof(A)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = (static_cast<A>(inputs[i]) - static_cast<A>(baselines[i])) * accumulator[i];
  });
}

Tensor path_integral_product_cpu(const Tensor& inputs, const Tensor& baselines, const Tensor& accumulator) {
  const char* op = "path_integral_product";
  const bool is_double = accumulator.scalar_type() == ScalarType::Double;
  PYSAL_CHECK(accumulator.is_cpu() && (is_double || accumulator.scalar_type() == ScalarType::Float), "pysal::", op,
              ": accumulator must be float32 or float64 on the CPU");
  check_alike(op, "baselines", baselines, inputs);
  PYSAL_CHECK(inputs.is_cpu() && inputs.sizes().equals(accumulator.sizes()), "pysal::", op,
              ": inputs must have the shape and device of accumulator");
  const Tensor x = dense(inputs), b = dense(baselines), totals = dense(accumulator);
  Tensor out = empty(accumulator, accumulator.sizes());
  prefer_large_pages(out);
  PYSAL_DISPATCH_FLOATING(inputs.scalar_type(), "path_integral_product", [&] {
    const scalar_t *first = x.const_data_ptr<scalar_t>(), *origin = b.const_data_ptr<scalar_t>();
    if (is_double)
      multiply(first, origin, totals.const_data_ptr<double>(), out.mutable_data_ptr<double>(), out.numel());
    else
      multiply(first, origin, totals.const_data_ptr<float>(), out.mutable_data_ptr<float>(), out.numel());
  });
  return out;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("path_integral_points", TORCH_BOX(&pysal::cpu::path_integral_points_cpu));
  m.impl("path_integral_accumulate_", TORCH_BOX(&pysal::cpu::path_integral_accumulate_cpu));
  m.impl("path_integral_moments_", TORCH_BOX(&pysal::cpu::path_integral_moments_cpu));
  m.impl("path_integral_product", TORCH_BOX(&pysal::cpu::path_integral_product_cpu));
}
