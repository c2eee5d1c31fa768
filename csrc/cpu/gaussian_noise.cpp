// gaussian_noise: out[n] = images[rows[n]] + scales[rows[n]] * normal(seed, image_ids[n], samples[n], element), and
// gaussian_noise_bits, the 32-bit words the normals are made of: Philox4x32-10 (Salmon et al. 2011,
// doi 10.1145/2063384.2063405), key = seed, counter = (element / 4, sample, id), and Box-Muller.
// Layouts: images (B, C, H, W) and out (N, C, H, W), each contiguous or channels_last on its own; an element is counted
// in C, H, W order whatever the layout. Normals are float32, float64 where images or out are. Work split: a task is a
// band of an image's pixels, all channels, for one n. Written 1 element, read 1 from cache.
#include "simd/gaussian_noise_kernels.h"

#include "../common/checked.h"
#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "images.h"
#include "indices.h"
#include "pages.h"
#include "parallel.h"
#include "simd/level.h"

#include <cmath>

namespace pysal::cpu {
namespace {
constexpr int64_t kBandElements = 4096;             // of all channels: noise and image of a band stay in L1
constexpr int64_t kMaxElements = int64_t(1) << 34;  // of an image: the counter's first word is element / 4
constexpr int64_t kTaskElements = 16384;            // a thread's least work, some 20 us

NoiseStream stream_of(int64_t seed, int64_t sample, int64_t id) {
  const auto low = [](int64_t value) { return static_cast<uint32_t>(value); };
  const auto high = [](int64_t value) { return static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32); };
  return {low(seed), high(seed), low(sample), low(id), high(id)};
}

void fill_normals(const NoiseStream& stream, uint32_t first, int64_t quads, std::vector<uint32_t>&, float* out) {
  PYSAL_PICK(gaussian_noise).normals(stream, first, quads, out);
}

void fill_normals(const NoiseStream& stream, uint32_t first, int64_t quads, std::vector<uint32_t>& words, double* out) {
  constexpr double kTwoPi = 6.283185307179586476925;
  words.resize(4 * quads);
  PYSAL_PICK(gaussian_noise).words(stream, first, quads, words.data());
  for (int64_t i = 0; i < 4 * quads; i += 2) {
    const double u = (words[i] + 0.5) * 0x1p-32, angle = kTwoPi * ((words[i + 1] + 0.5) * 0x1p-32);
    const double radius = std::sqrt(-2.0 * std::log(u));
    out[i] = radius * std::cos(angle);
    out[i + 1] = radius * std::sin(angle);
  }
}

// Normals of the elements begin <= e < begin + count: the result points to that of begin, inside the buffer.
template <class A>
const A* normals_of(const NoiseStream& stream, int64_t begin, int64_t count, std::vector<uint32_t>& words, A* buffer) {
  const int64_t first = begin / 4, needed = ceil_div(begin + count, 4) - first;
  const int64_t quads = ceil_div(needed, kNoiseQuads) * kNoiseQuads;
  fill_normals(stream, static_cast<uint32_t>(first), quads, words, buffer);
  return buffer + begin % 4;
}

struct Draws {
  const int32_t* rows;
  const double* scales;
  const int64_t *ids, *samples;
  int64_t seed, count;
};

template <class A, class Source, class Target>
void add_noise(Image<const Source> images, const Draws& draws, Shape shape, Image<Target> out) {
  const int64_t channels = shape.channels, pixels = shape.pixels(), size = shape.size();
  const int64_t band = std::clamp<int64_t>(kBandElements / channels, 1, pixels), bands = ceil_div(pixels, band);
  // the normals of one channel of a band, and up to a quad more at its start and 16 at its end
  const int64_t room = band + 4 * (kNoiseQuads + 2);
  const int64_t grain = 1 + kTaskElements / (band * channels);
  parallel_for(0, draws.count * bands, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> image(band * channels), normals(room);
    std::vector<uint32_t> words;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, first = task % bands * band, count = std::min(band, pixels - first);
      const int32_t row = draws.rows[n];
      const NoiseStream stream = stream_of(draws.seed, draws.samples[n], draws.ids[n]);
      const A scale = static_cast<A>(draws.scales[row]);
      const Image<const Source> source{images.data + row * size, images.channels_last};
      copy_pixels(source, shape, first, count, image.data(), false, count);
      for (int64_t c = 0; c < channels; ++c) {
        const A* __restrict noise = normals_of(stream, c * pixels + first, count, words, normals.data());
        const A* __restrict x = image.data() + c * count;
        Target* __restrict target =
            out.data + n * size + (out.channels_last ? first * channels + c : c * pixels + first);
        const int64_t stride = out.channels_last ? channels : 1;
        if (stride == 1)
          for (int64_t i = 0; i < count; ++i) target[i] = convert<Target>(x[i] + scale * noise[i]);
        else
          for (int64_t i = 0; i < count; ++i) target[i * stride] = convert<Target>(x[i] + scale * noise[i]);
      }
    }
  });
}

Tensor int64_values(const char* op, const char* argument, const Tensor& values, int64_t count) {
  PYSAL_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Long && values.numel() == count, "pysal::", op,
              ": ", argument, " must be ", count, " int64 on the CPU, got ", values.numel(), " elements of ",
              torch::headeronly::toString(values.scalar_type()));
  return dense(values);
}

Tensor gaussian_noise_cpu(const Tensor& images, const Tensor& scales, int64_t seed, const Tensor& rows,
                          const Tensor& image_ids, const Tensor& samples, ScalarType dtype, bool channels_last) {
  const char* op = "gaussian_noise";
  PYSAL_CHECK(images.dim() == 4, "pysal::gaussian_noise: images must have 4 dimensions, got ", images.dim());
  const int64_t count = rows.numel(), batch = images.size(0);
  PYSAL_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Double && scales.numel() == batch,
              "pysal::gaussian_noise: scales must be ", batch, " float64 on the CPU, got ", scales.numel(),
              " elements of ", torch::headeronly::toString(scales.scalar_type()));
  const Tensor row = image_rows(op, rows, count, batch), scale = dense(scales);
  const Tensor id = int64_values(op, "image_ids", image_ids, count),
               sample = int64_values(op, "samples", samples, count);
  const Draws draws{row.const_data_ptr<int32_t>(),
                    scale.const_data_ptr<double>(),
                    id.const_data_ptr<int64_t>(),
                    sample.const_data_ptr<int64_t>(),
                    seed,
                    count};
  const bool source_last = is_channels_last(images);
  const Tensor source = dense(images, source_last);
  const Shape shape{images.size(1), images.size(2), images.size(3)};
  PYSAL_CHECK(product("pysal::gaussian_noise", "images", {shape.channels, shape.height, shape.width}) < kMaxElements,
              "pysal::gaussian_noise: images must have fewer than 2^34 elements each, got ", shape.size());
  const Tensor out = empty(source, {count, shape.channels, shape.height, shape.width}, dtype, channels_last);
  if (out.numel() == 0) return out;
  prefer_large_pages(out);
  const bool in_double = source.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
  PYSAL_DISPATCH_FLOATING(source.scalar_type(), "gaussian_noise", [&] {
    const Image<const scalar_t> from{source.const_data_ptr<scalar_t>(), source_last};
    PYSAL_DISPATCH_FLOATING(dtype, "gaussian_noise", [&] {
      const Image<scalar_t> to{out.mutable_data_ptr<scalar_t>(), channels_last};
      if (in_double)
        add_noise<double>(from, draws, shape, to);
      else
        add_noise<float>(from, draws, shape, to);
    });
  });
  return out;
}

Tensor gaussian_noise_bits_cpu(int64_t seed, const Tensor& image_ids, const Tensor& samples, int64_t elements) {
  const char* op = "gaussian_noise_bits";
  PYSAL_CHECK(elements >= 0 && elements < kMaxElements,
              "pysal::gaussian_noise_bits: elements must be in [0, 2^34), got ", elements);
  const int64_t count = image_ids.numel();
  const Tensor id = int64_values(op, "image_ids", image_ids, count),
               sample = int64_values(op, "samples", samples, count);
  const Tensor out = empty(image_ids, {count, elements}, ScalarType::Long);
  const int64_t *ids = id.const_data_ptr<int64_t>(), *draws = sample.const_data_ptr<int64_t>();
  int64_t* bits = out.mutable_data_ptr<int64_t>();
  const int64_t quads = ceil_div(elements, 4 * kNoiseQuads) * kNoiseQuads;
  parallel_for(0, count, 1 + kTaskElements / (elements + 1), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words(4 * quads);
    for (int64_t n = begin; n < end; ++n) {
      PYSAL_PICK(gaussian_noise).words(stream_of(seed, draws[n], ids[n]), 0, quads, words.data());
      std::copy(words.begin(), words.begin() + elements, bits + n * elements);
    }
  });
  return out;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("gaussian_noise", TORCH_BOX(&pysal::cpu::gaussian_noise_cpu));
  m.impl("gaussian_noise_bits", TORCH_BOX(&pysal::cpu::gaussian_noise_bits_cpu));
}
