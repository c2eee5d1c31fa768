// Torch glue of the CUDA kernels of guided_relu; guided_relu.cu says what they compute.
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
  Tensor gates = empty(source, {(count + 7) / 8}, ScalarType::Byte);
  launch_guided_relu(
      dtype, {source.const_data_ptr(), output.mutable_data_ptr(), gates.mutable_data_ptr<uint8_t>(), count, upper},
      launch.stream());
  return {output, gates};
}

Tensor guided_relu_backward_cuda(const Tensor& grad_output, const Tensor& gates, int64_t rule, bool channels_last) {
  PYSAL_CHECK(!channels_last || grad_output.dim() == 4,
              "pysal::guided_relu_backward: channels_last must be false unless grad_output is 4-D, got ",
              grad_output.dim(), " dimensions");
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::guided_relu_backward: rule must be 0, 1 or 2, got ", rule);
  const int64_t count = grad_output.numel(), bytes = (count + 7) / 8;
  PYSAL_CHECK(gates.scalar_type() == ScalarType::Byte && gates.numel() == bytes && same_device(gates, grad_output),
              "pysal::guided_relu_backward: gates must be ", bytes, " uint8 on the device of grad_output, got ",
              gates.numel(), " elements of ", torch::headeronly::toString(gates.scalar_type()));
  const DType dtype = dtype_of(grad_output, "pysal::guided_relu_backward");
  const Launch launch(grad_output);
  const Tensor source = dense(grad_output, channels_last), dense_gates = dense(gates);
  Tensor grad_input = empty(source, source.sizes(), std::nullopt, channels_last);
  launch_guided_relu_backward(dtype,
                              {source.const_data_ptr(), dense_gates.const_data_ptr<uint8_t>(),
                               grad_input.mutable_data_ptr(), count, static_cast<int>(rule)},
                              launch.stream());
  return grad_input;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("guided_relu", TORCH_BOX(&pysal::cuda::guided_relu_cuda));
  m.impl("guided_relu_backward", TORCH_BOX(&pysal::cuda::guided_relu_backward_cuda));
}
