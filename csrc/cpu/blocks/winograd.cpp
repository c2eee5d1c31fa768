// winograd: 3 x 3 convolutions of stride 1 with a quarter of the multiplications, float32, channels_last. It is for
// prepared models on a CPU alone, so it is no op of the package: engine/graph/winograd.py arranges the weights and asks
// for it where it gains. Work split: a task is some tiles of 4 x 4 pixels, of all channels.
#include "../simd/winograd_kernels.h"

#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../ceil_div.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kCacheFloats = 196608;  // what a task should leave in a second-level cache
constexpr int64_t kLeastTiles = 42;       // of a task: fewer would wait for the weights
constexpr int64_t kMostTiles = 112;

bool is_floats(const Tensor& t, int64_t dim) {
  return t.dim() == dim && t.is_cpu() && t.scalar_type() == ScalarType::Float;
}

// Adds up input's convolution, bias and shortcut, which may be output itself, clamps the sums, and writes down where
// 0 < sum < upper (gates) or lets through what a rule of guided_relu's backward does (mask, rule; -1 is none).
void winograd_convolution_(const Tensor& output, const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& shortcut, int64_t top,
                           int64_t left, double lower, double upper, const std::optional<Tensor>& gates,
                           const std::optional<Tensor>& mask, int64_t rule) {
  const char* op = "pysal_winograd::convolution_";
  PYSAL_CHECK(is_floats(input, 4) && is_floats(output, 4), op,
              ": input must be (N, C, H, W), output (N, K, h, w) in float32 on the CPU");
  const int64_t images = input.size(0), channels = input.size(1), out_channels = output.size(1);
  PYSAL_CHECK(channels >= 16 && out_channels >= 16 && channels % 16 == 0 && out_channels % 16 == 0, op,
              ": channels must be multiples of 16, got ", channels, " and ", out_channels);
  PYSAL_CHECK(is_floats(weight, 4) && weight.is_contiguous() && weight.size(0) == kWinogradProducts &&
                  weight.size(1) == out_channels / 16 && weight.size(2) == channels && weight.size(3) == 16,
              op, ": weight must be (36, ", out_channels / 16, ", ", channels, ", 16) in float32 on the CPU");
  PYSAL_CHECK(!bias || (is_floats(*bias, 1) && bias->is_contiguous() && bias->size(0) == out_channels), op,
              ": bias must be ", out_channels, " float32");
  PYSAL_CHECK(top >= 0 && top <= 2 && left >= 0 && left <= 2, op, ": padding must be from 0 to 2");
  const int64_t height = output.size(2), width = output.size(3);
  // what no window reaches is zero, so more zeros at the right and below than there are at the other sides do no harm
  PYSAL_CHECK(output.size(0) == images && height >= 1 && width >= 1 && height <= input.size(2) + top &&
                  width <= input.size(3) + left,
              op, ": output must have the input's images and at most the pixels that its windows reach");
  const auto like_output = [&](const Tensor& map) {
    return is_floats(map, 4) && map.size(0) == images && map.size(1) == out_channels && map.size(2) == height &&
           map.size(3) == width;
  };
  PYSAL_CHECK(dense(output, true).data_ptr() == output.data_ptr(), op, ": output must be channels_last");
  PYSAL_CHECK(!shortcut || like_output(*shortcut), op, ": shortcut must have the shape of output, in float32");
  const auto bits = [&](const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.is_contiguous();
  };
  PYSAL_CHECK(!gates || (bits(*gates) && gates->numel() * 8 == output.numel()), op,
              ": gates must be uint8, a bit per element of output");
  PYSAL_CHECK(rule >= -1 && rule <= 2 && mask.has_value() == (rule == 0 || rule == 1), op,
              ": mask must be given for the rules 0 and 1 alone, rule be from -1 to 2, got ", rule);
  const int64_t of_image = out_channels * height * width / 8;
  const int64_t mask_images = mask ? mask->numel() / of_image : 0;
  PYSAL_CHECK(!mask || (bits(*mask) && mask->numel() == mask_images * of_image && (mask_images >= 1 || images == 0) &&
                        (images == 0 || images % mask_images == 0)),
              op,
              ": mask must be uint8, a bit per element of output or of its first images, whose number divides theirs");
  if (images == 0) return;
  const Tensor from = dense(input, true);
  const std::optional<Tensor> added = shortcut ? std::optional(dense(*shortcut, true)) : std::nullopt;
  WinogradConvolution c{};
  c.height = input.size(2), c.width = input.size(3), c.channels = channels;
  c.out_height = height, c.out_width = width, c.out_channels = out_channels;
  c.top = top, c.left = left;
  c.down = ceil_div(height, kWinogradTile), c.across = ceil_div(width, kWinogradTile);
  c.input = from.const_data_ptr<float>(), c.weight = weight.const_data_ptr<float>();
  c.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  c.added = added ? added->const_data_ptr<float>() : nullptr;
  c.output = output.mutable_data_ptr<float>();
  c.lower = static_cast<float>(lower), c.upper = static_cast<float>(upper);
  c.gates = gates ? gates->mutable_data_ptr<uint8_t>() : nullptr;
  c.mask = mask ? mask->const_data_ptr<uint8_t>() : nullptr;
  c.mask_images = mask_images, c.rule = static_cast<int>(rule);
  const WinogradKernels& kernels = PYSAL_PICK(winograd);
  const int64_t tiles = product(op, "tiles", {images, c.down, c.across});
  const int64_t fitting = kCacheFloats / (kWinogradProducts * (channels + out_channels));
  const int64_t most = std::min(std::max(fitting, kLeastTiles), kMostTiles);
  const int64_t tasks = std::max(ceil_div(tiles, most), std::min<int64_t>(tiles, torch::stable::get_num_threads()));
  const int64_t each = ceil_div(tiles, tasks);
  parallel_for(0, ceil_div(tiles, each), 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(kernels.scratch_floats(c, each) * sizeof(float)));
    for (int64_t i = begin; i < end; ++i) kernels.run(c, i * each, std::min(each, tiles - i * each), scratch);
  });
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_winograd, m) {
  m.def(
      "convolution_(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias, Tensor? shortcut, int top, int left, "
      "float lower, float upper, Tensor(b!)? gates, Tensor? mask, int rule) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_winograd, CPU, m) {
  m.impl("convolution_", TORCH_BOX(&pysal::cpu::winograd_convolution_));
}
