// Torch glue of epilogue_.
#include "epilogue.h"

#include "arguments.h"
#include "ceil_div.h"
#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
bool has_gates(int64_t activation) {
  return activation == static_cast<int64_t>(Activation::relu) ||
         activation == static_cast<int64_t>(Activation::leaky_relu);
}

void check_activation(const char* op, int64_t activation) {
  PYSAL_CHECK(activation >= 0 && activation < kActivations, "pysal::", op, ": activation must be 0 to ",
              kActivations - 1, ", got ", activation);
}

// Worked on where it lies if it is dense, else on a dense copy that is written back.
void write_back(const Tensor& values, const Tensor& given) {
  if (values.const_data_ptr() == given.const_data_ptr()) return;
  Tensor target = given;
  torch::stable::copy_(target, values);
}

Tensor epilogue_cuda(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& shortcut,
                     int64_t activation, double parameter, bool keep) {
  const char* const op = "epilogue_";
  const DType dtype = dtype_of(x, "pysal::epilogue_");
  check_activation(op, activation);
  PYSAL_CHECK(x.dim() >= 2, "pysal::epilogue_: x must have at least 2 dimensions, got ", x.dim());
  const Launch launch(x);
  const bool channels_last = is_channels_last(x);
  const int64_t count = x.numel(), channels = x.size(1);
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> biases, other;
  if (bias) biases = values_on_device(op, "bias", *bias, channels, wide, x);
  if (shortcut) {
    check_alike(op, "shortcut", *shortcut, x);
    other = dense(*shortcut, channels_last);
  }
  const Tensor values = dense(x, channels_last);
  const bool gates = keep && has_gates(activation), sums = keep && !gates && activation != 0;
  Tensor kept = sums ? empty(x, x.sizes(), std::nullopt, channels_last)
                     : empty(x, {gates ? ceil_div(count, 8) : 0}, ScalarType::Byte);
  launch_epilogue(dtype,
                  {values.mutable_data_ptr(), biases ? biases->const_data_ptr() : nullptr,
                   other ? other->const_data_ptr() : nullptr, gates ? kept.mutable_data_ptr<uint8_t>() : nullptr,
                   sums ? kept.mutable_data_ptr() : nullptr, count, channels, pixels, channels_last,
                   static_cast<Activation>(activation), parameter},
                  launch.stream());
  write_back(values, x);
  return kept;
}

void epilogue_backward_cuda(const Tensor& grad, const std::optional<Tensor>& added, const Tensor& kept,
                            int64_t activation, double parameter, int64_t rule, int64_t images, bool channels_last) {
  const char* const op = "epilogue_backward_";
  const DType dtype = dtype_of(grad, "pysal::epilogue_backward_");
  check_activation(op, activation);
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::epilogue_backward_: rule must be 0, 1 or 2, got ", rule);
  PYSAL_CHECK(grad.dim() >= 1 && (!channels_last || grad.dim() == 4),
              "pysal::epilogue_backward_: grad must have at least 1 dimension, and 4 where channels_last is true, got ",
              grad.dim());
  const int64_t rows = grad.size(0);
  PYSAL_CHECK(images > 0 ? rows % images == 0 : rows == 0, "pysal::epilogue_backward_: grad must have a multiple of ",
              images, " rows, got ", rows);
  if (grad.numel() == 0) return;
  const Launch launch(grad);
  const int64_t count = grad.numel() / rows * images;
  std::optional<Tensor> other, sums;
  if (added) {
    check_alike(op, "added", *added, grad);
    other = dense(*added, channels_last);
  }
  const bool gated = has_gates(activation);
  PYSAL_CHECK(activation == 0 ||
                  (same_device(kept, grad) && kept.scalar_type() == (gated ? ScalarType::Byte : grad.scalar_type()) &&
                   kept.numel() == (gated ? ceil_div(count, 8) : count)),
              "pysal::epilogue_backward_: kept must be what epilogue_ returned for ", count,
              " elements on the device of grad");
  PYSAL_CHECK(gated || activation == 0 || !channels_last || kept.dim() == 4,
              "pysal::epilogue_backward_: kept must have 4 dimensions where channels_last is true");
  if (activation != 0) sums = dense(kept, channels_last && !gated);
  const Tensor values = dense(grad, channels_last);
  launch_epilogue_backward(
      dtype,
      {values.mutable_data_ptr(), other ? other->const_data_ptr() : nullptr,
       gated ? sums->const_data_ptr<uint8_t>() : nullptr, sums && !gated ? sums->const_data_ptr() : nullptr, count,
       rows / images, static_cast<Activation>(activation), parameter, static_cast<int>(rule)},
      launch.stream());
  write_back(values, grad);
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("epilogue_", TORCH_BOX(&pysal::cuda::epilogue_cuda));
  m.impl("epilogue_backward_", TORCH_BOX(&pysal::cuda::epilogue_backward_cuda));
}
