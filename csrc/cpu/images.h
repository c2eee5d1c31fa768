// Batches of images in memory, and copies of their pixels between dtypes and memory formats.
#pragma once
#include <cstring>

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

// float16 from and to float, ties to even, choosing between cases by masks: compilers vectorise loops over these and
// not over c10::Half's own conversions.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <>
inline c10::Half convert<c10::Half, float>(float value) {
  constexpr uint32_t kInfinity = 255u << 23, kTooLarge = 143u << 23, kSmallestNormal = 113u << 23;
  constexpr uint32_t kHalf = 126u << 23;  // 0.5: adding it rounds to multiples of 2^-24, the subnormal float16
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kHalf)) - kHalf;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = choose(magnitude > kInfinity, 0x7e00u, 0x7c00u);
  const uint32_t finite = choose(magnitude < kSmallestNormal, subnormal, normal);
  const uint32_t result = choose(magnitude >= kTooLarge, special, finite) | (bits ^ magnitude) >> 16;
  return c10::Half(static_cast<uint16_t>(result), c10::Half::from_bits());
}

template <>
inline float convert<float, c10::Half>(c10::Half value) {
  const uint32_t sign = (value.x & 0x8000u) << 16, magnitude = value.x & 0x7fffu;
  // times 2^112 moves the exponent and makes subnormal numbers normal; 0x7c00 and above are infinity and NaN
  const uint32_t finite = bits_of(float_of(magnitude << 13) * float_of(239u << 23));
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return float_of(choose(magnitude >= 0x7c00u, special, finite) | sign);
}

template <>
inline double convert<double, c10::Half>(c10::Half value) {
  return convert<float>(value);
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
