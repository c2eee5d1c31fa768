// Torch glue of the CUDA kernels of gaussian_scale_space; gaussian_scale_space.cu says what they compute.
#include "gaussian_scale_space.h"
#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
constexpr double kMaxSigma = 1e6;                     // as the wrapper says
constexpr int64_t kMaxSide = (int64_t(1) << 29) - 1;  // the kernel counts positions of the reflected line in an int

void check(const char* op, const Tensor& images, FloatList sigmas, double step, int64_t boundary) {
  PYSAL_CHECK(images.dim() == 4, op, ": images must have 4 dimensions, got ", images.dim());
  PYSAL_CHECK(static_cast<int64_t>(sigmas.size()) == images.size(0), op, ": sigmas must have ", images.size(0),
              " elements, one per image, got ", sigmas.size());
  PYSAL_CHECK(step >= 0 && step <= kMaxSigma, op, ": step must be between 0 and 1e6, got ", step);
  PYSAL_CHECK(boundary == 0 || boundary == 1, op, ": boundary must be 0 or 1, got ", boundary);
  PYSAL_CHECK(images.size(2) <= kMaxSide && images.size(3) <= kMaxSide, op, ": images must have sides below 2^29, got ",
              images.size(2), " x ", images.size(3));
  for (const double sigma : sigmas)
    PYSAL_CHECK(sigma >= 0 && sigma <= kMaxSigma, op, ": sigmas must be between 0 and 1e6, got ", sigma);
}

void fill(DType dtype, const Tensor& images, FloatList sigmas, double step, int64_t boundary, Tensor& levels,
          Tensor* derivatives) {
  if (levels.numel() == 0) return;
  const Launch launch(images);
  const bool repeated = images.size(0) > 1 && images.stride(0) == 0;
  Tensor source = images;
  if (repeated) source = torch::stable::narrow(source, 0, 0, 1);
  source = dense(source);
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const ScalarType arithmetic = dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  const int64_t both = derivatives == nullptr ? 1 : 2, kinds = derivatives == nullptr ? 1 : 3;
  Tensor columns = empty(source, {both * levels.numel()}, arithmetic);
  Tensor taps = empty(source, {kinds * count * (height + width + 2)}, arithmetic);
  Tensor reaches = empty(source, {2 * count}, ScalarType::Int);
  launch_gaussian_scale_space(dtype,
                              {source.const_data_ptr(), levels.mutable_data_ptr(),
                               derivatives == nullptr ? nullptr : derivatives->mutable_data_ptr(), sigmas.data(), step,
                               count, channels, height, width, repeated, boundary == 1, columns.mutable_data_ptr(),
                               taps.mutable_data_ptr(), reaches.mutable_data_ptr<int32_t>()},
                              launch.stream());
}

Tensor gaussian_scale_space_cuda(const Tensor& images, FloatList sigmas, int64_t boundary) {
  const char* op = "pysal::gaussian_scale_space";
  check(op, images, sigmas, 0.0, boundary);
  const DType dtype = dtype_of(images, op);
  Tensor levels = empty(images, images.sizes());
  fill(dtype, images, sigmas, 0.0, boundary, levels, nullptr);
  return levels;
}

std::tuple<Tensor, Tensor> gaussian_scale_space_derivative_cuda(const Tensor& images, FloatList sigmas, double step,
                                                                int64_t boundary) {
  const char* op = "pysal::gaussian_scale_space_derivative";
  check(op, images, sigmas, step, boundary);
  const DType dtype = dtype_of(images, op);
  Tensor levels = empty(images, images.sizes()), derivatives = empty(images, images.sizes());
  fill(dtype, images, sigmas, step, boundary, levels, &derivatives);
  return {levels, derivatives};
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("gaussian_scale_space", TORCH_BOX(&pysal::cuda::gaussian_scale_space_cuda));
  m.impl("gaussian_scale_space_derivative", TORCH_BOX(&pysal::cuda::gaussian_scale_space_derivative_cuda));
}
