#include "../../csrc/cuda/gaussian_noise.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <limits>

#include "harness.h"

using namespace pysal::cuda;

namespace {
constexpr int64_t kSeed = -0x0123456789abcdef;
const int64_t kIds[] = {0, -1, (int64_t(1) << 40) + 17}, kSamples[] = {0, (int64_t(1) << 32) - 1, 5};
const int32_t kRows[] = {1, 0, 1};
const double kScales[] = {0.5, 2.0};

uint32_t word_of(int64_t seed, int64_t id, int64_t sample, size_t element) {
  const auto low = [](uint64_t value) { return value & 0xffffffffu; };
  uint64_t c[] = {element / 4, low(sample), low(id), static_cast<uint64_t>(id) >> 32};
  uint64_t key[] = {low(seed), static_cast<uint64_t>(seed) >> 32};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = c[0] * 0xD2511F53u, b = c[2] * 0xCD9E8D57u;
    const uint64_t next[] = {(b >> 32) ^ c[1] ^ key[0], low(b), (a >> 32) ^ c[3] ^ key[1], low(a)};
    for (int k = 0; k < 4; ++k) c[k] = next[k];
    key[0] = low(key[0] + 0x9E3779B9u);
    key[1] = low(key[1] + 0xBB67AE85u);
  }
  return static_cast<uint32_t>(c[element % 4]);
}

double normal_of(size_t n, size_t element) {
  const size_t pair = element / 2 * 2;
  const double u = (word_of(kSeed, kIds[n], kSamples[n], pair) + 0.5) / 4294967296.0;
  const double v = (word_of(kSeed, kIds[n], kSamples[n], pair + 1) + 0.5) / 4294967296.0;
  const double angle = 6.283185307179586 * v;
  return std::sqrt(-2 * std::log(u)) * (element % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

template <class T>
struct Dtype;
template <>
struct Dtype<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct Dtype<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct Dtype<c10::Half> {
  static constexpr DType value = DType::float16;
};
template <>
struct Dtype<c10::BFloat16> {
  static constexpr DType value = DType::bfloat16;
};

template <class Source, class Target>
void adds_noise(size_t channels, size_t pixels, bool images_last, bool output_last, emu_test::Offsets offsets) {
  const size_t size = channels * pixels;
  const auto images = emu_test::random<Source>(2 * size + offsets.in);
  const auto output = emu_test::unwritten<Target>(3 * size + offsets.out);
  launch_gaussian_noise({images.get() + offsets.in, output.get() + offsets.out, Dtype<Source>::value,
                         Dtype<Target>::value, images_last, output_last, kScales, kRows, kIds, kSamples, kSeed, 2, 3,
                         static_cast<int64_t>(channels), static_cast<int64_t>(pixels)},
                        nullptr);
  const double eps = static_cast<double>(std::numeric_limits<Target>::epsilon());
  for (size_t n = 0; n < 3; ++n)
    for (size_t c = 0; c < channels; ++c)
      for (size_t p = 0; p < pixels; ++p) {
        const auto place = [&](bool last) { return last ? p * channels + c : c * pixels + p; };
        const auto row = static_cast<size_t>(kRows[n]);
        const double x = static_cast<double>(images[offsets.in + row * size + place(images_last)]);
        const double exact = x + kScales[row] * normal_of(n, c * pixels + p);
        // normals reach 7 and scales 2: each is rounded a few times, then the sum once
        const double error = std::abs(static_cast<double>(output[offsets.out + n * size + place(output_last)]) - exact);
        const double arithmetic = sizeof(Source) == 8 || sizeof(Target) == 8 ? 0x1p-52 : 0x1p-23;
        EXPECT(error <= 2 * 7 * 12 * arithmetic + eps * (1 + std::abs(exact)),
               std::to_string(n) + " " + std::to_string(c) + " " + std::to_string(p));
      }
}
}  // namespace

CASE(noise_bits_are_philox) {
  EXPECT(word_of(0, 0, 0, 0) == 0x6627e8d5 && word_of(0, 0, 0, 3) == 0x9b00dbd8);  // Random123's known answer
  for (const size_t elements : {0, 1, 4, 1023, 4 * 3 * 256 + 5}) {
    const std::unique_ptr<int64_t[]> bits(new int64_t[3 * elements]);
    launch_gaussian_noise_bits({kIds, kSamples, bits.get(), kSeed, 3, static_cast<int64_t>(elements)}, nullptr);
    for (size_t i = 0; i < 3 * elements; ++i)
      EXPECT(bits[i] == word_of(kSeed, kIds[i / elements], kSamples[i / elements], i % elements), std::to_string(i));
  }
}

CASE(noise_is_added_in_every_layout) {
  const std::array<size_t, 2> shapes[] = {{1, 1}, {3, 35}, {3, 64}, {70, 9}, {1, 6}, {5, 514}};
  for (const auto& [channels, pixels] : shapes)
    for (const int layout : {0, 1, 2, 3})
      for (const emu_test::Offsets offsets : emu_test::kOffsets)
        adds_noise<float, float>(channels, pixels, layout & 1, layout & 2, offsets);
}

CASE(noise_is_added_in_every_dtype) {
  for (const bool last : {false, true})
    for (const size_t pixels : {35, 36}) {
      adds_noise<double, double>(3, pixels, false, last, {0, 0});
      adds_noise<float, double>(3, pixels, false, last, {0, 0});
      adds_noise<c10::Half, float>(3, pixels, false, last, {0, 0});
      adds_noise<c10::BFloat16, c10::BFloat16>(3, pixels, false, last, {0, 0});
      adds_noise<float, c10::Half>(3, pixels, false, last, {0, 0});
    }
}

CASE(noise_of_a_row_outside_the_batch_is_nan) {
  const int32_t rows[] = {2, -1};
  const float image[2 * 4] = {};
  float output[2 * 4] = {};
  for (const bool last : {false, true}) {
    launch_gaussian_noise(
        {image, output, DType::float32, DType::float32, false, last, kScales, rows, kIds, kSamples, kSeed, 2, 2, 2, 2},
        nullptr);
    for (const float value : output) EXPECT(std::isnan(value));
  }
}
