// Torch glue of the CUDA kernels of grad_cam; grad_cam.cu says what they compute.
#include "grad_cam.h"
#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
Tensor grad_cam_cuda(const Tensor& activations, const Tensor& gradients, int64_t height, int64_t width, bool relu) {
  PYSAL_CHECK(activations.dim() == 4 && activations.size(2) > 0 && activations.size(3) > 0,
              "pysal::grad_cam: activations must have 4 dimensions and at least one pixel");
  PYSAL_CHECK(same_device(gradients, activations) && gradients.scalar_type() == activations.scalar_type() &&
                  gradients.sizes().equals(activations.sizes()),
              "pysal::grad_cam: gradients must have the shape, dtype and device of activations");
  PYSAL_CHECK(height >= 1 && width >= 1, "pysal::grad_cam: height and width must be at least 1, got ", height, " and ",
              width);
  const DType dtype = dtype_of(activations, "pysal::grad_cam");
  const Launch launch(activations);
  const bool activations_last = is_channels_last(activations), gradients_last = is_channels_last(gradients);
  const Tensor dense_activations = dense(activations, activations_last),
               dense_gradients = dense(gradients, gradients_last);
  const int64_t batch = activations.size(0), channels = activations.size(1);
  Tensor weights =
      empty(activations, {batch, channels}, dtype == DType::float64 ? ScalarType::Double : ScalarType::Float);
  Tensor out = empty(activations, {batch, 1, height, width});
  launch_grad_cam(dtype,
                  {dense_activations.const_data_ptr(), dense_gradients.const_data_ptr(), activations_last,
                   gradients_last, batch, channels, activations.size(2), activations.size(3),
                   weights.mutable_data_ptr(), out.mutable_data_ptr(), height, width, relu},
                  launch.stream());
  return out;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) { m.impl("grad_cam", TORCH_BOX(&pysal::cuda::grad_cam_cuda)); }
