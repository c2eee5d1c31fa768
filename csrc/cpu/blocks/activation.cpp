// activation: smooth activations, alone or times a gate for each image and channel, as squeeze-and-excitation has it
// (Hu et al. 2018, arXiv:1709.01507); their gradient, in place; and the sums over pixels of an activation, which
// gates are made from, or of its product with a gradient, which is the gradient of a gate. float32. They are for
// prepared models on a CPU alone, so they are no ops of the package: engine/graph/activations.py asks for them.
// Work split: parts of the elements; where there are gates, pixels of one image; sums are a task for each image.
#include "../simd/activation_kernels.h"

#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kGrain = 16384;  // numbers per task at least: they outlast the cost of a thread

bool is_floats(const Tensor& t) { return t.is_cpu() && t.scalar_type() == ScalarType::Float; }

void check_kind(const char* op, int64_t kind) {
  PYSAL_CHECK(kind >= 0 && kind < kActivations, op, ": kind must be at least 0 and less than ", kActivations, ", got ",
              kind);
}

void check_by_channel(const char* op, const char* name, const Tensor& t, int64_t images, int64_t channels) {
  PYSAL_CHECK(is_floats(t) && t.dim() == 2 && t.is_contiguous() && t.size(0) == images && t.size(1) == channels, op,
              ": ", name, " must be (", images, ", ", channels, ") in float32 on the CPU");
}

bool is_dense(const Tensor& t, bool channels_last) { return channels_last ? is_channels_last(t) : t.is_contiguous(); }

// (N, C, H, W) in channels_last order; a map of one pixel or one channel is both.
bool is_pixels(const Tensor& t) {
  return t.dim() == 4 && (is_channels_last(t) || (t.is_contiguous() && (t.size(1) == 1 || t.size(2) * t.size(3) == 1)));
}

Activated described(int64_t kind, double slope) {
  Activated a{};
  a.activation = static_cast<Activation>(kind), a.slope = static_cast<float>(slope);
  return a;
}

// Calls body(first, count) for parts of a row of numbers.
template <class Body>
void for_parts(int64_t count, const Body& body) {
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

// Calls body(image, first, count) for some of the pixels of one image.
template <class Body>
void for_pixels(int64_t images, int64_t pixels, int64_t channels, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(channels, 1));
  parallel_for(0, images * pixels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / pixels, first = begin % pixels, count = std::min(end - begin, pixels - first);
      body(image, first, count);
      begin += count;
    }
  });
}

Tensor activation(const Tensor& input, const std::optional<Tensor>& gate, int64_t kind, double slope) {
  const char* op = "pysal_activations::activation";
  check_kind(op, kind);
  PYSAL_CHECK(is_floats(input), op, ": input must be float32 on the CPU");
  if (gate) {
    PYSAL_CHECK(input.dim() == 4, op, ": input must be (N, C, H, W) where there is a gate");
    check_by_channel(op, "gate", *gate, input.size(0), input.size(1));
  }
  const bool last = gate || is_channels_last(input);
  const Tensor from = dense(input, last);
  Tensor output = empty(input, input.sizes(), std::nullopt, last);
  const float* const in = from.const_data_ptr<float>();
  float* const out = output.mutable_data_ptr<float>();
  const ActivationKernels& kernels = PYSAL_PICK(activation);
  if (!gate) {
    for_parts(input.numel(), [&](int64_t first, int64_t count) {
      Activated a = described(kind, slope);
      a.input = in + first, a.pixels = 1, a.channels = count;
      kernels.forward(a, out + first);
    });
    return output;
  }
  const int64_t channels = input.size(1), pixels = input.size(2) * input.size(3);
  const float* const gates = gate->const_data_ptr<float>();
  for_pixels(input.size(0), pixels, channels, [&](int64_t image, int64_t first, int64_t count) {
    Activated a = described(kind, slope);
    const int64_t at = (image * pixels + first) * channels;
    a.input = in + at, a.pixels = count, a.channels = channels, a.gate = gates + image * channels;
    kernels.forward(a, out + at);
  });
  return output;
}

// grad (T N, ...) becomes the gradient of the input (N, ...), row n of it that of image n % N; both in one order.
void activation_backward_(const Tensor& grad, const Tensor& input, const std::optional<Tensor>& gate,
                          const std::optional<Tensor>& added, int64_t kind, double slope) {
  const char* op = "pysal_activations::activation_backward_";
  check_kind(op, kind);
  PYSAL_CHECK(is_floats(grad) && is_floats(input) && grad.dim() == input.dim() && grad.dim() >= 1, op,
              ": grad and input must be float32 on the CPU, of as many dimensions");
  for (int64_t d = 1; d < grad.dim(); ++d)
    PYSAL_CHECK(grad.size(d) == input.size(d), op, ": grad must have the input's size in dimension ", d);
  PYSAL_CHECK(grad.numel() == 0 || grad.size(0) % std::max<int64_t>(input.size(0), 1) == 0, op,
              ": grad must have a multiple of the input's ", input.size(0), " images, got ", grad.size(0));
  if (grad.numel() == 0) return;
  const bool gated = gate.has_value() || added.has_value();
  const bool last = gated || is_channels_last(input);
  PYSAL_CHECK(gated ? is_pixels(grad) && is_pixels(input) : is_dense(grad, last) && is_dense(input, last), op,
              ": grad and input must be dense and of one order, channels_last where there is a gate");
  const float* const in = input.const_data_ptr<float>();
  float* const g = grad.mutable_data_ptr<float>();
  const ActivationKernels& kernels = PYSAL_PICK(activation);
  if (!gated) {
    const int64_t period = input.numel();
    for_parts(grad.numel(), [&](int64_t first, int64_t count) {
      while (count > 0) {
        Activated a = described(kind, slope);
        const int64_t at = first % period, here = std::min(count, period - at);
        a.input = in + at, a.pixels = 1, a.channels = here;
        kernels.backward(a, g + first);
        first += here, count -= here;
      }
    });
    return;
  }
  const int64_t images = input.size(0), channels = input.size(1), pixels = input.size(2) * input.size(3);
  if (gate) check_by_channel(op, "gate", *gate, images, channels);
  if (added) check_by_channel(op, "added", *added, grad.size(0), channels);
  for_pixels(grad.size(0), pixels, channels, [&](int64_t row, int64_t first, int64_t count) {
    Activated a = described(kind, slope);
    const int64_t image = row % images;
    a.input = in + (image * pixels + first) * channels, a.pixels = count, a.channels = channels;
    a.gate = gate ? gate->const_data_ptr<float>() + image * channels : nullptr;
    a.added = added ? added->const_data_ptr<float>() + row * channels : nullptr;
    kernels.backward(a, g + (row * pixels + first) * channels);
  });
}

// (T N, C): the sums over pixels of activation(input), times grad (T N, C, H, W) where there is one.
Tensor activation_sums(const Tensor& input, const std::optional<Tensor>& grad, int64_t kind, double slope) {
  const char* op = "pysal_activations::activation_sums";
  check_kind(op, kind);
  PYSAL_CHECK(is_floats(input) && input.dim() == 4, op, ": input must be (N, C, H, W) in float32 on the CPU");
  const int64_t images = input.size(0), channels = input.size(1), pixels = input.size(2) * input.size(3);
  if (grad)
    PYSAL_CHECK(is_floats(*grad) && grad->dim() == 4 && grad->size(1) == channels && grad->size(2) == input.size(2) &&
                    grad->size(3) == input.size(3) && (images ? grad->size(0) % images == 0 : grad->size(0) == 0),
                op, ": grad must be like the input, of a multiple of its images, in float32");
  const Tensor from = dense(input, true);
  const std::optional<Tensor> times = grad ? std::optional(dense(*grad, true)) : std::nullopt;
  const int64_t rows = grad ? grad->size(0) : images;
  Tensor output = empty(input, {rows, channels});
  const float* const in = from.const_data_ptr<float>();
  const float* const g = times ? times->const_data_ptr<float>() : nullptr;
  float* const out = output.mutable_data_ptr<float>();
  const ActivationKernels& kernels = PYSAL_PICK(activation);
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    float* const partial = static_cast<float*>(scratch_of(channels * static_cast<int64_t>(sizeof(float))));
    for (int64_t row = begin; row < end; ++row) {
      Activated a = described(kind, slope);
      a.input = in + row % images * pixels * channels, a.pixels = pixels, a.channels = channels;
      kernels.sums(a, g ? g + row * pixels * channels : nullptr, partial, out + row * channels);
    }
  });
  return output;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_activations, m) {
  m.def("activation(Tensor input, Tensor? gate, int kind, float slope) -> Tensor");
  m.def(
      "activation_backward_(Tensor(a!) grad, Tensor input, Tensor? gate, Tensor? added, int kind, float slope) -> ()");
  m.def("activation_sums(Tensor input, Tensor? grad, int kind, float slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_activations, CPU, m) {
  m.impl("activation", TORCH_BOX(&pysal::cpu::activation));
  m.impl("activation_backward_", TORCH_BOX(&pysal::cpu::activation_backward_));
  m.impl("activation_sums", TORCH_BOX(&pysal::cpu::activation_sums));
}
