// bf16x6_convolution: a float32 convolution of channels_last maps on x86's matrix unit, which multiplies bf16 numbers
// and adds float32 ones. A float32 number is the sum of three bf16 numbers to 24 bits; of the nine products of two such
// sums the six largest are added up, so that the result is as close as that of float32 arithmetic (Henry, Tang and
// Heinecke 2019, arXiv:1904.06376). The unit multiplies 16 times as fast as AVX-512, so six products still gain.
// An infinite input gives NaN. It exists on machines with that unit alone, as oneDNN's ops do on those with oneDNN;
// pysal/engine/matrix_unit.py asks, and arranges weights: (blocks of 16 output channels, kernel height, width, blocks
// of 32 input channels, 3 parts, 16 pairs of input channels, 16 output channels and 2 of a pair), bf16, zero beyond the
// channels.
// Work split: a task is some rows of some images, all channels.
#include "../../common/torch_stable.h"
#include "../scratch.h"
#include "bf16x6_kernels.h"

namespace pysal::cpu {
namespace {
// With `over` the result overwrites the shortcut.
Tensor convolve(bool over, const Tensor& input, const Tensor& weight, const Tensor& bias,
                const std::optional<Tensor>& shortcut, int64_t row_stride, int64_t column_stride, int64_t top,
                int64_t bottom, int64_t left, int64_t right, int64_t row_dilation, int64_t column_dilation,
                double lower, double upper) {
  const char* op = "pysal_amx::bf16x6_convolution";
  PYSAL_CHECK(bf16x6_available(), op, ": this machine has no matrix unit");
  PYSAL_CHECK(input.dim() == 4 && input.is_cpu() && input.scalar_type() == ScalarType::Float && weight.dim() == 7 &&
                  weight.is_cpu() && weight.scalar_type() == ScalarType::BFloat16 && bias.dim() == 1 && bias.is_cpu() &&
                  bias.scalar_type() == ScalarType::Float,
              op, ": input must be (N, C, H, W) and bias (K,) in float32, weight arranged in bfloat16");
  const int64_t channels = input.size(1), out_channels = bias.size(0);
  PYSAL_CHECK(weight.size(0) == (out_channels + 15) / 16 && weight.size(3) == (channels + 31) / 32 &&
                  weight.size(4) == 3 && weight.size(5) == 16 && weight.size(6) == 32,
              op, ": weight must be arranged for the channels of input and bias");
  PYSAL_CHECK(row_stride >= 1 && column_stride >= 1 && row_dilation >= 1 && column_dilation >= 1 && top >= 0 &&
                  bottom >= 0 && left >= 0 && right >= 0,
              op, ": strides and dilations must be at least 1, padding at least 0");
  const int64_t height = (input.size(2) + top + bottom - row_dilation * (weight.size(1) - 1) - 1) / row_stride + 1;
  const int64_t width = (input.size(3) + left + right - column_dilation * (weight.size(2) - 1) - 1) / column_stride + 1;
  PYSAL_CHECK(height >= 1 && width >= 1 && channels >= 1, op, ": the kernel must fit into the input");
  if (shortcut)
    PYSAL_CHECK(shortcut->is_cpu() && shortcut->scalar_type() == ScalarType::Float && shortcut->dim() == 4 &&
                    shortcut->size(0) == input.size(0) && shortcut->size(1) == out_channels &&
                    shortcut->size(2) == height && shortcut->size(3) == width,
                op, ": shortcut must have the shape of the result, in float32");
  const Tensor from = dense(input, true), parts = dense(weight), shift = dense(bias);
  const std::optional<Tensor> added = shortcut ? std::optional(dense(*shortcut, true)) : std::nullopt;
  PYSAL_CHECK(!over || added->data_ptr() == shortcut->data_ptr(), op, ": what is overwritten must be channels_last");
  Tensor out = over ? *added : empty(input, {input.size(0), out_channels, height, width}, std::nullopt, true);
  if (out.numel() == 0) return out;
  const Bf16x6Convolution convolution{input.size(0),
                                      input.size(2),
                                      input.size(3),
                                      channels,
                                      height,
                                      width,
                                      out_channels,
                                      weight.size(1),
                                      weight.size(2),
                                      row_stride,
                                      column_stride,
                                      top,
                                      left,
                                      row_dilation,
                                      column_dilation,
                                      from.const_data_ptr<float>(),
                                      static_cast<const uint16_t*>(parts.data_ptr()),
                                      shift.const_data_ptr<float>(),
                                      added ? added->const_data_ptr<float>() : nullptr,
                                      out.mutable_data_ptr<float>(),
                                      static_cast<float>(lower),
                                      static_cast<float>(upper)};
  const Bf16x6Task like = bf16x6_task(convolution, torch::stable::get_num_threads());
  const int64_t across = (height + like.rows - 1) / like.rows;
  const int64_t tasks = (input.size(0) + like.images - 1) / like.images * across;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / across * like.images, row = i % across * like.rows;
      const Bf16x6Task task{image, std::min(like.images, input.size(0) - image), row,
                            std::min(like.rows, height - row)};
      bf16x6_run(convolution, task, scratch_of(bf16x6_scratch_bytes(convolution, task)));
    }
  });
  return out;
}

Tensor bf16x6_convolution(const Tensor& input, const Tensor& weight, const Tensor& bias,
                          const std::optional<Tensor>& shortcut, int64_t row_stride, int64_t column_stride, int64_t top,
                          int64_t bottom, int64_t left, int64_t right, int64_t row_dilation, int64_t column_dilation,
                          double lower, double upper) {
  return convolve(false, input, weight, bias, shortcut, row_stride, column_stride, top, bottom, left, right,
                  row_dilation, column_dilation, lower, upper);
}

void bf16x6_convolution_(const Tensor& shortcut, const Tensor& input, const Tensor& weight, const Tensor& bias,
                         int64_t row_stride, int64_t column_stride, int64_t top, int64_t bottom, int64_t left,
                         int64_t right, int64_t row_dilation, int64_t column_dilation, double lower, double upper) {
  convolve(true, input, weight, bias, shortcut, row_stride, column_stride, top, bottom, left, right, row_dilation,
           column_dilation, lower, upper);
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_amx, m) {
  m.def(
      "bf16x6_convolution(Tensor input, Tensor weight, Tensor bias, Tensor? shortcut, int row_stride, int "
      "column_stride, int top, int bottom, int left, int right, int row_dilation, int column_dilation, float lower, "
      "float upper) -> Tensor");
  m.def(
      "bf16x6_convolution_(Tensor(a!) shortcut, Tensor input, Tensor weight, Tensor bias, int row_stride, int "
      "column_stride, int top, int bottom, int left, int right, int row_dilation, int column_dilation, float lower, "
      "float upper) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_amx, CPU, m) {
  m.impl("bf16x6_convolution", TORCH_BOX(&pysal::cpu::bf16x6_convolution));
  m.impl("bf16x6_convolution_", TORCH_BOX(&pysal::cpu::bf16x6_convolution_));
}
