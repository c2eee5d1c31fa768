#include "../../csrc/cuda/grad_cam.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "../../csrc/emu/cuda_emu.h"
#include "harness.h"

using namespace pysal::cuda;

namespace {
struct Size {
  size_t batch, channels, height, width, out_height, out_width;
};

// The samples an output lies between and the share of the second, by the textbook formula.
void tap(size_t i, size_t from, size_t to, size_t* first, size_t* second, double* share) {
  const double at =
      std::max(0.0, (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5);
  *first = std::min(static_cast<size_t>(at), from - 1);
  *second = std::min(*first + 1, from - 1);
  *share = at - static_cast<double>(*first);
}

// offset != 0: no 16-byte words
template <class T, class A>
void matches_loop(DType dtype, Size s, bool activations_last, bool gradients_last, bool relu, size_t offset,
                  double eps) {
  const size_t pixels = s.height * s.width, size = s.batch * s.channels * pixels;
  const size_t out_size = s.batch * s.out_height * s.out_width;
  const auto activations = emu_test::random<T>(size + offset), gradients = emu_test::random<T>(size + offset, 2);
  const auto weights = emu_test::unwritten<A>(s.batch * s.channels);
  const auto out = emu_test::unwritten<T>(out_size + offset);
  const auto whole = [](size_t n) { return static_cast<int64_t>(n); };
  const int64_t before = pysal::emu::launched();
  launch_grad_cam(dtype,
                  {activations.get() + offset, gradients.get() + offset, activations_last, gradients_last,
                   whole(s.batch), whole(s.channels), whole(s.height), whole(s.width), weights.get(),
                   out.get() + offset, whole(s.out_height), whole(s.out_width), relu},
                  nullptr);
  EXPECT(pysal::emu::launched() - before <= 2);
  const auto at = [&](const std::unique_ptr<T[]>& values, bool last, size_t b, size_t k, size_t p) {
    const size_t i = last ? (b * pixels + p) * s.channels + k : (b * s.channels + k) * pixels + p;
    return static_cast<double>(values[i + offset]);
  };
  std::vector<double> cam(pixels);
  for (size_t b = 0; b < s.batch; ++b) {
    std::fill(cam.begin(), cam.end(), 0.0);
    for (size_t k = 0; k < s.channels; ++k) {
      double weight = 0;
      for (size_t p = 0; p < pixels; ++p) weight += at(gradients, gradients_last, b, k, p);
      weight /= static_cast<double>(pixels);
      for (size_t p = 0; p < pixels; ++p) cam[p] += weight * at(activations, activations_last, b, k, p);
    }
    if (relu)
      for (double& value : cam) value = std::max(value, 0.0);
    for (size_t y = 0; y < s.out_height; ++y)
      for (size_t x = 0; x < s.out_width; ++x) {
        size_t y0, y1, x0, x1;
        double down, right;
        tap(y, s.height, s.out_height, &y0, &y1, &down);
        tap(x, s.width, s.out_width, &x0, &x1, &right);
        const double above = (1 - right) * cam[y0 * s.width + x0] + right * cam[y0 * s.width + x1];
        const double below = (1 - right) * cam[y1 * s.width + x0] + right * cam[y1 * s.width + x1];
        const double expected = (1 - down) * above + down * below;
        const double got = static_cast<double>(out[(b * s.out_height + y) * s.out_width + x + offset]);
        // sums of `channels` products of at most 1, each rounded
        EXPECT(std::abs(got - expected) <= 2 * eps * static_cast<double>(s.channels + 4),
               std::to_string(b) + ", " + std::to_string(y) + ", " + std::to_string(x) + ": " + std::to_string(got) +
                   " instead of " + std::to_string(expected));
      }
  }
}
}  // namespace

CASE(grad_cam_matches_its_formula) {
  // enlarged with and without whole words, shrunk, mixed, the layer's own size, more samples than threads, one pixel
  const Size sizes[] = {{2, 5, 7, 9, 22, 31},   {1, 40, 8, 8, 40, 136}, {1, 3, 40, 33, 7, 5}, {1, 300, 9, 4, 3, 11},
                        {1, 3, 20, 20, 20, 20}, {3, 9, 1, 1, 1, 1},     {1, 0, 2, 2, 3, 3},   {0, 2, 2, 2, 3, 3}};
  for (const Size& size : sizes)
    for (const int layout : {0, 1, 2, 3})
      for (const size_t offset : {0, 1}) {
        const bool a = layout & 1, g = layout & 2, relu = offset == 0;
        matches_loop<float, float>(DType::float32, size, a, g, relu, offset, 0x1p-23);
        if (layout == 0 || layout == 3) {
          matches_loop<double, double>(DType::float64, size, a, g, relu, offset, 0x1p-52);
          matches_loop<c10::Half, float>(DType::float16, size, a, g, relu, offset, 0x1p-11);
        }
      }
}
