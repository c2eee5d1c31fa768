// bf16x6_convolution: a float32 convolution of channels_last maps on x86's matrix unit, which multiplies bf16 numbers
// and adds float32 ones. A float32 number is the sum of three bf16 numbers to 24 bits; of the nine products of two such
// sums the six largest are added up, so that the result is as close as that of float32 arithmetic (Henry, Tang and
// Heinecke 2019, arXiv:1904.06376). The unit multiplies 16 times as fast as AVX-512, so six products still gain.
// An infinite input gives NaN. It exists on machines with that unit alone, as oneDNN's ops do on those with oneDNN;
// engine/graph/matrix_unit.py asks, and arranges weights: (blocks of 16 output channels, kernel height, width, blocks
// of 32 input channels, 3 parts, 16 pairs of input channels, 16 output channels and 2 of a pair), bf16, zero beyond the
// channels.
// Work split: a task is some rows of some images, all channels.
#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../ceil_div.h"
#include "../parallel.h"
#include "../scratch.h"
#include "bf16x6_kernels.h"

namespace pysal::cpu {
namespace {
// Adds up input's convolution, bias and shortcut, which may be output itself, clamps the sums, and writes down where
// 0 < sum < upper (gates) or lets through what a rule of guided_relu's backward does (mask, rule; -1 is none).
void bf16x6_convolution_(const Tensor& output, const Tensor& input, const Tensor& weight, const Tensor& bias,
                         const std::optional<Tensor>& shortcut, int64_t row_stride, int64_t column_stride, int64_t top,
                         int64_t left, int64_t row_dilation, int64_t column_dilation, double lower, double upper,
                         const std::optional<Tensor>& gates, const std::optional<Tensor>& mask, int64_t rule) {
  const char* op = "pysal_amx::bf16x6_convolution_";
  PYSAL_CHECK(input.dim() == 4 && input.is_cpu() && input.scalar_type() == ScalarType::Float && weight.dim() == 7 &&
                  weight.is_cpu() && weight.scalar_type() == ScalarType::BFloat16 && bias.dim() == 1 && bias.is_cpu() &&
                  bias.scalar_type() == ScalarType::Float,
              op, ": input must be (N, C, H, W) and bias (K,) in float32, weight arranged in bfloat16");
  const int64_t channels = input.size(1), out_channels = bias.size(0);
  PYSAL_CHECK(weight.size(0) == ceil_div(out_channels, 16) && weight.size(3) == ceil_div(channels, 32) &&
                  weight.size(4) == 3 && weight.size(5) == 16 && weight.size(6) == 32 && channels >= 1,
              op, ": weight must be arranged for the channels of input and bias");
  PYSAL_CHECK(
      row_stride >= 1 && column_stride >= 1 && row_dilation >= 1 && column_dilation >= 1 && top >= 0 && left >= 0, op,
      ": strides and dilations must be at least 1, padding at least 0");
  const int64_t kernel_height = weight.size(1), kernel_width = weight.size(2);
  for (const int64_t number :
       {kernel_height, kernel_width, row_stride, column_stride, row_dilation, column_dilation, top, left})
    PYSAL_CHECK(number <= kMostBf16x6Step, op, ": kernel, strides, dilations and padding must be at most ",
                kMostBf16x6Step, ", got ", number);
  const auto like_output = [&](const Tensor& map) {
    return map.is_cpu() && map.scalar_type() == ScalarType::Float && map.dim() == 4 && map.size(0) == input.size(0) &&
           map.size(1) == out_channels && map.size(2) == output.size(2) && map.size(3) == output.size(3);
  };
  PYSAL_CHECK(output.dim() == 4 && like_output(output) && dense(output, true).data_ptr() == output.data_ptr(), op,
              ": output must be (N, K, h, w) in float32, channels_last");
  PYSAL_CHECK(!shortcut || like_output(*shortcut), op, ": shortcut must have the shape of output, in float32");
  const auto bits = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous() &&
           out_channels % 16 == 0;
  };
  PYSAL_CHECK(!gates || (bits(*gates) && gates->numel() * 8 == output.numel()), op,
              ": gates must be uint8, a bit per element of output, and its channels a multiple of 16");
  PYSAL_CHECK(rule >= -1 && rule <= 2 && mask.has_value() == (rule == 0 || rule == 1), op,
              ": mask must be given for the rules 0 and 1 alone, rule be from -1 to 2, got ", rule);
  const int64_t images_of_mask = mask ? mask->numel() * 8 * input.size(0) / std::max<int64_t>(output.numel(), 1) : 0;
  PYSAL_CHECK(!mask || output.numel() == 0 ||
                  (bits(*mask) && images_of_mask >= 1 && input.size(0) % images_of_mask == 0 &&
                   images_of_mask * output.numel() == mask->numel() * 8 * input.size(0)),
              op,
              ": mask must be uint8, a bit per element of output or of its first images, whose number divides theirs");
  if (output.numel() == 0) return;
  // what a task at most splits: every position that any tap reaches, for each phase, three parts of 32 channels of 2
  // bytes
  const int64_t high = output.size(2) + kernel_height * row_dilation + top + 2,
                wide = input.size(3) + output.size(3) + kernel_width * column_dilation + left + 2;
  product(op, "what is split at once",
          {high, wide, input.size(0), std::min(row_stride, kernel_height) * std::min(column_stride, kernel_width),
           weight.size(3), 3 * 64});
  // last, so that every machine refuses what all have to refuse
  PYSAL_CHECK(bf16x6_available(), op, ": this machine has no matrix unit");
  const Tensor from = dense(input, true), parts = dense(weight), shift = dense(bias);
  const std::optional<Tensor> added = shortcut ? std::optional(dense(*shortcut, true)) : std::nullopt;
  const std::optional<Tensor> through = mask ? std::optional(dense(*mask)) : std::nullopt;
  const int64_t height = output.size(2), width = output.size(3);
  Bf16x6Convolution convolution;
  convolution.images = input.size(0);
  convolution.height = input.size(2);
  convolution.width = input.size(3);
  convolution.channels = channels;
  convolution.out_height = height;
  convolution.out_width = width;
  convolution.out_channels = out_channels;
  convolution.kernel_height = kernel_height;
  convolution.kernel_width = kernel_width;
  convolution.row_stride = row_stride;
  convolution.column_stride = column_stride;
  convolution.top = top;
  convolution.left = left;
  convolution.row_dilation = row_dilation;
  convolution.column_dilation = column_dilation;
  convolution.input = from.const_data_ptr<float>();
  convolution.weight = static_cast<const uint16_t*>(parts.data_ptr());
  convolution.bias = shift.const_data_ptr<float>();
  convolution.shortcut = added ? added->const_data_ptr<float>() : nullptr;
  convolution.output = output.mutable_data_ptr<float>();
  convolution.lower = static_cast<float>(lower);
  convolution.upper = static_cast<float>(upper);
  convolution.gates = gates ? gates->mutable_data_ptr<uint8_t>() : nullptr;
  convolution.mask = through ? through->const_data_ptr<uint8_t>() : nullptr;
  convolution.mask_pixels = images_of_mask * height * width;
  convolution.rule = static_cast<Bf16x6Rule>(rule);
  const Bf16x6Task like = bf16x6_task(convolution, torch::stable::get_num_threads());
  const int64_t across = ceil_div(height, like.rows);
  const int64_t tasks = ceil_div(input.size(0), like.images) * across;
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / across * like.images, row = i % across * like.rows;
      const Bf16x6Task task{image, std::min(like.images, input.size(0) - image), row,
                            std::min(like.rows, height - row)};
      bf16x6_run(convolution, task, scratch_of(bf16x6_scratch_bytes(convolution, task)));
    }
  });
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_amx, m) {
  m.def(
      "bf16x6_convolution_(Tensor(a!) output, Tensor input, Tensor weight, Tensor bias, Tensor? shortcut, int "
      "row_stride, "
      "int column_stride, int top, int left, int row_dilation, int column_dilation, float lower, float upper, "
      "Tensor(b!)? gates, Tensor? mask, int rule) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_amx, CPU, m) {
  m.impl("bf16x6_convolution_", TORCH_BOX(&pysal::cpu::bf16x6_convolution_));
}
