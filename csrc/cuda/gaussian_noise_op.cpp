// Torch glue of the CUDA kernels of gaussian_noise; gaussian_noise.cu says what they compute.
#include "gaussian_noise.h"
#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
constexpr int64_t kMaxElements = int64_t(1) << 34;  // of an image: the counter's first word is element / 4

void check_values(const char* op, const char* argument, const Tensor& values, int64_t count, ScalarType dtype,
                  const Tensor& like) {
  PYSAL_CHECK(values.scalar_type() == dtype && values.numel() == count && same_device(values, like), op, ": ", argument,
              " must be ", count, " ", torch::headeronly::toString(dtype), " on the device of the other tensors, got ",
              values.numel(), " elements of ", torch::headeronly::toString(values.scalar_type()));
}

Tensor gaussian_noise_cuda(const Tensor& images, const Tensor& scales, int64_t seed, const Tensor& rows,
                           const Tensor& image_ids, const Tensor& samples, ScalarType dtype, bool channels_last) {
  const char* op = "pysal::gaussian_noise";
  PYSAL_CHECK(images.dim() == 4, op, ": images must have 4 dimensions, got ", images.dim());
  const int64_t count = rows.numel(), batch = images.size(0), channels = images.size(1);
  const int64_t pixels = images.size(2) * images.size(3);
  PYSAL_CHECK(channels * pixels < kMaxElements, op, ": images must have fewer than 2^34 elements each, got ",
              channels * pixels);
  check_values(op, "scales", scales, batch, ScalarType::Double, images);
  check_values(op, "rows", rows, count, ScalarType::Int, images);
  check_values(op, "image_ids", image_ids, count, ScalarType::Long, images);
  check_values(op, "samples", samples, count, ScalarType::Long, images);
  const DType images_dtype = dtype_of(images, op);
  const Launch launch(images);
  const bool images_last = is_channels_last(images);
  const Tensor source = dense(images, images_last), scale = dense(scales), row = dense(rows), id = dense(image_ids),
               sample = dense(samples);
  Tensor output = empty(source, {count, channels, images.size(2), images.size(3)}, dtype, channels_last);
  PYSAL_CHECK(batch > 0 || output.numel() == 0, op, ": images must not be empty where rows are not, got batch ", batch);
  const DType output_dtype = dtype_of(output, op);
  launch_gaussian_noise(
      {source.const_data_ptr(), output.mutable_data_ptr(), images_dtype, output_dtype, images_last, channels_last,
       scale.const_data_ptr<double>(), row.const_data_ptr<int32_t>(), id.const_data_ptr<int64_t>(),
       sample.const_data_ptr<int64_t>(), seed, batch, count, channels, pixels},
      launch.stream());
  return output;
}

Tensor gaussian_noise_bits_cuda(int64_t seed, const Tensor& image_ids, const Tensor& samples, int64_t elements) {
  const char* op = "pysal::gaussian_noise_bits";
  PYSAL_CHECK(elements >= 0 && elements < kMaxElements, op, ": elements must be in [0, 2^34), got ", elements);
  const int64_t count = image_ids.numel();
  check_values(op, "image_ids", image_ids, count, ScalarType::Long, image_ids);
  check_values(op, "samples", samples, count, ScalarType::Long, image_ids);
  const Launch launch(image_ids);
  const Tensor id = dense(image_ids), sample = dense(samples);
  Tensor output = empty(id, {count, elements}, ScalarType::Long);
  launch_gaussian_noise_bits({id.const_data_ptr<int64_t>(), sample.const_data_ptr<int64_t>(),
                              output.mutable_data_ptr<int64_t>(), seed, count, elements},
                             launch.stream());
  return output;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("gaussian_noise", TORCH_BOX(&pysal::cuda::gaussian_noise_cuda));
  m.impl("gaussian_noise_bits", TORCH_BOX(&pysal::cuda::gaussian_noise_bits_cuda));
}
