// Torch glue of the CUDA kernels of guided_relu; guided_relu.cu says what they compute.
#include "ceil_div.h"
#include "guided_relu.h"
#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
std::tuple<Tensor, Tensor> guided_relu_cuda(const Tensor& input, double upper, int64_t /*rule*/) {
  const DType dtype = dtype_of(input, "pysal::guided_relu");
  const Launch launch(input);
  const bool channels_last = is_channels_last(input);
  const Tensor source = dense(input, channels_last);
  const int64_t count = source.numel();
  Tensor output = empty(source, source.sizes(), std::nullopt, channels_last);
  Tensor gates = empty(source, {ceil_div(count, 8)}, ScalarType::Byte);
  launch_guided_relu(
      dtype, {source.const_data_ptr(), output.mutable_data_ptr(), gates.mutable_data_ptr<uint8_t>(), count, upper},
      launch.stream());
  return {output, gates};
}

Tensor guided_relu_gates_cuda(const Tensor& input, double upper) {
  const DType dtype = dtype_of(input, "pysal::guided_relu_gates");
  const Launch launch(input);
  const Tensor source = dense(input, is_channels_last(input));
  const int64_t count = source.numel();
  Tensor gates = empty(source, {ceil_div(count, 8)}, ScalarType::Byte);
  launch_guided_relu(dtype, {source.const_data_ptr(), nullptr, gates.mutable_data_ptr<uint8_t>(), count, upper},
                     launch.stream());
  return gates;
}

void check_backward(const char* op, const char* name, const Tensor& grad, const Tensor& gates, int64_t rule,
                    bool channels_last) {
  PYSAL_CHECK(!channels_last || grad.dim() == 4, "pysal::", op, ": channels_last must be false unless ", name,
              " is 4-D, got ", grad.dim(), " dimensions");
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::", op, ": rule must be 0, 1 or 2, got ", rule);
  const int64_t bytes = ceil_div(grad.numel(), 8);
  PYSAL_CHECK(gates.scalar_type() == ScalarType::Byte && gates.numel() == bytes && same_device(gates, grad),
              "pysal::", op, ": gates must be ", bytes, " uint8 on the device of ", name, ", got ", gates.numel(),
              " elements of ", torch::headeronly::toString(gates.scalar_type()));
}

Tensor guided_relu_backward_cuda(const Tensor& grad_output, const Tensor& gates, int64_t rule, bool channels_last) {
  check_backward("guided_relu_backward", "grad_output", grad_output, gates, rule, channels_last);
  const DType dtype = dtype_of(grad_output, "pysal::guided_relu_backward");
  const Launch launch(grad_output);
  const Tensor source = dense(grad_output, channels_last), dense_gates = dense(gates);
  Tensor grad_input = empty(source, source.sizes(), std::nullopt, channels_last);
  launch_guided_relu_backward(dtype,
                              {source.const_data_ptr(), dense_gates.const_data_ptr<uint8_t>(),
                               grad_input.mutable_data_ptr(), source.numel(), static_cast<int>(rule)},
                              launch.stream());
  return grad_input;
}

// Worked on where it lies if it is dense in that order, else on a dense copy that is written back.
void guided_relu_backward_in_place_cuda(const Tensor& grad, const Tensor& gates, int64_t rule, bool channels_last) {
  check_backward("guided_relu_backward_", "grad", grad, gates, rule, channels_last);
  const DType dtype = dtype_of(grad, "pysal::guided_relu_backward_");
  const Launch launch(grad);
  const Tensor values = dense(grad, channels_last), dense_gates = dense(gates);
  launch_guided_relu_backward(dtype,
                              {values.const_data_ptr(), dense_gates.const_data_ptr<uint8_t>(),
                               values.mutable_data_ptr(), values.numel(), static_cast<int>(rule)},
                              launch.stream());
  if (values.const_data_ptr() != grad.const_data_ptr()) {
    Tensor given = grad;
    torch::stable::copy_(given, values);
  }
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("guided_relu", TORCH_BOX(&pysal::cuda::guided_relu_cuda));
  m.impl("guided_relu_gates", TORCH_BOX(&pysal::cuda::guided_relu_gates_cuda));
  m.impl("guided_relu_backward", TORCH_BOX(&pysal::cuda::guided_relu_backward_cuda));
  m.impl("guided_relu_backward_", TORCH_BOX(&pysal::cuda::guided_relu_backward_in_place_cuda));
}
