// Batches of images in memory, and copies of their pixels between dtypes and memory formats.
#pragma once
#include "../common/torch_stable.h"

namespace pysal::cpu {
struct Shape {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t size() const { return channels * pixels(); }
};

// Where an image lies: element (c, y, x) is data[c * pixels + y * width + x], or channels_last
// data[(y * width + x) * channels + c].
template <class T>
struct Image {
  T* data;
  bool channels_last;
};

template <class Target, class Source>
Target convert(Source value) {
  return static_cast<Target>(static_cast<arithmetic_t<Target>>(value));
}

// Writes the pixels [first, first + count) of an image in another dtype and format. `target` is where channel 0 of
// pixel `first` goes, `plane` the distance from one channel to the next where target is not channels_last.
template <class Source, class Target>
void copy_pixels(Image<const Source> image, Shape shape, int64_t first, int64_t count, Target* __restrict target,
                 bool target_last, int64_t plane) {
  const int64_t channels = shape.channels, pixels = shape.pixels();
  const Source* __restrict source = image.data + (image.channels_last ? first * channels : first);
  if (image.channels_last && target_last) {
    for (int64_t i = 0; i < count * channels; ++i) target[i] = convert<Target>(source[i]);
  } else if (!image.channels_last && !target_last) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) target[c * plane + i] = convert<Target>(source[c * pixels + i]);
  } else if (target_last && channels == 3) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < 3; ++c) target[3 * i + c] = convert<Target>(source[c * pixels + i]);
  } else if (target_last) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) target[i * channels + c] = convert<Target>(source[c * pixels + i]);
  } else if (channels == 3) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < 3; ++c) target[c * plane + i] = convert<Target>(source[3 * i + c]);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) target[c * plane + i] = convert<Target>(source[i * channels + c]);
  }
}
}  // namespace pysal::cpu
