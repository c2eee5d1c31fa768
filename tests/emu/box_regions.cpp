#include "../../csrc/cuda/box_regions.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "harness.h"

using namespace pysal::cuda;

namespace {
constexpr int64_t kCount = 5, kHeight = 6, kWidth = 7;

size_t size_of(int64_t n) { return static_cast<size_t>(n); }

// Images written out in full, float64, by a loop of their own.
template <class T>
struct Written {
  int64_t channels, box_height, box_width;
  std::unique_ptr<T[]> map, boxes;
  std::unique_ptr<int32_t[]> origins, corners;

  Written(int64_t channels, int64_t box_height, int64_t box_width)
      : channels(channels),
        box_height(box_height),
        box_width(box_width),
        map(emu_test::random<T>(size_of(kHeight * kWidth * channels))),
        boxes(emu_test::random<T>(size_of(kCount * box_height * box_width * channels), 2)),
        origins(new int32_t[2 * kCount]),
        corners(new int32_t[2 * kCount]) {
    std::mt19937 engine(3);
    for (int64_t i = 0; i < 2 * kCount; ++i) {
      origins[size_of(i)] = static_cast<int32_t>(engine() % 12) - 4;  // also beyond the map
      corners[size_of(i)] = static_cast<int32_t>(engine() % 12) - 4;
    }
  }
  BoxImages images() const {
    return {map.get(), boxes.get(), origins.get(), kCount, channels, kHeight, kWidth, box_height, box_width};
  }
  double at(int64_t n, int64_t y, int64_t x, int64_t c, double outside) const {
    if (y < 0 || y >= kHeight || x < 0 || x >= kWidth) return outside;
    const int64_t i = y - origins[size_of(2 * n)], j = x - origins[size_of(2 * n + 1)];
    if (0 <= i && i < box_height && 0 <= j && j < box_width)
      return static_cast<double>(boxes[size_of(((n * box_height + i) * box_width + j) * channels + c)]);
    return static_cast<double>(map[size_of((y * kWidth + x) * channels + c)]);
  }
};

template <class T>
void regions(DType dtype, int64_t channels, int64_t box_height, int64_t box_width, int64_t row_step,
             int64_t column_step, size_t offset = 0) {
  const Written<T> written(channels, box_height, box_width);
  const int64_t height = 9, width = 8;
  const auto all = emu_test::unwritten<T>(size_of(kCount * height * width * channels) + offset);
  T* const out = all.get() + offset;
  launch_box_regions(dtype, {written.images(), written.corners.get(), out, height, width, row_step, column_step, 0.25},
                     nullptr);
  size_t place = 0;
  for (int64_t n = 0; n < kCount; ++n)
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t c = 0; c < channels; ++c, ++place) {
          const int64_t y = written.corners[size_of(2 * n)] + i * row_step;
          const int64_t x = written.corners[size_of(2 * n + 1)] + j * column_step;
          EXPECT(static_cast<double>(out[place]) == written.at(n, y, x, c, 0.25), std::to_string(place));
        }
}

template <class T>
void depthwise(DType dtype, int64_t channels, int64_t box_height, int64_t box_width, double eps) {
  const Written<T> written(channels, box_height, box_width);
  const int64_t height = 4, width = 5, rows = 3, columns = 2, down = 2, right = 1, below = 1, beside = 3;
  const auto weight = emu_test::random<T>(size_of(rows * columns * channels), 4),
             bias = emu_test::random<T>(size_of(channels), 5);
  const auto out = emu_test::unwritten<T>(size_of(kCount * height * width * channels));
  launch_box_regions_depthwise(dtype,
                               {written.images(), written.corners.get(), weight.get(), bias.get(), out.get(), height,
                                width, rows, columns, down, right, below, beside, -0.5, 1.0},
                               nullptr);
  size_t place = 0;
  for (int64_t n = 0; n < kCount; ++n)
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t c = 0; c < channels; ++c, ++place) {
          double sum = static_cast<double>(bias[size_of(c)]);
          for (int64_t p = 0; p < rows; ++p)
            for (int64_t q = 0; q < columns; ++q) {
              const int64_t y = written.corners[size_of(2 * n)] + i * down + p * below;
              const int64_t x = written.corners[size_of(2 * n + 1)] + j * right + q * beside;
              sum +=
                  static_cast<double>(weight[size_of((p * columns + q) * channels + c)]) * written.at(n, y, x, c, 0.0);
            }
          const double expected = std::min(std::max(sum, -0.5), 1.0);
          // six products of at most 1, each rounded
          EXPECT(std::abs(static_cast<double>(out[place]) - expected) <= 8 * eps, std::to_string(place));
        }
}

template <class T>
void sums(DType dtype, int64_t channels, int64_t box_height, int64_t box_width) {
  const Written<T> written(channels, box_height, box_width);
  const auto out = emu_test::unwritten<double>(size_of(kCount * channels));
  launch_box_regions_sums(dtype, {written.images(), out.get()}, nullptr);
  for (int64_t n = 0; n < kCount; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      double expected = 0;
      for (int64_t y = 0; y < kHeight; ++y)
        for (int64_t x = 0; x < kWidth; ++x)
          expected +=
              written.at(n, y, x, c, 0.0) - static_cast<double>(written.map[size_of((y * kWidth + x) * channels + c)]);
      EXPECT(std::abs(out[size_of(n * channels + c)] - expected) <= 1e-13, std::to_string(n));
    }
}
}  // namespace

CASE(box_regions_match_images_written_out) {
  for (const int64_t channels : {1, 3, 300})
    for (const int64_t box : {0, 1, 4, 9}) {
      regions<float>(DType::float32, channels, box, 3, 1, 1);
      regions<float>(DType::float32, 8 * channels, box, 3, 1, 1);     // in words
      regions<float>(DType::float32, 8 * channels, box, 3, 1, 1, 1);  // at no address for them
      regions<double>(DType::float64, channels, 2, box, 2, 3);
      regions<c10::Half>(DType::float16, channels, box, box, 1, 2);
      regions<c10::Half>(DType::float16, 8 * channels, box, box, 1, 2);
    }
}

CASE(box_regions_depthwise_matches_its_formula) {
  for (const int64_t channels : {1, 3, 300})
    for (const int64_t box : {0, 1, 4, 9}) {
      depthwise<float>(DType::float32, channels, box, 3, 0x1p-23);
      depthwise<double>(DType::float64, channels, 2, box, 0x1p-52);
      depthwise<c10::Half>(DType::float16, channels, box, box, 0x1p-11);
    }
}

CASE(box_regions_sums_are_differences_of_sums) {
  for (const int64_t channels : {1, 3, 300})
    for (const int64_t box : {0, 1, 4, 9}) {
      sums<float>(DType::float32, channels, box, 3);
      sums<double>(DType::float64, channels, 2, box);
      sums<c10::Half>(DType::float16, channels, box, box);
    }
}
