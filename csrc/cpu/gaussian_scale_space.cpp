// gaussian_scale_space: L = K x K^T, a separable Gaussian blur with its own sigma for each image of a batch, and
// gaussian_scale_space_derivative: L with D = (L(sigma + h) - L(sigma)) / h or, for h = 0, dL/dsigma (Xu et al. 2020,
// arXiv:2004.03383, eq. 7). Tensors are (N, C, H, W), contiguous, or (1, C, H, W) for a batch that repeats one image.
// Here: the taps, in double, and the split of the work; simd/gaussian_scale_space.cpp has the loops.
// Taps: k[j] ~ exp(-j^2 / (2 sigma^2)), |j| <= r = int(4 sigma + 0.5), normalised. The difference kernel never
// subtracts two nearly equal numbers: with g the weights, Z their sum, k = g / Z,
//   (k' - k) = (dg - k sum(dg)) / Z',   dg = g expm1(j^2 (1/sigma^2 - 1/sigma'^2) / 2)   (g' where |j| > r)
// and in the limit h = 0, dg/dsigma = g j^2 / sigma^3.
// Work split: blocks of 8 rows of a plane, handed out as threads ask for them: their costs differ with sigma.
#include "simd/gaussian_scale_space_kernels.h"

#include "../common/torch_stable.h"
#include "pages.h"
#include "simd/level.h"

#include <atomic>
#include <cmath>

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

// A kernel as the loops want it for a side of that size: both halves, zeros around, no tap that reaches nothing.
template <class T>
class Taps {
 public:
  Taps(const Kernels& kernels, int64_t size, bool reflect) {
    const int64_t length = static_cast<int64_t>(kernels.level.size()) - 1;
    taps_.radius = std::min(length, reflect ? size : size - 1);
    const bool fold = reflect && length > size;  // the reflected line has the period 2 size
    taps_.level = spread(kernels.level, size, fold, level_);
    taps_.next = spread(kernels.next, size, fold, next_);
    taps_.slope = spread(kernels.slope, size, fold, slope_);
  }
  const ScaleSpaceTaps<T>& get() const { return taps_; }

 private:
  const T* spread(const std::vector<double>& half, int64_t size, bool fold, std::vector<T>& out) {
    if (half.empty()) return nullptr;
    const int64_t radius = taps_.radius, centre = radius + kScaleSpaceMargin;
    std::vector<double> full(2 * centre + 1, 0.0);
    if (fold) {
      // position j mod 2 size, as one of -size..size
      for (int64_t j = 0; j < static_cast<int64_t>(half.size()); ++j) {
        const int64_t m = j % (2 * size), positive = m > size ? m - 2 * size : m;
        full[centre + positive] += half[j];
        if (j != 0) full[centre - positive] += half[j];
      }
    } else {
      for (int64_t j = -radius; j <= radius; ++j) full[centre + j] = half[std::abs(j)];
    }
    out.assign(full.begin(), full.end());
    return out.data() + centre;
  }

  std::vector<T> level_, next_, slope_;
  ScaleSpaceTaps<T> taps_;
};

template <class T>
struct ImageTaps {
  Taps<T> horizontal;
  std::vector<Taps<T>> other;  // the vertical ones, where the sides differ
  const ScaleSpaceTaps<T>& vertical() const { return other.empty() ? horizontal.get() : other[0].get(); }
};

void run_rows(const ScaleSpacePlane<float>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).float_rows(plane, begin, end);
}
void run_rows(const ScaleSpacePlane<double>& plane, int64_t begin, int64_t end) {
  PYSAL_PICK(gaussian_scale_space).double_rows(plane, begin, end);
}

// images is contiguous: (N, C, H, W), or (1, C, H, W) where all rows of the batch are one image
template <class T>
void fill(const Tensor& images, const std::vector<Kernels>& kernels, bool reflect, const Tensor& levels,
          const Tensor* derivatives) {
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t pixels = height * width, image = images.size(0) == 1 ? 0 : channels * pixels;
  std::vector<ImageTaps<T>> taps;
  int64_t reach = 0;
  for (const Kernels& kernel : kernels) {
    taps.push_back({Taps<T>(kernel, width, reflect), {}});
    if (height != width) taps.back().other.emplace_back(kernel, height, reflect);
    reach += taps.back().vertical().radius + taps.back().horizontal.get().radius;
  }
  const T* source = images.const_data_ptr<T>();
  T* out = levels.mutable_data_ptr<T>();
  T* slopes = derivatives == nullptr ? nullptr : derivatives->mutable_data_ptr<T>();
  const int64_t count = static_cast<int64_t>(kernels.size());
  const int64_t blocks = (height + kScaleSpaceRows - 1) / kScaleSpaceRows, total = count * channels * blocks;
  const int64_t taps_per_pixel = 2 * (reach / count) + 2 * kScaleSpaceMargin;
  const int64_t batch =
      std::max<int64_t>(1, kMultiplications / (kScaleSpaceRows * width * taps_per_pixel * (slopes == nullptr ? 1 : 3)));
  const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), (total + batch - 1) / batch);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    std::vector<T> scratch(2 * kScaleSpaceRows * width);
    for (int64_t begin = next.fetch_add(batch); begin < total; begin = next.fetch_add(batch)) {
      for (int64_t item = begin; item < std::min(begin + batch, total); ++item) {
        const int64_t row = item % blocks * kScaleSpaceRows, plane = item / blocks, n = plane / channels;
        const ScaleSpacePlane<T> work{source + n * image + plane % channels * pixels,
                                      out + plane * pixels,
                                      slopes == nullptr ? nullptr : slopes + plane * pixels,
                                      height,
                                      width,
                                      reflect,
                                      taps[n].vertical(),
                                      taps[n].horizontal.get(),
                                      scratch.data()};
        run_rows(work, row, std::min(row + kScaleSpaceRows, height));
      }
    }
  });
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
