// grad_cam: sum_k w_k A_k with w_k the mean over space of G_k, ReLU if asked (Selvaraju et al. 2017, equations 1 and
// 2), then bilinear resize with pixel centres at half integers (align_corners=False). Layouts: activations, gradients
// (B, K, h, w) contiguous or channels_last; out (B, 1, H, W) contiguous. Work split: means and sums by blocks of
// channels or pixels of one image, then lines of the result; all sums in double and in the order of memory, so the
// number of threads does not show. Reads activations and gradients once.
#include "simd/grad_cam_kernels.h"

#include "../common/checked.h"
#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "images.h"
#include "parallel.h"
#include "simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kBlock = 512;       // channels or pixels whose sums a task keeps in the first-level cache
constexpr int64_t kGrain = 32 << 10;  // elements a thread adds up at least

int64_t blocks(int64_t count) { return ceil_div(count, kBlock); }
int64_t tasks_per_thread(int64_t elements_per_task) { return 1 + kGrain / std::max<int64_t>(elements_per_task, 1); }

// Sums in double, in the order of memory; float32 has loops per instruction set (simd/grad_cam.cpp).
template <class T>
double sum(const T* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += convert<double>(values[i]);
  return total;
}

template <class T>
double dot(const double* weights, const T* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += weights[i] * convert<double>(values[i]);
  return total;
}

template <class T>
void add_scaled(double* __restrict sums, double weight, const T* __restrict values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * convert<double>(values[i]);
}

double sum(const float* values, int64_t count) { return PYSAL_PICK(grad_cam).sum(values, count); }
double dot(const double* weights, const float* values, int64_t count) {
  return PYSAL_PICK(grad_cam).dot(weights, values, count);
}
void add_scaled(double* sums, double weight, const float* values, int64_t count) {
  PYSAL_PICK(grad_cam).add_scaled(sums, weight, values, count);
}

// weights[b, k] = mean over space of gradients[b, k]
template <class T>
void mean_gradients(const T* gradients, bool channels_last, int64_t batch, Shape shape, double* weights) {
  const int64_t channels = shape.channels, pixels = shape.pixels(), per_image = blocks(channels);
  const int64_t grain = tasks_per_thread(pixels * std::min(kBlock, channels));
  parallel_for(0, batch * per_image, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / per_image, k0 = task % per_image * kBlock, k1 = std::min(k0 + kBlock, channels);
      const T* image = gradients + b * shape.size();
      double sums[kBlock] = {};
      if (channels_last) {
        for (int64_t p = 0; p < pixels; ++p) add_scaled(sums, 1.0, image + p * channels + k0, k1 - k0);
      } else {
        for (int64_t k = k0; k < k1; ++k) sums[k - k0] = sum(image + k * pixels, pixels);
      }
      for (int64_t k = k0; k < k1; ++k) weights[b * channels + k] = sums[k - k0] / static_cast<double>(pixels);
    }
  });
}

// cams[b, p] = sum over k of weights[b, k] activations[b, k, p]
template <class T>
void weigh_activations(const T* activations, bool channels_last, int64_t batch, Shape shape, const double* weights,
                       bool relu, double* cams) {
  const int64_t channels = shape.channels, pixels = shape.pixels(), per_image = blocks(pixels);
  const int64_t grain = tasks_per_thread(channels * std::min(kBlock, pixels));
  parallel_for(0, batch * per_image, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / per_image, p0 = task % per_image * kBlock, p1 = std::min(p0 + kBlock, pixels);
      const T* image = activations + b * shape.size();
      const double* weight = weights + b * channels;
      double sums[kBlock] = {};
      if (channels_last) {
        for (int64_t p = p0; p < p1; ++p) sums[p - p0] = dot(weight, image + p * channels, channels);
      } else {
        for (int64_t k = 0; k < channels; ++k) add_scaled(sums, weight[k], image + k * pixels + p0, p1 - p0);
      }
      for (int64_t p = p0; p < p1; ++p) {
        const double cam = sums[p - p0];
        cams[b * pixels + p] = relu && cam < 0.0 ? 0.0 : cam;  // NaN comes through
      }
    }
  });
}

// The two samples an output coordinate lies between, and the share of the second.
struct Tap {
  int64_t first, second;
  double share;
};

// Output i lies at (i + 1/2) from / to - 1/2, at least 0: in whole numbers, so that only the share is rounded.
std::vector<Tap> taps(int64_t from, int64_t to) {
  std::vector<Tap> all(to);
  for (int64_t i = 0; i < to; ++i) {
    const int64_t numerator = std::max<int64_t>((2 * i + 1) * from - to, 0), denominator = 2 * to;
    const int64_t first = numerator / denominator, rest = numerator % denominator;
    // a sample without a share is not read, so that NaN or infinity there stays there
    const int64_t second = rest == 0 ? first : std::min(first + 1, from - 1);
    all[i] = {first, second, static_cast<double>(rest) / static_cast<double>(denominator)};
  }
  return all;
}

// Along lines first: a line of the map serves many lines of the result, which then are sums of two without any lookup.
template <class T>
void resize(const double* cams, int64_t batch, Shape shape, int64_t height, int64_t width, T* out) {
  const std::vector<Tap> rows = taps(shape.height, height), columns = taps(shape.width, width);
  parallel_for(0, batch * height, tasks_per_thread(width), [&](int64_t begin, int64_t end) {
    std::vector<double> buffer(2 * width);
    double* lines[2] = {buffer.data(), buffer.data() + width};  // resized, the upper one first
    int64_t held[2] = {-1, -1};                                 // which lines of all maps they are
    const auto fill = [&](int slot, int64_t line) {
      if (held[slot] == line) return;
      held[slot] = line;
      const double* cam = cams + line * shape.width;
      for (int64_t x = 0; x < width; ++x) {
        const Tap tap = columns[x];
        lines[slot][x] = (1.0 - tap.share) * cam[tap.first] + tap.share * cam[tap.second];
      }
    };
    for (int64_t task = begin; task < end; ++task) {
      const Tap tap = rows[task % height];
      const int64_t map = task / height * shape.height;
      if (held[1] == map + tap.first) {
        std::swap(lines[0], lines[1]);
        std::swap(held[0], held[1]);
      }
      fill(0, map + tap.first);
      fill(1, map + tap.second);
      const double *upper = lines[0], *lower = lines[1], share = tap.share;
      T* target = out + task * width;
      for (int64_t x = 0; x < width; ++x) target[x] = convert<T>((1.0 - share) * upper[x] + share * lower[x]);
    }
  });
}

Tensor grad_cam_cpu(const Tensor& activations, const Tensor& gradients, int64_t height, int64_t width, bool relu) {
  PYSAL_CHECK(activations.dim() == 4 && activations.size(2) > 0 && activations.size(3) > 0,
              "pysal::grad_cam: activations must have 4 dimensions and at least one pixel");
  PYSAL_CHECK(gradients.is_cpu() && gradients.scalar_type() == activations.scalar_type() &&
                  gradients.sizes().equals(activations.sizes()),
              "pysal::grad_cam: gradients must have the shape, dtype and device of activations");
  PYSAL_CHECK(height >= 1 && width >= 1, "pysal::grad_cam: height and width must be at least 1, got ", height, " and ",
              width);
  const int64_t batch = activations.size(0);
  const Shape shape{activations.size(1), activations.size(2), activations.size(3)};
  const bool activations_last = is_channels_last(activations), gradients_last = is_channels_last(gradients);
  const Tensor dense_activations = dense(activations, activations_last),
               dense_gradients = dense(gradients, gradients_last);
  Tensor out = empty(activations, {batch, 1, height, width});
  if (out.numel() == 0) return out;
  product("pysal::grad_cam", "maps", {batch, shape.height, shape.width});
  product("pysal::grad_cam", "rows", {2 * height + 1, shape.height});
  product("pysal::grad_cam", "columns", {2 * width + 1, shape.width});
  std::vector<double> weights(batch * shape.channels), cams(batch * shape.pixels());
  PYSAL_DISPATCH_FLOATING(activations.scalar_type(), "grad_cam", [&] {
    mean_gradients(dense_gradients.const_data_ptr<scalar_t>(), gradients_last, batch, shape, weights.data());
    weigh_activations(dense_activations.const_data_ptr<scalar_t>(), activations_last, batch, shape, weights.data(),
                      relu, cams.data());
    resize(cams.data(), batch, shape, height, width, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) { m.impl("grad_cam", TORCH_BOX(&pysal::cpu::grad_cam_cpu)); }
