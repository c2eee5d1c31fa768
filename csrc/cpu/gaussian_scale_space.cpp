// gaussian_scale_space: L = K x K^T, a separable Gaussian blur with its own sigma for each image of a batch, and
// gaussian_scale_space_derivative: L with D = (L(sigma + h) - L(sigma)) / h or, for h = 0, dL/dsigma (Xu et al. 2020,
// arXiv:2004.03383, eq. 7). Tensors are (N, C, H, W), contiguous, or (1, C, H, W) for a batch that repeats one image.
// Here: the taps, in double, the halves of lines where a kernel spans the image, and the split of the work;
// simd/gaussian_scale_space.cpp has the loops.
// Taps: k[j] ~ exp(-j^2 / (2 sigma^2)), |j| <= r = int(4 sigma + 0.5), normalised. The difference kernel never
// subtracts two nearly equal numbers: with g the weights, Z their sum, k = g / Z,
//   (k' - k) = (dg - k sum(dg)) / Z',   dg = g expm1(j^2 (1/sigma^2 - 1/sigma'^2) / 2)   (g' where |j| > r)
// and in the limit h = 0, dg/dsigma = g j^2 / sigma^3.
// Work split: blocks of 16 rows of a plane, handed out as threads ask for them: their costs differ with sigma.
#include "simd/gaussian_scale_space_kernels.h"

#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "pages.h"
#include "parallel.h"
#include "simd/level.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <utility>

namespace pysal::cpu {
namespace {
constexpr double kMaxSigma = 1e6;              // as the wrapper says; keeps the taps of one sigma under 100 MB
constexpr int64_t kMultiplications = 1 << 18;  // per task, some 10 us, so that threads seldom meet at the counter

int64_t radius_of(double sigma) { return static_cast<int64_t>(4 * sigma + 0.5); }

// Half kernels, j = 0..radius, in double.
struct Kernels {
  std::vector<double> level, next, slope;  // next and slope are empty where only L is wanted
};

std::vector<double> weights_of(double sigma, int64_t radius) {
  std::vector<double> weights(radius + 1, 0.0);
  weights[0] = 1.0;
  for (int64_t j = 1; j <= std::min(radius, radius_of(sigma)); ++j) {
    const double ratio = j / sigma;
    weights[j] = std::exp(-0.5 * ratio * ratio);
  }
  return weights;
}

// Of all taps, j = -radius..radius; small ones first.
double sum_of(const std::vector<double>& half) {
  double sum = 0.0;
  for (size_t j = half.size() - 1; j > 0; --j) sum += half[j];
  return 2.0 * sum + half[0];
}

std::vector<double> normalised(std::vector<double> half) {
  const double sum = sum_of(half);
  for (double& weight : half) weight /= sum;
  return half;
}

Kernels level_kernel(double sigma) { return {normalised(weights_of(sigma, radius_of(sigma))), {}, {}}; }

Kernels derivative_kernels(double sigma, double step) {
  const double after = sigma + step;
  const int64_t inner = radius_of(sigma), radius = radius_of(after);
  const std::vector<double> before_weights = weights_of(sigma, radius), after_weights = weights_of(after, radius);
  Kernels kernels{normalised(before_weights), normalised(after_weights), std::vector<double>(radius + 1, 0.0)};
  std::vector<double>& slope = kernels.slope;
  const double exponent = step * (2 * sigma + step) / (2 * sigma * sigma * after * after);
  for (int64_t j = 1; j <= radius; ++j) {
    const double square = static_cast<double>(j) * static_cast<double>(j);
    if (step == 0)
      slope[j] = before_weights[j] * square / (sigma * sigma * sigma);
    else
      slope[j] = (j <= inner ? before_weights[j] * std::expm1(exponent * square) : after_weights[j]) / step;
  }
  const double growth = sum_of(slope), total = sum_of(after_weights);
  for (int64_t j = 0; j <= radius; ++j) slope[j] = (slope[j] - kernels.level[j] * growth) / total;
  return kernels;
}

// The reflected line has the period 2 size: a longer kernel is wound around it.
int64_t reach_of(const Kernels& kernels, int64_t size, bool reflect) {
  return std::min(static_cast<int64_t>(kernels.level.size()) - 1, reflect ? size : size - 1);
}

// Both halves of a kernel for a line of that size, with as many zeros around as asked for.
std::vector<double> whole(const std::vector<double>& half, int64_t size, bool reflect, int64_t radius, int64_t zeros) {
  const int64_t length = static_cast<int64_t>(half.size()) - 1, centre = radius + zeros;
  std::vector<double> full(2 * centre + 1, 0.0);
  if (reflect && length > size) {
    // position j mod 2 size, as one of -size..size
    for (int64_t j = 0; j <= length; ++j) {
      const int64_t m = j % (2 * size), positive = m > size ? m - 2 * size : m;
      full[centre + positive] += half[j];
      if (j != 0) full[centre - positive] += half[j];
    }
  } else {
    for (int64_t j = -radius; j <= radius; ++j) full[centre + j] = half[std::abs(j)];
  }
  return full;
}

// A kernel as the loops want it for a side of that size: both halves, zeros around, no tap that reaches nothing.
template <class T>
class Taps {
 public:
  Taps(const Kernels& kernels, int64_t size, bool reflect) {
    taps_.radius = reach_of(kernels, size, reflect);
    taps_.level = spread(kernels.level, size, reflect, level_);
    taps_.next = spread(kernels.next, size, reflect, next_);
    taps_.slope = spread(kernels.slope, size, reflect, slope_);
  }
  const ScaleSpaceTaps<T>& get() const { return taps_; }

 private:
  const T* spread(const std::vector<double>& half, int64_t size, bool reflect, std::vector<T>& out) {
    if (half.empty()) return nullptr;
    const std::vector<double> full = whole(half, size, reflect, taps_.radius, kScaleSpaceMargin);
    out.assign(full.begin(), full.end());
    return out.data() + taps_.radius + kScaleSpaceMargin;
  }

  std::vector<T> level_, next_, slope_;
  ScaleSpaceTaps<T> taps_;
};

// The same for lines that are folded. K commutes with the reversal of a line, so it maps even lines to even ones and
// odd lines to odd ones: element (i, k) of either map is K[i, k] +- K[i, size - 1 - k], a function of i - k plus one
// of i + k.
template <class T>
class Halves {
 public:
  Halves(const Kernels& kernels, int64_t size, bool reflect) {
    halves_.half = ceil_div(size, 2);
    halves_.radius = reach_of(kernels, size, reflect);
    const int64_t size_of_one = 2 * halves_.half * halves_.half;
    matrices_.reset(new T[(kernels.slope.empty() ? 1 : 3) * size_of_one]);
    T* next = matrices_.get();
    const auto arranged = [&](const std::vector<double>& kernel) -> const T* {
      if (kernel.empty()) return nullptr;
      arrange(kernel, size, reflect, next);
      return std::exchange(next, next + size_of_one);
    };
    halves_.level = arranged(kernels.level);
    halves_.next = arranged(kernels.next);
    halves_.slope = arranged(kernels.slope);
  }
  const ScaleSpaceHalves<T>& get() const { return halves_; }

 private:
  void arrange(const std::vector<double>& kernel, int64_t size, bool reflect, T* out) const {
    const int64_t half = halves_.half, radius = halves_.radius;
    const std::vector<double> full = whole(kernel, size, reflect, radius, 2 * size - radius);
    const double* const tap = full.data() + 2 * size;
    std::vector<T> difference(2 * half - 1), sum(2 * half - 1);  // of i - k + half - 1, of i + k
    for (const int sign : {1, -1}) {
      for (int64_t d = 1 - half; d < half; ++d)
        difference[d + half - 1] = static_cast<T>(tap[d] + (reflect ? sign * (tap[size + d] + tap[size - d]) : 0.0));
      for (int64_t s = 0; s < 2 * half - 1; ++s)
        sum[s] = static_cast<T>(sign * tap[size - 1 - s] + (reflect ? tap[s + 1] + tap[2 * size - 1 - s] : 0.0));
      for (int64_t i = 0; i < half; ++i)
        for (int64_t k = 0; k < half; ++k) *out++ = difference[k - i + half - 1] + sum[k + i];
    }
  }

  std::unique_ptr<T[]> matrices_;
  ScaleSpaceHalves<T> halves_;
};

// The lines of one image, as the loops want them in both directions.
template <class Lines>
class Directions {
 public:
  Directions(const Kernels& kernels, int64_t height, int64_t width, bool reflect)
      : horizontal_(kernels, width, reflect) {
    if (height != width) other_.emplace_back(kernels, height, reflect);
  }
  const auto& horizontal() const { return horizontal_.get(); }
  const auto& vertical() const { return (other_.empty() ? horizontal_ : other_[0]).get(); }

 private:
  Lines horizontal_;
  std::vector<Lines> other_;  // the vertical ones, where the sides differ
};

// Even and odd parts of a plane, a quarter of them, so that their sums are the values: [row parity][half a column]
// [column parity][half a row]. The middle line of an odd number is its own mirror image, its even part counts once.
template <class T>
void fold(const T* plane, int64_t height, int64_t width, T* out) {
  const int64_t rows = ceil_div(height, 2), half = ceil_div(width, 2);
  for (int64_t i = 0; i < rows; ++i) {
    const T *upper = plane + i * width, *lower = plane + (height - 1 - i) * width;
    T *even = out + i * 2 * half, *odd = even + rows * 2 * half;
    const T scale = static_cast<T>(2 * i + 1 == height ? 0.125 : 0.25);
    for (int64_t k = 0; k < half; ++k) {
      const T sum = upper[k] + lower[k], difference = upper[k] - lower[k];
      const T mirrored_sum = upper[width - 1 - k] + lower[width - 1 - k];
      const T mirrored_difference = upper[width - 1 - k] - lower[width - 1 - k];
      even[k] = scale * (sum + mirrored_sum);
      even[half + k] = scale * (sum - mirrored_sum);
      odd[k] = scale * (difference + mirrored_difference);
      odd[half + k] = scale * (difference - mirrored_difference);
    }
    if (width % 2 == 1) {
      even[half - 1] /= 2;
      odd[half - 1] /= 2;
    }
  }
}

void run_rows(const ScaleSpacePlane<float>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).float_rows(plane, begin, end);
}
void run_rows(const ScaleSpacePlane<double>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).double_rows(plane, begin, end);
}
void run_rows(const FoldedScaleSpacePlane<float>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).folded_float_rows(plane, begin, end);
}
void run_rows(const FoldedScaleSpacePlane<double>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).folded_double_rows(plane, begin, end);
}

// Folded lines have half the multiplications where a kernel spans the image, none fewer where it is short; below a
// quarter of the side folding takes longer.
bool pays_to_fold(const Kernels& kernels, int64_t height, int64_t width) {
  const int64_t side = std::max(height, width), radius = static_cast<int64_t>(kernels.level.size()) - 1;
  return side <= kFoldedSide && 4 * radius >= side;
}

// Hands out tasks of some items as threads ask for them: what an item costs differs with sigma.
template <class T, class Body>
void share(int64_t items, int64_t multiplications, int64_t scratch_size, const Body& body) {
  const int64_t batch = std::max<int64_t>(1, kMultiplications / multiplications);
  const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(items, batch));
  std::atomic<int64_t> next{0};
  parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    std::vector<T> scratch(scratch_size);
    for (int64_t begin = next.fetch_add(batch); begin < items; begin = next.fetch_add(batch))
      for (int64_t item = begin; item < std::min(begin + batch, items); ++item) body(item, scratch.data());
  });
}

template <class T>
struct Batch {
  const T* images;  // (N, C, H, W), or (1, C, H, W) where all rows of the batch are one image
  bool repeated;
  T *levels, *derivatives;  // (N, C, H, W); derivatives may be null
  int64_t channels, height, width;
  bool reflect;
  const std::vector<Kernels>& kernels;

  int64_t pixels() const { return height * width; }
  int64_t products() const { return derivatives == nullptr ? 2 : 5; }
  T* slopes_of(int64_t plane) const { return derivatives == nullptr ? nullptr : derivatives + plane * pixels(); }
};

template <class T>
void blur(const Batch<T>& batch, const std::vector<int64_t>& rows) {
  const int64_t channels = batch.channels, height = batch.height, width = batch.width;
  std::vector<Directions<Taps<T>>> taps;
  int64_t reach = kScaleSpaceMargin;
  for (const int64_t n : rows) {
    taps.emplace_back(batch.kernels[n], height, width, batch.reflect);
    reach += (taps.back().vertical().radius + taps.back().horizontal().radius) / static_cast<int64_t>(rows.size());
  }
  const int64_t blocks = ceil_div(height, kScaleSpaceRows);
  const int64_t items = static_cast<int64_t>(rows.size()) * channels * blocks;
  share<T>(items, kScaleSpaceRows * width * reach * batch.products(), 2 * kScaleSpaceRows * width,
           [&](int64_t item, T* scratch) {
             const int64_t i = item / blocks / channels, channel = item / blocks % channels;
             const int64_t plane = rows[i] * channels + channel, row = item % blocks * kScaleSpaceRows;
             const ScaleSpacePlane<T> work{batch.images + (batch.repeated ? channel : plane) * batch.pixels(),
                                           batch.levels + plane * batch.pixels(),
                                           batch.slopes_of(plane),
                                           height,
                                           width,
                                           batch.reflect,
                                           taps[i].vertical(),
                                           taps[i].horizontal(),
                                           scratch};
             run_rows(work, row, std::min(row + kScaleSpaceRows, height));
           });
}

// Level by level, so that the matrices of one, and the folded planes, stay in the second-level cache.
template <class T>
void blur_folded(const Batch<T>& batch, const std::vector<int64_t>& rows) {
  const int64_t channels = batch.channels, height = batch.height, width = batch.width;
  const int64_t half_height = ceil_div(height, 2), half_width = ceil_div(width, 2),
                pixels = 4 * half_height * half_width;
  constexpr int64_t block = kScaleSpaceRows / 2;
  const int64_t blocks = ceil_div(half_height, block);
  const std::unique_ptr<T[]> folded(new T[channels * pixels]);
  for (const int64_t n : rows) {
    if (n == rows[0] || !batch.repeated) {
      const T* image = batch.images + (batch.repeated ? 0 : n * channels * batch.pixels());
      parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t channel = begin; channel < end; ++channel)
          fold(image + channel * batch.pixels(), height, width, folded.get() + channel * pixels);
      });
    }
    const Directions<Halves<T>> halves(batch.kernels[n], height, width, batch.reflect);
    share<T>(channels * blocks, block * width * (half_height + half_width) * batch.products(),
             2 * kScaleSpaceRows * kFoldedLine, [&](int64_t item, T* scratch) {
               const int64_t channel = item / blocks, row = item % blocks * block, plane = n * channels + channel;
               const FoldedScaleSpacePlane<T> work{folded.get() + channel * pixels,
                                                   batch.levels + plane * batch.pixels(),
                                                   batch.slopes_of(plane),
                                                   height,
                                                   width,
                                                   halves.vertical(),
                                                   halves.horizontal(),
                                                   scratch};
               run_rows(work, row, std::min(row + block, half_height));
             });
  }
}

template <class T>
void fill(const Tensor& images, const std::vector<Kernels>& kernels, bool reflect, const Tensor& levels,
          const Tensor* derivatives) {
  const Batch<T> batch{images.const_data_ptr<T>(),
                       images.size(0) == 1,
                       levels.mutable_data_ptr<T>(),
                       derivatives == nullptr ? nullptr : derivatives->mutable_data_ptr<T>(),
                       images.size(1),
                       images.size(2),
                       images.size(3),
                       reflect,
                       kernels};
  std::vector<int64_t> banded, folded;
  for (size_t n = 0; n < kernels.size(); ++n)
    (pays_to_fold(kernels[n], batch.height, batch.width) ? folded : banded).push_back(static_cast<int64_t>(n));
  if (!banded.empty()) blur(batch, banded);
  if (!folded.empty()) blur_folded(batch, folded);
}

void check(const char* op, const Tensor& images, FloatList sigmas, double step, int64_t boundary) {
  PYSAL_CHECK(images.dim() == 4, op, ": images must have 4 dimensions, got ", images.dim());
  PYSAL_CHECK(static_cast<int64_t>(sigmas.size()) == images.size(0), op, ": sigmas must have ", images.size(0),
              " elements, one per image, got ", sigmas.size());
  PYSAL_CHECK(step >= 0 && step <= kMaxSigma, op, ": step must be between 0 and 1e6, got ", step);
  PYSAL_CHECK(boundary == 0 || boundary == 1, op, ": boundary must be 0 or 1, got ", boundary);
  for (const double sigma : sigmas)
    PYSAL_CHECK(sigma >= 0 && sigma <= kMaxSigma, op, ": sigmas must be between 0 and 1e6, got ", sigma);
}

// One image where the batch repeats it (stride 0), contiguous, in the arithmetic dtype.
Tensor distinct(const Tensor& images) {
  const bool repeated = images.size(0) > 1 && images.stride(0) == 0;
  Tensor kept = images;
  if (repeated) kept = torch::stable::narrow(kept, 0, 0, 1);
  const ScalarType dtype = kept.scalar_type();
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) kept = torch::stable::to(kept, ScalarType::Float);
  return dense(kept);
}

Tensor stored_as(const Tensor& values, ScalarType dtype) {
  return values.scalar_type() == dtype ? values : torch::stable::to(values, dtype);
}

void fill(const Tensor& images, const std::vector<Kernels>& kernels, int64_t boundary, const Tensor& levels,
          const Tensor* derivatives) {
  if (levels.numel() == 0) return;
  prefer_large_pages(levels);
  if (derivatives != nullptr) prefer_large_pages(*derivatives);
  if (images.scalar_type() == ScalarType::Double)
    fill<double>(images, kernels, boundary == 1, levels, derivatives);
  else
    fill<float>(images, kernels, boundary == 1, levels, derivatives);
}

Tensor gaussian_scale_space_cpu(const Tensor& images, FloatList sigmas, int64_t boundary) {
  check("pysal::gaussian_scale_space", images, sigmas, 0.0, boundary);
  const Tensor source = distinct(images);
  const Tensor levels = empty(source, images.sizes());
  std::vector<Kernels> kernels;
  for (const double sigma : sigmas) kernels.push_back(level_kernel(sigma));
  fill(source, kernels, boundary, levels, nullptr);
  return stored_as(levels, images.scalar_type());
}

std::tuple<Tensor, Tensor> gaussian_scale_space_derivative_cpu(const Tensor& images, FloatList sigmas, double step,
                                                               int64_t boundary) {
  check("pysal::gaussian_scale_space_derivative", images, sigmas, step, boundary);
  const Tensor source = distinct(images);
  const Tensor levels = empty(source, images.sizes()), derivatives = empty(source, images.sizes());
  std::vector<Kernels> kernels;
  for (const double sigma : sigmas) kernels.push_back(derivative_kernels(sigma, step));
  fill(source, kernels, boundary, levels, &derivatives);
  return {stored_as(levels, images.scalar_type()), stored_as(derivatives, images.scalar_type())};
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("gaussian_scale_space", TORCH_BOX(&pysal::cpu::gaussian_scale_space_cpu));
  m.impl("gaussian_scale_space_derivative", TORCH_BOX(&pysal::cpu::gaussian_scale_space_derivative_cpu));
}
