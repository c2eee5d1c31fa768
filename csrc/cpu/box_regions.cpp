// box_regions: regions of images that are one map but for a box each. Pixel (i, j) of region n is pixel
// (y, x) = corners[n] + (i row_step, j column_step) of image n: boxes[n] at (y, x) - origins[n] where that lies in the
// box, else the map, else, beyond the map's edge, a constant. box_regions_depthwise convolves such regions (each
// channel by itself, zeros beyond the edge) without writing them; box_regions_sums sums boxes[n] - map over box n.
// Layouts: map (1, C, H, W), boxes (N, C, h, w) and regions channels_last, weight (kh, kw, C).
// Work split: a task is some lines of some regions; sums by image. Each output element is written once; a copied line
// is at most five runs of memory, a convolved line reads its taps through one pointer per input pixel.
#include <cstring>

#include "../common/checked.h"
#include "../common/torch_stable.h"
#include "images.h"
#include "indices.h"
#include "parallel.h"
#include "simd/box_regions_kernels.h"
#include "simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kTaskElements = 16 << 10;  // a thread's least work, several times the cost of waking it

// The images: one map, and in image n the box at origins[n].
template <class T>
struct Images {
  const T* map;
  const T* boxes;
  const int32_t* origins;  // (N, 2)
  Shape shape;
  int64_t height, width;  // of a box

  // Line y of image n: where the map's pixel 0 is, and the box's pixels [left, right), if any.
  struct Line {
    const T* map;
    const T* box;
    int64_t left, right;
  };
  Line line(int64_t n, int64_t y) const {
    const int64_t in_box = y - origins[2 * n];
    Line line{map + y * shape.width * shape.channels, nullptr, 0, 0};
    if (in_box < 0 || in_box >= height) return line;
    line.box = boxes + (n * height + in_box) * width * shape.channels;
    line.left = origins[2 * n + 1];
    line.right = line.left + width;
    return line;
  }
  const T* pixel(const Line& line, int64_t x) const {
    const bool in_box = x >= line.left && x < line.right;
    return in_box ? line.box + (x - line.left) * shape.channels : line.map + x * shape.channels;
  }
};

struct Checked {
  Tensor map, boxes, origins;
  Shape shape;
};

Checked check(const char* op, const Tensor& map, const Tensor& boxes, const Tensor& origins) {
  PYSAL_CHECK(map.dim() == 4 && map.size(0) == 1, "pysal::", op, ": map must be (1, C, H, W)");
  PYSAL_CHECK(
      boxes.dim() == 4 && boxes.size(1) == map.size(1) && boxes.is_cpu() && boxes.scalar_type() == map.scalar_type(),
      "pysal::", op, ": boxes must be (N, C, h, w) with the channels, dtype and device of map");
  return {dense(map, true),
          dense(boxes, true),
          int32_values(op, "origins", origins, 2 * boxes.size(0)),
          {map.size(1), map.size(2), map.size(3)}};
}

template <class T>
Images<T> images_of(const Checked& checked) {
  return {checked.map.const_data_ptr<T>(),
          checked.boxes.const_data_ptr<T>(),
          checked.origins.const_data_ptr<int32_t>(),
          checked.shape,
          checked.boxes.size(2),
          checked.boxes.size(3)};
}

// Pixels [x0, x0 + width) of a line, beyond whose ends is `outside`.
template <class T>
void copy_line(const Images<T>& images, const typename Images<T>::Line& line, int64_t x0, int64_t width, T outside,
               T* target) {
  const int64_t channels = images.shape.channels, x1 = x0 + width;
  const int64_t first = std::clamp<int64_t>(0, x0, x1), last = std::clamp<int64_t>(images.shape.width, first, x1);
  const auto place = [&](int64_t x) { return target + (x - x0) * channels; };
  const auto copy = [&](int64_t from, int64_t to, const T* source) {
    if (to > from) std::memcpy(place(from), source, (to - from) * channels * sizeof(T));
  };
  std::fill(target, place(first), outside);
  std::fill(place(last), place(x1), outside);
  const int64_t left = std::clamp(line.left, first, last), right = std::clamp(line.right, left, last);
  if (left == right) return copy(first, last, line.map + first * channels);
  copy(first, left, line.map + first * channels);
  copy(left, right, line.box + (left - line.left) * channels);
  copy(right, last, line.map + right * channels);
}

Tensor box_regions_cpu(const Tensor& map, const Tensor& boxes, const Tensor& origins, const Tensor& corners,
                       int64_t height, int64_t width, int64_t row_step, int64_t column_step, double outside) {
  const Checked checked = check("box_regions", map, boxes, origins);
  const int64_t count = boxes.size(0), channels = checked.shape.channels;
  const Tensor corner = int32_values("box_regions", "corners", corners, 2 * count);
  PYSAL_CHECK(height >= 0 && width >= 0 && row_step >= 1 && column_step >= 1,
              "pysal::box_regions: sizes must be at least 0 and steps at least 1");
  reach("pysal::box_regions", "rows", {{height, row_step}});
  reach("pysal::box_regions", "columns", {{width, column_step}});
  Tensor out = empty(map, {count, channels, height, width}, std::nullopt, true);
  if (out.numel() == 0) return out;
  const int32_t* first = corner.const_data_ptr<int32_t>();
  PYSAL_DISPATCH_FLOATING(map.scalar_type(), "box_regions", [&] {
    const Images<scalar_t> images = images_of<scalar_t>(checked);
    const Shape shape = images.shape;
    const scalar_t beyond = static_cast<scalar_t>(outside);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    const int64_t line_size = width * channels;
    parallel_for(0, count * height, 1 + kTaskElements / line_size, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / height, y = first[2 * n] + task % height * row_step, x0 = first[2 * n + 1];
        scalar_t* const to = target + task * line_size;
        if (y < 0 || y >= shape.height) {
          std::fill(to, to + line_size, beyond);
          continue;
        }
        const auto line = images.line(n, y);
        if (column_step == 1) {
          copy_line(images, line, x0, width, beyond, to);
          continue;
        }
        for (int64_t j = 0; j < width; ++j) {
          const int64_t x = x0 + j * column_step;
          if (x < 0 || x >= shape.width)
            std::fill(to + j * channels, to + (j + 1) * channels, beyond);
          else
            std::memcpy(to + j * channels, images.pixel(line, x), channels * sizeof(scalar_t));
        }
      }
    });
  });
  return out;
}

// `width` pixels of one line: pixel j, tap (p, q) reads taps[p * across + j * step + q * dilation].
template <class T>
void convolve_line(const T* const* taps, int64_t across, const DepthwiseLine& line, const T* weight, const T* bias,
                   T* target) {
  using A = arithmetic_t<T>;
  const A lower = static_cast<A>(line.lower), upper = static_cast<A>(line.upper);
  for (int64_t j = 0; j < line.width; ++j)
    for (int64_t c = 0; c < line.channels; ++c) {
      A sum = static_cast<A>(bias[c]);
      for (int64_t p = 0; p < line.kernel_height; ++p)
        for (int64_t q = 0; q < line.kernel_width; ++q)
          sum += static_cast<A>(weight[(p * line.kernel_width + q) * line.channels + c]) *
                 static_cast<A>(taps[p * across + j * line.step + q * line.dilation][c]);
      sum = sum < lower ? lower : sum;  // comparisons with NaN are false, so it comes through
      target[j * line.channels + c] = static_cast<T>(sum > upper ? upper : sum);
    }
}

void convolve_line(const float* const* taps, int64_t across, const DepthwiseLine& line, const float* weight,
                   const float* bias, float* target) {
  PYSAL_PICK(box_regions).depthwise(taps, across, line, weight, bias, target);
}

Tensor box_regions_depthwise_cpu(const Tensor& map, const Tensor& boxes, const Tensor& origins, const Tensor& corners,
                                 int64_t height, int64_t width, const Tensor& weight, const Tensor& bias,
                                 int64_t row_step, int64_t column_step, int64_t row_dilation, int64_t column_dilation,
                                 double lower, double upper) {
  const char* op = "box_regions_depthwise";
  const Checked checked = check(op, map, boxes, origins);
  const int64_t count = boxes.size(0), channels = checked.shape.channels;
  const Tensor corner = int32_values(op, "corners", corners, 2 * count);
  PYSAL_CHECK(
      height >= 0 && width >= 0 && row_step >= 1 && column_step >= 1 && row_dilation >= 1 && column_dilation >= 1,
      "pysal::", op, ": sizes must be at least 0, steps and dilations at least 1");
  PYSAL_CHECK(weight.dim() == 3 && weight.size(2) == channels && weight.numel() > 0 && weight.is_cpu() &&
                  weight.scalar_type() == map.scalar_type() && bias.dim() == 1 && bias.size(0) == channels &&
                  bias.is_cpu() && bias.scalar_type() == map.scalar_type(),
              "pysal::", op, ": weight must be (kh, kw, C) and bias (C,) with the dtype and device of map");
  const int64_t kernel_height = weight.size(0), kernel_width = weight.size(1);
  reach("pysal::box_regions_depthwise", "rows", {{height, row_step}, {kernel_height, row_dilation}});
  const int64_t across =
      reach("pysal::box_regions_depthwise", "columns", {{width, column_step}, {kernel_width, column_dilation}}) + 1;
  Tensor out = empty(map, {count, channels, height, width}, std::nullopt, true);
  if (out.numel() == 0) return out;
  const Tensor weights = dense(weight), biases = dense(bias);
  const int32_t* first = corner.const_data_ptr<int32_t>();
  // where few of the pixels across are read, only those have pointers
  const bool few = width * kernel_width < across;
  const int64_t pointers = few ? width * kernel_width : across;
  const DepthwiseLine line{
      width, channels, kernel_height, kernel_width, few ? kernel_width : column_step, few ? 1 : column_dilation,
      lower, upper};
  const int64_t line_work =
      product("pysal::box_regions_depthwise", "work on a line", {width, channels, kernel_height, kernel_width});
  product("pysal::box_regions_depthwise", "pointers to pixels", {pointers, kernel_height});
  PYSAL_DISPATCH_FLOATING(map.scalar_type(), "box_regions_depthwise", [&] {
    const Images<scalar_t> images = images_of<scalar_t>(checked);
    const Shape shape = images.shape;
    const scalar_t* values = weights.const_data_ptr<scalar_t>();
    const scalar_t* shift = biases.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    parallel_for(0, count * height, 1 + kTaskElements / line_work, [&](int64_t begin, int64_t end) {
      const std::vector<scalar_t> zeros(channels, static_cast<scalar_t>(0.0f));
      std::vector<const scalar_t*> taps(kernel_height * pointers);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / height, y0 = first[2 * n] + task % height * row_step, x0 = first[2 * n + 1];
        for (int64_t p = 0; p < kernel_height; ++p) {
          const int64_t y = y0 + p * row_dilation;
          const scalar_t** const at = taps.data() + p * pointers;
          if (y < 0 || y >= shape.height) {
            std::fill(at, at + pointers, zeros.data());
            continue;
          }
          const auto source = images.line(n, y);
          for (int64_t i = 0; i < pointers; ++i) {
            const int64_t x = x0 + (few ? i / kernel_width * column_step + i % kernel_width * column_dilation : i);
            at[i] = x < 0 || x >= shape.width ? zeros.data() : images.pixel(source, x);
          }
        }
        convolve_line(taps.data(), pointers, line, values, shift, target + task * width * channels);
      }
    });
  });
  return out;
}

Tensor box_regions_sums_cpu(const Tensor& map, const Tensor& boxes, const Tensor& origins) {
  const Checked checked = check("box_regions_sums", map, boxes, origins);
  const int64_t count = boxes.size(0), channels = checked.shape.channels;
  Tensor out = empty(map, {count, channels}, ScalarType::Double);
  if (out.numel() == 0) return out;
  double* target = out.mutable_data_ptr<double>();
  PYSAL_DISPATCH_FLOATING(map.scalar_type(), "box_regions_sums", [&] {
    const Images<scalar_t> images = images_of<scalar_t>(checked);
    const Shape shape = images.shape;
    const int64_t work = channels * (1 + images.height * images.width);
    parallel_for(0, count, 1 + kTaskElements / work, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        double* const sums = target + n * channels;
        std::fill(sums, sums + channels, 0.0);
        const int64_t top = images.origins[2 * n];
        for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + images.height, shape.height); ++y) {
          const auto line = images.line(n, y);
          const int64_t left = std::max<int64_t>(line.left, 0), right = std::min(line.right, shape.width);
          for (int64_t x = left; x < right; ++x) {
            const scalar_t* changed = images.pixel(line, x);
            const scalar_t* clean = line.map + x * channels;
            for (int64_t c = 0; c < channels; ++c)
              sums[c] += static_cast<double>(changed[c]) - static_cast<double>(clean[c]);
          }
        }
      }
    });
  });
  return out;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("box_regions", TORCH_BOX(&pysal::cpu::box_regions_cpu));
  m.impl("box_regions_depthwise", TORCH_BOX(&pysal::cpu::box_regions_depthwise_cpu));
  m.impl("box_regions_sums", TORCH_BOX(&pysal::cpu::box_regions_sums_cpu));
}
