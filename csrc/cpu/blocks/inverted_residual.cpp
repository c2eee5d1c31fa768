// inverted_residual: the blocks of MobileNetV2 and EfficientNet (Sandler et al. 2018, arXiv:1801.04381) in one pass
// over memory: 1 x 1 convolution, ReLU, depthwise convolution, ReLU, 1 x 1 convolution and shortcut; and the gradient
// of its input from the ReLUs' gates, under the rules of guided_relu. float32, channels_last. It is for prepared models
// alone, so it is no op of the package: engine/graph/inverted_residual.py arranges the weights and asks for it where it
// gains. Work split: a task is some rows of one image; an image is split only where there are fewer images than
// threads.
#include "../simd/inverted_residual_kernels.h"

#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../ceil_div.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/level.h"

namespace pysal::cpu {
namespace {
bool is_floats(const Tensor& t, int64_t dim) {
  return t.dim() == dim && t.is_cpu() && t.scalar_type() == ScalarType::Float;
}

// A matrix (depth, columns) in panels of 16 columns.
void check_panels(const char* op, const char* name, const Tensor& panels, int64_t depth, int64_t columns) {
  PYSAL_CHECK(is_floats(panels, 3) && panels.is_contiguous() && panels.size(0) == ceil_div(columns, 16) &&
                  panels.size(1) == depth && panels.size(2) == 16,
              op, ": ", name, " must be ", ceil_div(columns, 16), " panels of ", depth, " x 16 float32");
}

void check_bias(const char* op, const char* name, const Tensor& bias, int64_t channels) {
  PYSAL_CHECK(is_floats(bias, 1) && bias.is_contiguous() && bias.size(0) == channels, op, ": ", name, " must be ",
              channels, " float32");
}

void check_geometry(const char* op, const Tensor& depthwise, int64_t row_stride, int64_t column_stride, int64_t top,
                    int64_t left) {
  PYSAL_CHECK(is_floats(depthwise, 3) && depthwise.is_contiguous() && depthwise.size(2) % 16 == 0 &&
                  depthwise.size(0) >= 1 && depthwise.size(1) >= 1 && depthwise.size(2) >= 16 &&
                  depthwise.size(0) * depthwise.size(1) <= kMostTaps,
              op, ": depthwise must be (kh, kw, channels) in float32, of at most ", kMostTaps,
              " taps and a multiple of 16 channels");
  PYSAL_CHECK(row_stride >= 1 && column_stride >= 1 && row_stride <= depthwise.size(0) &&
                  column_stride <= depthwise.size(1) && top >= 0 && left >= 0 && top < depthwise.size(0) &&
                  left < depthwise.size(1),
              op, ": strides must be between 1 and the kernel's size, padding less than that");
}

void check_gates(const char* op, const char* name, const Tensor& gates, int64_t elements) {
  PYSAL_CHECK(gates.scalar_type() == ScalarType::Byte && gates.is_cpu() && gates.is_contiguous() &&
                  gates.numel() == elements / 8,
              op, ": ", name, " must be ", elements / 8, " uint8 on the CPU");
}

using Rows = void (*)(const InvertedResidual&, int64_t, int64_t, int64_t, float*);

void run(const InvertedResidual& block, int64_t images, bool forward) {
  const InvertedResidualKernels& kernels = PYSAL_PICK(inverted_residual);
  const Rows rows = forward ? kernels.forward : kernels.backward;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(images >= threads ? 1 : threads, block.out_height);  // of an image
  const int64_t floats = kernels.scratch_floats(block, forward);
  parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(floats * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      rows(block, task / parts, part * block.out_height / parts, (part + 1) * block.out_height / parts, scratch);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> inverted_residual(const Tensor& input, const std::optional<Tensor>& expand,
                                                     const std::optional<Tensor>& expand_bias, const Tensor& depthwise,
                                                     const Tensor& depthwise_bias, const Tensor& project,
                                                     const Tensor& project_bias, const std::optional<Tensor>& shortcut,
                                                     double expand_upper, double depthwise_upper, int64_t row_stride,
                                                     int64_t column_stride, int64_t top, int64_t bottom, int64_t left,
                                                     int64_t right) {
  const char* op = "pysal_blocks::inverted_residual";
  check_geometry(op, depthwise, row_stride, column_stride, top, left);
  const int64_t channels = depthwise.size(2), out_channels = project_bias.numel();
  PYSAL_CHECK(is_floats(input, 4), op, ": input must be (N, C, H, W) in float32 on the CPU");
  const int64_t images = input.size(0), in_channels = input.size(1), in_height = input.size(2),
                in_width = input.size(3);
  PYSAL_CHECK(out_channels >= 16 && (expand ? in_channels >= 16 : in_channels == channels), op,
              ": input and output must have at least 16 channels, or those of depthwise where nothing expands");
  PYSAL_CHECK(bottom >= 0 && bottom < depthwise.size(0) && right >= 0 && right < depthwise.size(1), op,
              ": padding must be at least 0 and less than the kernel's size");
  PYSAL_CHECK(in_height + top + bottom >= depthwise.size(0) && in_width + left + right >= depthwise.size(1), op,
              ": the kernel must fit into the input");
  PYSAL_CHECK(expand.has_value() == expand_bias.has_value(), op, ": expand and its bias belong together");
  if (expand) check_panels(op, "expand", *expand, in_channels, channels);
  if (expand) check_bias(op, "the bias of expand", *expand_bias, channels);
  check_bias(op, "the bias of depthwise", depthwise_bias, channels);
  check_panels(op, "project", project, channels, out_channels);
  check_bias(op, "the bias of project", project_bias, out_channels);
  const int64_t height = (in_height + top + bottom - depthwise.size(0)) / row_stride + 1;
  const int64_t width = (in_width + left + right - depthwise.size(1)) / column_stride + 1;
  if (shortcut)
    PYSAL_CHECK(is_floats(*shortcut, 4) && shortcut->size(0) == images && shortcut->size(1) == out_channels &&
                    shortcut->size(2) == height && shortcut->size(3) == width,
                op, ": shortcut must have the shape of the result, in float32");
  const Tensor from = dense(input, true);
  const std::optional<Tensor> added = shortcut ? std::optional(dense(*shortcut, true)) : std::nullopt;
  Tensor output = empty(input, {images, out_channels, height, width}, std::nullopt, true);
  const int64_t expanded = expand ? product(op, "gates", {images, in_height, in_width, channels}) : 0;
  const int64_t combined = product(op, "gates", {images, height, width, channels});
  Tensor expand_gates = empty(input, {expanded / 8}, ScalarType::Byte);
  Tensor depthwise_gates = empty(input, {combined / 8}, ScalarType::Byte);
  InvertedResidual block{};
  block.in_channels = in_channels, block.in_height = in_height, block.in_width = in_width;
  block.channels = channels;
  block.out_channels = out_channels, block.out_height = height, block.out_width = width;
  block.kernel_height = depthwise.size(0), block.kernel_width = depthwise.size(1);
  block.row_stride = row_stride, block.column_stride = column_stride, block.top = top, block.left = left;
  block.images = std::max<int64_t>(images, 1), block.expands = expand.has_value();
  block.input = from.const_data_ptr<float>();
  if (expand) {
    block.enter = expand->const_data_ptr<float>(), block.enter_bias = expand_bias->const_data_ptr<float>();
    block.enter_upper = static_cast<float>(expand_upper), block.enter_gates = expand_gates.mutable_data_ptr<uint8_t>();
  }
  block.depthwise = depthwise.const_data_ptr<float>(), block.depthwise_bias = depthwise_bias.const_data_ptr<float>();
  block.depthwise_upper = static_cast<float>(depthwise_upper);
  block.depthwise_gates = depthwise_gates.mutable_data_ptr<uint8_t>();
  block.leave = project.const_data_ptr<float>(), block.leave_bias = project_bias.const_data_ptr<float>();
  block.added = added ? added->const_data_ptr<float>() : nullptr;
  block.output = output.mutable_data_ptr<float>();
  run(block, images, true);
  return {output, expand_gates, depthwise_gates};
}

// Row n of grad is a gradient of image n % images. `added`, like the result, is added to it.
Tensor inverted_residual_backward(const Tensor& grad, const std::optional<Tensor>& expand_gates,
                                  const Tensor& depthwise_gates, const std::optional<Tensor>& expand,
                                  const Tensor& depthwise, const Tensor& project, const std::optional<Tensor>& added,
                                  int64_t images, int64_t in_channels, int64_t in_height, int64_t in_width,
                                  int64_t row_stride, int64_t column_stride, int64_t top, int64_t left, int64_t rule) {
  const char* op = "pysal_blocks::inverted_residual_backward";
  check_geometry(op, depthwise, row_stride, column_stride, top, left);
  const int64_t channels = depthwise.size(2);
  PYSAL_CHECK(is_floats(grad, 4) && images >= 1 && grad.size(0) % images == 0, op,
              ": grad must be (T N, C, H, W) in float32 on the CPU");
  PYSAL_CHECK(rule >= 0 && rule <= 2, op, ": rule must be 0, 1 or 2, got ", rule);
  const int64_t rows = grad.size(0), height = grad.size(2), width = grad.size(3);
  PYSAL_CHECK(in_height >= 1 && in_width >= 1 && (expand ? in_channels >= 16 : in_channels == channels), op,
              ": input must have at least 16 channels, or those of depthwise where nothing expands");
  check_panels(op, "project", project, grad.size(1), channels);
  if (expand) check_panels(op, "expand", *expand, channels, in_channels);
  PYSAL_CHECK(expand.has_value() == expand_gates.has_value(), op, ": expand and its gates belong together");
  if (expand)
    check_gates(op, "expand_gates", *expand_gates, product(op, "gates", {images, in_height, in_width, channels}));
  check_gates(op, "depthwise_gates", depthwise_gates, product(op, "gates", {images, height, width, channels}));
  if (added)
    PYSAL_CHECK(is_floats(*added, 4) && added->size(0) == rows && added->size(1) == in_channels &&
                    added->size(2) == in_height && added->size(3) == in_width,
                op, ": added must have the shape of the result, in float32");
  const Tensor from = dense(grad, true);
  const std::optional<Tensor> onto = added ? std::optional(dense(*added, true)) : std::nullopt;
  Tensor output = empty(grad, {rows, in_channels, in_height, in_width}, std::nullopt, true);
  InvertedResidual block{};
  block.in_channels = grad.size(1), block.in_height = height, block.in_width = width;
  block.channels = channels;
  block.out_channels = in_channels, block.out_height = in_height, block.out_width = in_width;
  block.kernel_height = depthwise.size(0), block.kernel_width = depthwise.size(1);
  block.row_stride = row_stride, block.column_stride = column_stride, block.top = top, block.left = left;
  block.images = images, block.expands = expand.has_value();
  block.input = from.const_data_ptr<float>();
  block.enter = project.const_data_ptr<float>();
  block.depthwise = depthwise.const_data_ptr<float>();
  block.depthwise_gates = static_cast<uint8_t*>(depthwise_gates.data_ptr());
  if (expand) {
    block.enter_gates = static_cast<uint8_t*>(expand_gates->data_ptr());
    block.leave = expand->const_data_ptr<float>();
  }
  block.added = onto ? onto->const_data_ptr<float>() : nullptr;
  block.output = output.mutable_data_ptr<float>();
  block.rule = static_cast<int>(rule);
  run(block, rows, false);
  return output;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_blocks, m) {
  m.def(
      "inverted_residual(Tensor input, Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor depthwise_bias, "
      "Tensor project, Tensor project_bias, Tensor? shortcut, float expand_upper, float depthwise_upper, int "
      "row_stride, int column_stride, int top, int bottom, int left, int right) -> (Tensor, Tensor, Tensor)");
  m.def(
      "inverted_residual_backward(Tensor grad, Tensor? expand_gates, Tensor depthwise_gates, Tensor? expand, Tensor "
      "depthwise, Tensor project, Tensor? added, int images, int in_channels, int in_height, int in_width, int "
      "row_stride, int column_stride, int top, int left, int rule) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_blocks, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&pysal::cpu::inverted_residual));
  m.impl("inverted_residual_backward", TORCH_BOX(&pysal::cpu::inverted_residual_backward));
}
