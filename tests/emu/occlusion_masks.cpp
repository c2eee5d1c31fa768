#include "../../csrc/cuda/occlusion_masks.h"

#include <torch/headeronly/util/Half.h>

#include <vector>

#include "harness.h"

using namespace pysal::cuda;

namespace {
constexpr size_t kRows = 35, kBatch = 3;

int64_t whole(size_t n) { return static_cast<int64_t>(n); }
int32_t image_of(size_t n) {  // runs of equal ones; some outside the batch
  return n == 1 ? -1 : n == 17 ? 3 : n == 18 ? 0x7fffffff : static_cast<int32_t>(n / 4 % 3);
}

// Exact-size blocks, so that ASan sees their ends.
std::unique_ptr<int32_t[]> numbers(size_t count, unsigned seed, int32_t low, int32_t high) {
  std::unique_ptr<int32_t[]> values(new int32_t[count]);
  std::mt19937 engine(seed);
  for (size_t i = 0; i < count; ++i)
    values[i] = low + static_cast<int32_t>(engine() % static_cast<unsigned>(high - low));
  return values;
}

struct Shape {
  size_t channels, height, width;
  size_t pixels() const { return height * width; }
  size_t size() const { return channels * pixels(); }
  size_t at(bool last, size_t c, size_t p) const { return last ? p * channels + c : c * pixels() + p; }
};

bool covers(const int32_t* box, size_t y, size_t x) {
  return box[0] <= whole(y) && whole(y) < box[2] && box[1] <= whole(x) && whole(x) < box[3];
}

template <class S, class T>
void masks(DType source, DType target, Shape shape, bool source_last, bool out_last, bool by_box,
           emu_test::Offsets offsets, bool normalised = false) {
  const size_t size = shape.size();
  const auto images = emu_test::random<S>(kBatch * size + offsets.in),
             fills = emu_test::random<S>(kBatch * size + offsets.in, 2);
  const auto out = emu_test::unwritten<T>(kRows * size + offsets.out);
  const auto labels = numbers(kBatch * shape.pixels(), 3, -1, 4), ids = numbers(kRows, 4, -2, 5);
  const auto boxes = numbers(4 * kRows, 5, -3, 12);
  const std::unique_ptr<int32_t[]> rows(new int32_t[kRows]);
  for (size_t n = 0; n < kRows; ++n) rows[n] = image_of(n);
  const auto mean = emu_test::random<double>(shape.channels, 7), std = emu_test::random<double>(shape.channels, 8);
  for (size_t c = 0; c < shape.channels; ++c) std[c] += 2.0;
  launch_occlusion(source, target,
                   {images.get() + offsets.in, fills.get() + offsets.in, source_last, normalised ? mean.get() : nullptr,
                    normalised ? std.get() : nullptr, rows.get(), by_box ? nullptr : labels.get(),
                    by_box ? nullptr : ids.get(), by_box ? boxes.get() : nullptr, out.get() + offsets.out, out_last,
                    kBatch, kRows, whole(shape.channels), whole(shape.height), whole(shape.width)},
                   nullptr);
  for (size_t n = 0; n < kRows; ++n)
    for (size_t c = 0; c < shape.channels; ++c)
      for (size_t p = 0; p < shape.pixels(); ++p) {
        const double got = static_cast<double>(out[n * size + shape.at(out_last, c, p) + offsets.out]);
        if (rows[n] < 0 || rows[n] >= whole(kBatch)) {
          EXPECT(std::isnan(got), std::to_string(n));
          continue;
        }
        const size_t image = static_cast<size_t>(rows[n]);
        const bool hidden = by_box ? covers(boxes.get() + 4 * n, p / shape.width, p % shape.width)
                                   : labels[image * shape.pixels() + p] == ids[n];
        const S expected = (hidden ? fills : images)[image * size + shape.at(source_last, c, p) + offsets.in];
        float value = static_cast<float>(expected);
        if (normalised) value = (value - static_cast<float>(mean[c])) / static_cast<float>(std[c]);
        EXPECT(got == static_cast<double>(static_cast<T>(value)), std::to_string(n));
      }
}

template <class T>
void label_map(DType dtype, size_t classes, size_t segments, size_t pixels, size_t offset) {
  const auto scores = emu_test::random<T>(kBatch * classes * segments);
  const auto out = emu_test::unwritten<T>(kBatch * classes * pixels + offset);
  const auto labels = numbers(kBatch * pixels, 1, -2, static_cast<int32_t>(segments) + 2);
  launch_occlusion_map(
      dtype, {scores.get(), labels.get(), out.get() + offset, kBatch, whole(classes), whole(segments), whole(pixels)},
      nullptr);
  for (size_t plane = 0; plane < kBatch * classes; ++plane)
    for (size_t p = 0; p < pixels; ++p) {
      const int32_t label = labels[plane / classes * pixels + p];
      const bool known = label >= 0 && label < whole(segments);
      const double expected = known ? static_cast<double>(scores[plane * segments + static_cast<size_t>(label)]) : 0.0;
      EXPECT(static_cast<double>(out[plane * pixels + p + offset]) == expected, std::to_string(plane));
    }
}

template <class T>
void box_map(DType dtype, size_t planes, size_t segments, size_t height, size_t width, double eps) {
  const auto scores = emu_test::random<T>(planes * segments);
  const auto out = emu_test::unwritten<T>(planes * height * width);
  const auto boxes = numbers(4 * segments, 6, -9, static_cast<int32_t>(width) + 9);
  launch_occlusion_boxes_map(
      dtype, {scores.get(), boxes.get(), out.get(), whole(planes), whole(segments), whole(height), whole(width)},
      nullptr);
  for (size_t plane = 0; plane < planes; ++plane)
    for (size_t p = 0; p < height * width; ++p) {
      double sum = 0, count = 0;
      for (size_t s = 0; s < segments; ++s) {
        if (!covers(boxes.get() + 4 * s, p / width, p % width)) continue;
        sum += static_cast<double>(scores[plane * segments + s]);
        ++count;
      }
      const double mean = count > 0 ? sum / count : 0.0;
      const double got = static_cast<double>(out[plane * height * width + p]);
      EXPECT(std::abs(got - mean) <= eps * (1 + count), std::to_string(p));
    }
}
}  // namespace

CASE(occlusion_masks_select) {
  // whole words, more of them than a block has threads, no whole words, one pixel, nothing
  for (const Shape shape : {Shape{3, 4, 6}, Shape{3, 20, 24}, Shape{3, 5, 7}, Shape{2, 1, 1}, Shape{2, 0, 3}})
    for (const int lasts : {0, 1, 2, 3})
      for (const emu_test::Offsets offsets : emu_test::kOffsets)
        for (const bool by_box : {false, true}) {
          const bool source = lasts & 1, out = lasts & 2;
          masks<float, float>(DType::float32, DType::float32, shape, source, out, by_box, offsets);
          masks<float, float>(DType::float32, DType::float32, shape, source, out, by_box, offsets, true);
          if (offsets.in != offsets.out) continue;
          masks<c10::Half, c10::Half>(DType::float16, DType::float16, shape, source, out, by_box, offsets, true);
          masks<float, c10::Half>(DType::float32, DType::float16, shape, source, out, by_box, offsets);
          masks<c10::Half, double>(DType::float16, DType::float64, shape, source, out, by_box, offsets);
        }
}

CASE(occlusion_masks_map_is_a_look_up) {
  for (const size_t pixels : {0, 1, 24, 1100, 1104})
    for (const size_t classes : {1, 19})
      for (const size_t offset : {0, 1}) {
        label_map<float>(DType::float32, classes, 5, pixels, offset);
        label_map<c10::Half>(DType::float16, classes, 5, pixels, offset);
        label_map<double>(DType::float64, classes, 0, pixels, offset);
      }
}

CASE(occlusion_masks_boxes_map_is_a_mean) {
  for (const size_t segments : {0, 1, 255, 300, 600})
    for (const size_t height : {1, 19}) {
      box_map<float>(DType::float32, 2, segments, height, 37, 0x1p-23);
      box_map<double>(DType::float64, 1, segments, height, 8, 0x1p-52);
      box_map<c10::Half>(DType::float16, 1, segments, height, 33, 0x1p-10);
    }
}
