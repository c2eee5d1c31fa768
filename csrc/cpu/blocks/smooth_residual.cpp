// smooth_residual: the blocks of MobileNetV3 and EfficientNet (Tan and Le 2019, arXiv:1905.11946) in two passes over
// memory: 1 x 1 convolution, activation, depthwise convolution, and the sums that gates are made from; activation,
// gates, 1 x 1 convolution and shortcut. Backward, the gradient of the gates and that of the input. float32,
// channels_last. It is for prepared models alone, so it is no op of the package: engine/graph/smooth_residual.py
// arranges the weights and asks for it where it gains. Work split: a task is some rows of one image, of which there are
// several only where there are fewer images than threads; or some pixels.
#include "../simd/smooth_residual_kernels.h"

#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../ceil_div.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kPixelsTogether = 56;  // of a pass without rows: whole tiles, whose maps fit into a cache
constexpr int64_t kTapsAtMost = 128;

bool is_floats(const Tensor& t, int64_t dim) {
  return t.dim() == dim && t.is_cpu() && t.scalar_type() == ScalarType::Float;
}

// Checks one tensor: contiguous, of the given sizes.
void check_sizes(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = is_floats(t, static_cast<int64_t>(sizes.size())) && t.is_contiguous();
  int64_t d = 0;
  for (const int64_t size : sizes) same = same && t.size(d++) == size;
  PYSAL_CHECK(same, op, ": ", name, " is not float32 of the sizes that the others ask for");
}
void check_panels(const char* op, const char* name, const Tensor& panels, int64_t depth, int64_t columns) {
  check_sizes(op, name, panels, {ceil_div(columns, 16), depth, 16});
}
void check_map(const char* op, const char* name, const Tensor& t, int64_t images, int64_t channels, int64_t height,
               int64_t width) {
  PYSAL_CHECK(
      is_floats(t, 4) && t.size(0) == images && t.size(1) == channels && t.size(2) == height && t.size(3) == width, op,
      ": ", name, " must be (", images, ", ", channels, ", ", height, ", ", width, ") in float32 on the CPU");
}

int64_t pitch_of(int64_t channels) { return ceil_div(channels, 16) * 16; }

void check_channels(const char* op, int64_t channels) {
  PYSAL_CHECK(channels >= 16 && channels <= int64_t{1} << 24, op, ": channels must be at least 16, got ", channels);
}

void check_kind(const char* op, int64_t kind) {
  PYSAL_CHECK(kind >= 0 && kind < kActivations, op, ": kind must be at least 0 and less than ", kActivations, ", got ",
              kind);
}

void check_depthwise(const char* op, const Tensor& depthwise, int64_t pitch, int64_t row_stride, int64_t column_stride,
                     int64_t top, int64_t left) {
  PYSAL_CHECK(is_floats(depthwise, 3) && depthwise.is_contiguous() && depthwise.size(2) == pitch &&
                  depthwise.size(0) >= 1 && depthwise.size(1) >= 1 &&
                  depthwise.size(0) * depthwise.size(1) <= kTapsAtMost,
              op, ": depthwise must be (kh, kw, ", pitch, ") in float32, of at most ", kTapsAtMost, " taps");
  PYSAL_CHECK(row_stride >= 1 && column_stride >= 1 && row_stride <= depthwise.size(0) &&
                  column_stride <= depthwise.size(1) && top >= 0 && left >= 0 && top < depthwise.size(0) &&
                  left < depthwise.size(1),
              op, ": strides must be between 1 and the kernel's size, padding less than that");
}

void set_depthwise(SmoothResidual& b, const Tensor& depthwise, int64_t row_stride, int64_t column_stride, int64_t top,
                   int64_t left) {
  b.depthwise = depthwise.const_data_ptr<float>();
  b.kernel_height = depthwise.size(0), b.kernel_width = depthwise.size(1);
  b.row_stride = row_stride, b.column_stride = column_stride, b.top = top, b.left = left;
}

// Runs rows(block, image, begin, end, scratch) for all rows of what a pass makes.
template <class Rows>
void run_rows(const SmoothResidual& b, int64_t images, bool forward, const Rows& rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(images >= threads ? 1 : threads, b.out_height);  // of an image
  const int64_t floats = PYSAL_PICK(smooth_residual).scratch_floats(b, forward);
  parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(floats * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      rows(b, task / parts, part * b.out_height / parts, (part + 1) * b.out_height / parts, scratch);
    }
  });
}

// Adds up what parts of an image have, (images, parts, pitch), to (images, channels).
Tensor added_up(const Tensor& like, const Tensor& parts, int64_t images, int64_t count, int64_t pitch,
                int64_t channels) {
  Tensor result = empty(like, {images, channels});
  const float* const from = parts.const_data_ptr<float>();
  float* const to = result.mutable_data_ptr<float>();
  for (int64_t image = 0; image < images; ++image) {
    float* const sums = to + image * channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0.0f;
    for (int64_t part = 0; part < count; ++part) {
      const float* const some = from + (image * count + part) * pitch;
      for (int64_t c = 0; c < channels; ++c) sums[c] += some[c];
    }
  }
  return result;
}

// (N, pitch, h, w): what the depthwise convolution gives; (N, channels): the sums of its activation, where `squeezes`;
// (N, pitch, H, W): the derivative of the first activation, empty where nothing expands.
std::tuple<Tensor, Tensor, Tensor> smooth_residual_enter(const Tensor& input, const std::optional<Tensor>& expand,
                                                         const std::optional<Tensor>& expand_bias,
                                                         const Tensor& depthwise, const Tensor& depthwise_bias,
                                                         int64_t channels, int64_t first, double first_slope,
                                                         int64_t second, double second_slope, bool squeezes,
                                                         int64_t row_stride, int64_t column_stride, int64_t top,
                                                         int64_t bottom, int64_t left, int64_t right) {
  const char* op = "pysal_blocks::smooth_residual_enter";
  check_channels(op, channels);
  check_kind(op, first);
  check_kind(op, second);
  const int64_t pitch = pitch_of(channels);
  check_depthwise(op, depthwise, pitch, row_stride, column_stride, top, left);
  PYSAL_CHECK(bottom >= 0 && bottom < depthwise.size(0) && right >= 0 && right < depthwise.size(1), op,
              ": padding must be at least 0 and less than the kernel's size");
  PYSAL_CHECK(is_floats(input, 4), op, ": input must be (N, C, H, W) in float32 on the CPU");
  const int64_t images = input.size(0), in_channels = input.size(1), height = input.size(2), width = input.size(3);
  PYSAL_CHECK(expand ? in_channels >= 1 : in_channels == pitch, op,
              ": input must have the channels of depthwise where nothing expands");
  PYSAL_CHECK(height + top + bottom >= depthwise.size(0) && width + left + right >= depthwise.size(1), op,
              ": the kernel must fit into the input");
  PYSAL_CHECK(expand.has_value() == expand_bias.has_value(), op, ": expand and its bias belong together");
  if (expand) check_panels(op, "expand", *expand, in_channels, channels);
  if (expand) check_sizes(op, "the bias of expand", *expand_bias, {channels});
  check_sizes(op, "the bias of depthwise", depthwise_bias, {pitch});
  const Tensor from = dense(input, true);
  SmoothResidual b{};
  set_depthwise(b, depthwise, row_stride, column_stride, top, left);
  b.in_height = height, b.in_width = width;
  b.out_height = (height + top + bottom - depthwise.size(0)) / row_stride + 1;
  b.out_width = (width + left + right - depthwise.size(1)) / column_stride + 1;
  b.images = std::max<int64_t>(images, 1), b.channels = channels, b.pitch = pitch, b.first_channels = in_channels;
  b.first = static_cast<Activation>(first), b.first_slope = static_cast<float>(first_slope);
  b.second = static_cast<Activation>(second), b.second_slope = static_cast<float>(second_slope);
  Tensor middle = empty(input, {images, pitch, b.out_height, b.out_width}, std::nullopt, true);
  Tensor first_slopes = empty(input, {expand ? images : 0, pitch, height, width}, std::nullopt, true);
  Tensor parts = empty(input, {squeezes ? images : 0, b.out_height, pitch});
  b.input = from.const_data_ptr<float>();
  if (expand) {
    b.expand = expand->const_data_ptr<float>(), b.expand_bias = expand_bias->const_data_ptr<float>();
    b.first_slopes = first_slopes.mutable_data_ptr<float>();
  }
  b.depthwise_bias = depthwise_bias.const_data_ptr<float>();
  b.middle = middle.mutable_data_ptr<float>();
  if (squeezes) b.sums = parts.mutable_data_ptr<float>();
  run_rows(b, images, true, PYSAL_PICK(smooth_residual).enter);
  return {middle, added_up(input, parts, squeezes ? images : 0, b.out_height, pitch, channels), first_slopes};
}

// project(second(middle) gate) + shortcut
Tensor smooth_residual_leave(const Tensor& middle, const std::optional<Tensor>& gate, const Tensor& project,
                             const Tensor& project_bias, const std::optional<Tensor>& shortcut, int64_t channels,
                             int64_t second, double second_slope) {
  const char* op = "pysal_blocks::smooth_residual_leave";
  check_channels(op, channels);
  check_kind(op, second);
  const int64_t pitch = pitch_of(channels), last = project_bias.numel();
  PYSAL_CHECK(is_floats(middle, 4), op, ": middle must be (N, C, H, W) in float32 on the CPU");
  const int64_t images = middle.size(0), height = middle.size(2), width = middle.size(3), pixels = height * width;
  check_map(op, "middle", middle, images, pitch, height, width);
  PYSAL_CHECK(last >= 16, op, ": output must have at least 16 channels");
  check_panels(op, "project", project, channels, last);
  check_sizes(op, "the bias of project", project_bias, {last});
  if (gate) check_sizes(op, "gate", *gate, {images, pitch});
  if (shortcut) check_map(op, "shortcut", *shortcut, images, last, height, width);
  const Tensor from = dense(middle, true);
  const std::optional<Tensor> onto = shortcut ? std::optional(dense(*shortcut, true)) : std::nullopt;
  Tensor output = empty(middle, {images, last, height, width}, std::nullopt, true);
  SmoothResidual b{};
  b.out_height = height, b.out_width = width, b.images = images;
  b.channels = channels, b.pitch = pitch, b.last_channels = last;
  b.second = static_cast<Activation>(second), b.second_slope = static_cast<float>(second_slope);
  b.middle = const_cast<float*>(from.const_data_ptr<float>());
  b.gate = gate ? gate->const_data_ptr<float>() : nullptr;
  b.project = project.const_data_ptr<float>(), b.project_bias = project_bias.const_data_ptr<float>();
  b.onto = onto ? onto->const_data_ptr<float>() : nullptr;
  b.output = output.mutable_data_ptr<float>();
  const int64_t parts = ceil_div(pixels, kPixelsTogether);
  parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(kPixelsTogether * pitch * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * kPixelsTogether;
      PYSAL_PICK(smooth_residual).leave(b, task / parts, first, std::min(kPixelsTogether, pixels - first), scratch);
    }
  });
  return output;
}

// (T N, channels): the gradient of the gates, the sums over pixels of second(middle) times the gradient of its product
// with them; and that, (T N, pitch, h, w).
std::tuple<Tensor, Tensor> smooth_residual_gate_gradient(const Tensor& grad, const Tensor& middle,
                                                         const Tensor& project_transposed, int64_t channels,
                                                         int64_t second, double second_slope) {
  const char* op = "pysal_blocks::smooth_residual_gate_gradient";
  check_channels(op, channels);
  check_kind(op, second);
  const int64_t pitch = pitch_of(channels);
  PYSAL_CHECK(is_floats(grad, 4) && is_floats(middle, 4) && middle.size(0) >= 1 && grad.size(0) % middle.size(0) == 0,
              op, ": grad and middle must be (T N, C, H, W) and (N, C, H, W) in float32 on the CPU");
  const int64_t rows = grad.size(0), height = grad.size(2), width = grad.size(3), pixels = height * width;
  check_map(op, "middle", middle, middle.size(0), pitch, height, width);
  check_panels(op, "project", project_transposed, grad.size(1), channels);
  const Tensor from = dense(grad, true), between = dense(middle, true);
  SmoothResidual b{};
  b.in_height = height, b.in_width = width, b.images = middle.size(0);
  b.channels = channels, b.pitch = pitch, b.last_channels = grad.size(1);
  b.second = static_cast<Activation>(second), b.second_slope = static_cast<float>(second_slope);
  b.middle = const_cast<float*>(between.const_data_ptr<float>());
  b.grad = from.const_data_ptr<float>();
  b.project_transposed = project_transposed.const_data_ptr<float>();
  const int64_t parts = ceil_div(pixels, kPixelsTogether);
  Tensor each = empty(grad, {rows, parts, pitch});
  Tensor passed = empty(grad, {rows, pitch, height, width}, std::nullopt, true);
  b.passed = passed.mutable_data_ptr<float>();
  float* const sums = each.mutable_data_ptr<float>();
  parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * kPixelsTogether, count = std::min(kPixelsTogether, pixels - first);
      PYSAL_PICK(smooth_residual).gate_sums(b, task / parts, first, count, sums + task * pitch);
    }
  });
  return {added_up(grad, each, rows, parts, pitch, channels), passed};
}

// Row n of grad is a gradient of image n % N. `onto`, like the result, is added to it.
Tensor smooth_residual_backward(const Tensor& grad, const std::optional<Tensor>& passed, const Tensor& middle,
                                const std::optional<Tensor>& first_slopes, const std::optional<Tensor>& gate,
                                const std::optional<Tensor>& added, const Tensor& project_transposed,
                                const Tensor& depthwise, const std::optional<Tensor>& expand_transposed,
                                const std::optional<Tensor>& onto, int64_t channels, int64_t second,
                                double second_slope, int64_t in_channels, int64_t in_height, int64_t in_width,
                                int64_t row_stride, int64_t column_stride, int64_t top, int64_t left) {
  const char* op = "pysal_blocks::smooth_residual_backward";
  check_channels(op, channels);
  check_kind(op, second);
  const int64_t pitch = pitch_of(channels);
  check_depthwise(op, depthwise, pitch, row_stride, column_stride, top, left);
  PYSAL_CHECK(is_floats(grad, 4) && is_floats(middle, 4) && middle.size(0) >= 1 && grad.size(0) % middle.size(0) == 0,
              op, ": grad and middle must be (T N, C, H, W) and (N, C, H, W) in float32 on the CPU");
  const int64_t rows = grad.size(0), images = middle.size(0), height = grad.size(2), width = grad.size(3);
  check_map(op, "middle", middle, images, pitch, height, width);
  PYSAL_CHECK(in_height >= 1 && in_width >= 1 && (expand_transposed ? in_channels >= 16 : in_channels == pitch), op,
              ": input must have at least 16 channels, or those of depthwise where nothing expands");
  check_panels(op, "project", project_transposed, grad.size(1), channels);
  PYSAL_CHECK(expand_transposed.has_value() == first_slopes.has_value(), op, ": expand and its slopes belong together");
  if (expand_transposed) {
    check_panels(op, "expand", *expand_transposed, channels, in_channels);
    check_map(op, "first_slopes", *first_slopes, images, pitch, in_height, in_width);
  }
  if (gate) check_sizes(op, "gate", *gate, {images, pitch});
  if (added) check_sizes(op, "added", *added, {rows, pitch});
  if (passed) check_map(op, "passed", *passed, rows, pitch, height, width);
  if (onto) check_map(op, "onto", *onto, rows, in_channels, in_height, in_width);
  const auto laid_out = [](const std::optional<Tensor>& t) {
    return t ? std::optional(dense(*t, true)) : std::nullopt;
  };
  const auto of = [](const std::optional<Tensor>& t) {
    return t ? const_cast<float*>(t->const_data_ptr<float>()) : nullptr;
  };
  const Tensor from = dense(grad, true), between = dense(middle, true);
  const std::optional<Tensor> slopes = laid_out(first_slopes), through = laid_out(passed), sum = laid_out(onto);
  Tensor output = empty(grad, {rows, in_channels, in_height, in_width}, std::nullopt, true);
  SmoothResidual b{};
  set_depthwise(b, depthwise, row_stride, column_stride, top, left);
  b.in_height = height, b.in_width = width, b.out_height = in_height, b.out_width = in_width;
  b.images = images, b.channels = channels, b.pitch = pitch;
  b.first_channels = in_channels, b.last_channels = grad.size(1);
  b.second = static_cast<Activation>(second), b.second_slope = static_cast<float>(second_slope);
  b.grad = from.const_data_ptr<float>(), b.middle = const_cast<float*>(between.const_data_ptr<float>());
  b.first_slopes = of(slopes), b.gate = of(gate), b.added = of(added), b.passed = of(through);
  b.project_transposed = project_transposed.const_data_ptr<float>();
  b.expand_transposed = of(expand_transposed);
  b.onto = of(sum), b.output = output.mutable_data_ptr<float>();
  run_rows(b, rows, false, PYSAL_PICK(smooth_residual).backward);
  return output;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(pysal_blocks, m) {
  m.def(
      "smooth_residual_enter(Tensor input, Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor "
      "depthwise_bias, int channels, int first, float first_slope, int second, float second_slope, bool squeezes, int "
      "row_stride, int column_stride, int top, int bottom, int left, int right) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "smooth_residual_leave(Tensor middle, Tensor? gate, Tensor project, Tensor project_bias, Tensor? shortcut, int "
      "channels, int second, float second_slope) -> Tensor");
  m.def(
      "smooth_residual_gate_gradient(Tensor grad, Tensor middle, Tensor project_transposed, int channels, int second, "
      "float second_slope) -> (Tensor, Tensor)");
  m.def(
      "smooth_residual_backward(Tensor grad, Tensor? passed, Tensor middle, Tensor? first_slopes, Tensor? gate, "
      "Tensor? added, Tensor project_transposed, Tensor depthwise, Tensor? expand_transposed, Tensor? onto, int "
      "channels, int second, float second_slope, int in_channels, int in_height, int in_width, int row_stride, int "
      "column_stride, int top, int left) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_blocks, CPU, m) {
  m.impl("smooth_residual_enter", TORCH_BOX(&pysal::cpu::smooth_residual_enter));
  m.impl("smooth_residual_leave", TORCH_BOX(&pysal::cpu::smooth_residual_leave));
  m.impl("smooth_residual_gate_gradient", TORCH_BOX(&pysal::cpu::smooth_residual_gate_gradient));
  m.impl("smooth_residual_backward", TORCH_BOX(&pysal::cpu::smooth_residual_backward));
}
