#include "../../csrc/cuda/gaussian_scale_space.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "harness.h"

using namespace pysal::cuda;

namespace {
using Line = std::vector<long double>;

// taps -radius..radius of sigma, 0 past its own radius
Line taps_of(double sigma, int radius) {
  Line taps;
  long double sum = 0;
  for (int j = -radius; j <= radius; ++j) {
    const bool within = std::abs(j) <= static_cast<int>(4 * sigma + 0.5);
    taps.push_back(j == 0 ? 1.0L : within ? std::exp(-0.5L * j * j / (static_cast<long double>(sigma) * sigma)) : 0.0L);
    sum += taps.back();
  }
  for (long double& tap : taps) tap /= sum;
  return taps;
}

// one line of `size` values, `stride` apart
void filter(Line& plane, size_t begin, size_t size, size_t stride, const Line& taps, bool reflect) {
  const int radius = static_cast<int>(taps.size() / 2), length = static_cast<int>(size);
  Line filtered(size);
  for (int i = 0; i < length; ++i)
    for (int j = -radius; j <= radius; ++j) {
      int place = i + j;
      if (!reflect && (place < 0 || place >= length)) continue;
      while (place < 0 || place >= length) place = place < 0 ? -1 - place : 2 * length - 1 - place;
      filtered[static_cast<size_t>(i)] +=
          taps[static_cast<size_t>(j + radius)] * plane[begin + static_cast<size_t>(place) * stride];
    }
  for (size_t i = 0; i < size; ++i) plane[begin + i * stride] = filtered[i];
}

Line blur(Line plane, size_t height, size_t width, double sigma, int radius, bool reflect) {
  const Line taps = taps_of(sigma, radius);
  for (size_t x = 0; x < width; ++x) filter(plane, x, height, width, taps, reflect);
  for (size_t y = 0; y < height; ++y) filter(plane, y * width, width, 1, taps, reflect);
  return plane;
}

struct Options {
  double step = 0.01;
  bool derivative = true, reflect = false, repeated = false;
};

template <class T>
void matches_its_formula(DType dtype, const std::vector<double>& sigmas, size_t channels, size_t height, size_t width,
                         Options options) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const size_t count = sigmas.size(), pixels = height * width, planes = count * channels, total = planes * pixels;
  const size_t both = options.derivative ? 2 : 1, kinds = options.derivative ? 3 : 1;
  const auto images = emu_test::random<T>(options.repeated ? channels * pixels : total);
  const auto levels = emu_test::unwritten<T>(total), derivatives = emu_test::unwritten<T>(total);
  const auto columns = emu_test::unwritten<A>(both * total);
  const auto taps = emu_test::unwritten<A>(kinds * count * (height + width + 2));
  const std::unique_ptr<int32_t[]> reaches(new int32_t[2 * count]);
  launch_gaussian_scale_space(
      dtype,
      {images.get(), levels.get(), options.derivative ? derivatives.get() : nullptr, sigmas.data(),
       options.derivative ? options.step : 0.0, static_cast<int64_t>(count), static_cast<int64_t>(channels),
       static_cast<int64_t>(height), static_cast<int64_t>(width), options.repeated, options.reflect, columns.get(),
       taps.get(), reaches.get()},
      nullptr);
  for (size_t plane = 0; plane < planes; ++plane) {
    const double sigma = sigmas[plane / channels], step = options.derivative ? options.step : 0.0;
    const size_t from = (options.repeated ? plane % channels : plane) * pixels;
    Line x(pixels);
    for (size_t i = 0; i < pixels; ++i) x[i] = static_cast<long double>(static_cast<double>(images[from + i]));
    const int radius = static_cast<int>(4 * (sigma + step) + 0.5);
    const Line level = blur(x, height, width, sigma, radius, options.reflect);
    const Line after = blur(x, height, width, sigma + step, radius, options.reflect);
    // |x| <= 1 and taps sum to 1, their slopes to less than 4 / sigma: a rounding per term of both sums
    const double terms =
        static_cast<double>(2 * std::min<size_t>(2 * static_cast<size_t>(radius), height + width) + 40);
    const double rounding = terms * static_cast<double>(std::numeric_limits<A>::epsilon());
    const double storage = static_cast<double>(std::numeric_limits<T>::epsilon());
    for (size_t i = 0; i < pixels; ++i) {
      const std::string where = std::to_string(sigma) + " plane " + std::to_string(plane) + " " + std::to_string(i);
      const double exact = static_cast<double>(level[i]);
      const double error = std::abs(static_cast<double>(levels[plane * pixels + i]) - exact);
      EXPECT(error <= rounding + storage * std::abs(exact), where);
      if (!options.derivative) continue;
      const double slope = static_cast<double>((after[i] - level[i]) / step);
      const double off = std::abs(static_cast<double>(derivatives[plane * pixels + i]) - slope);
      EXPECT(off <= 4 / std::max(sigma, 0.25) * (rounding + storage), where);
    }
  }
}
}  // namespace

// past a tile of 64 lines and of 32 columns both ways; radii from 0 to past the side; 1.37, where that of sigma + h is
// wider
CASE(scale_space_matches_its_formula) {
  for (const bool reflect : {false, true})
    for (const bool derivative : {false, true}) {
      const Options options{0.01, derivative, reflect, false};
      matches_its_formula<float>(DType::float32, {0.0, 0.3, 1.37, 40.0}, 2, 5, 7, options);
      matches_its_formula<float>(DType::float32, {3.0}, 1, 70, 40, options);
      matches_its_formula<float>(DType::float32, {20.0}, 1, 3, 150, options);
      matches_its_formula<double>(DType::float64, {1.2, 9.0}, 1, 65, 33, options);
      matches_its_formula<c10::Half>(DType::float16, {1.2, 9.0}, 1, 9, 33, options);
    }
}

CASE(scale_space_of_one_image_repeated) {
  matches_its_formula<float>(DType::float32, {0.0, 1.0, 2.0}, 2, 6, 5, {0.01, true, true, true});
}

// more than the sigmas of one launch
CASE(scale_space_of_many_sigmas) {
  std::vector<double> sigmas;
  for (int n = 0; n < 67; ++n) sigmas.push_back(0.1 * n);
  matches_its_formula<float>(DType::float32, sigmas, 1, 2, 3, {0.01, true, false, true});
}
