// Torch glue of the CUDA kernels of path_integral; path_integral.cu says what they compute.
#include "path_integral.h"

#include "arguments.h"

namespace pysal::cuda {
namespace {
// Totals that a sum changes in place: worked on where they lie if they are dense, else on a dense copy that finish()
// writes back.
struct Totals {
  Tensor given, values;

  Totals(const Tensor& totals, bool last) : given(totals), values(dense(totals, last)) {}
  void* data() const { return values.mutable_data_ptr(); }
  void finish() {
    if (values.const_data_ptr() != given.const_data_ptr()) torch::stable::copy_(given, values);
  }
};

DType dtype_of_totals(const char* op, const char* argument, const Tensor& totals) {
  PYSAL_CHECK(totals.scalar_type() == ScalarType::Float || totals.scalar_type() == ScalarType::Double, "pysal::", op,
              ": ", argument, " must be float32 or float64, got ", torch::headeronly::toString(totals.scalar_type()));
  PYSAL_CHECK(totals.dim() > 0, "pysal::", op, ": ", argument, " must have at least 1 dimension");
  return totals.scalar_type() == ScalarType::Double ? DType::float64 : DType::float32;
}

void check_rows_of(const char* op, const char* argument, const Tensor& values, const Tensor& totals, int64_t count) {
  bool alike = same_device(values, totals) && values.dim() == totals.dim() && values.size(0) == count;
  for (int64_t dim = 1; alike && dim < values.dim(); ++dim) alike = values.size(dim) == totals.size(dim);
  PYSAL_CHECK(alike, "pysal::", op, ": ", argument, " must be ", count, " rows of the totals' shape and device");
}

int64_t channels_of(const Tensor& images) { return images.dim() == 4 ? images.size(1) : 1; }
int64_t pixels_of(const Tensor& images) {
  int64_t pixels = 1;
  for (int64_t dim = images.dim() == 4 ? 2 : 1; dim < images.dim(); ++dim) pixels *= images.size(dim);
  return pixels;
}

Tensor path_integral_points_cuda(const Tensor& inputs, const Tensor& baselines, const Tensor& rows,
                                 const Tensor& alphas, ScalarType dtype, bool channels_last) {
  const char* op = "path_integral_points";
  PYSAL_CHECK(inputs.dim() == 4, "pysal::path_integral_points: inputs must have 4 dimensions, got ", inputs.dim());
  check_alike(op, "baselines", baselines, inputs);
  const DType source = dtype_of(inputs, "pysal::path_integral_points"), target = asked_dtype(op, dtype);
  const Launch launch(inputs);
  const int64_t count = rows.numel();
  const Tensor row = values_on_device(op, "rows", rows, count, ScalarType::Int, inputs);
  const Tensor alpha = values_on_device(op, "alphas", alphas, count, ScalarType::Double, inputs);
  const bool last = is_channels_last(inputs);
  const Tensor x = dense(inputs, last), b = dense(baselines, last);
  Tensor out = empty(inputs, {count, inputs.size(1), inputs.size(2), inputs.size(3)}, dtype, channels_last);
  launch_path_points(
      source, target,
      {x.const_data_ptr(), b.const_data_ptr(), last, row.const_data_ptr<int32_t>(), alpha.const_data_ptr<double>(),
       out.mutable_data_ptr(), channels_last, inputs.size(0), count, channels_of(inputs), pixels_of(inputs)},
      launch.stream());
  return out;
}

void path_integral_accumulate_cuda(const Tensor& accumulator, const Tensor& gradients,
                                   const std::optional<Tensor>& factors, const Tensor& rows, const Tensor& weights) {
  const char* op = "path_integral_accumulate_";
  const DType total = dtype_of_totals(op, "accumulator", accumulator);
  const DType gradient = dtype_of(gradients, "pysal::path_integral_accumulate_");
  const Launch launch(accumulator);
  const int64_t count = rows.numel();
  const Tensor& factor = factors ? *factors : gradients;
  check_rows_of(op, "gradients", gradients, accumulator, count);
  check_rows_of(op, "factors", factor, accumulator, count);
  const Tensor row = values_on_device(op, "rows", rows, count, ScalarType::Int, accumulator);
  const Tensor weight = values_on_device(op, "weights", weights, count, ScalarType::Double, accumulator);
  const bool last = is_channels_last(accumulator), gradients_last = is_channels_last(gradients),
             factors_last = is_channels_last(factor);
  const Tensor g = dense(gradients, gradients_last), f = factors ? dense(factor, factors_last) : g;
  Totals totals(accumulator, last);
  launch_path_accumulate(total, gradient,
                         {totals.data(), g.const_data_ptr(), factors ? f.const_data_ptr() : nullptr,
                          dtype_of(factor, "pysal::path_integral_accumulate_"), last, gradients_last, factors_last,
                          row.const_data_ptr<int32_t>(), weight.const_data_ptr<double>(), accumulator.size(0), count,
                          channels_of(accumulator), pixels_of(accumulator)},
                         launch.stream());
  totals.finish();
}

void path_integral_moments_cuda(const Tensor& mean, const Tensor& squares, const Tensor& counts, const Tensor& samples,
                                const Tensor& rows) {
  const char* op = "path_integral_moments_";
  const DType total = dtype_of_totals(op, "mean", mean), sample = dtype_of(samples, "pysal::path_integral_moments_");
  check_alike(op, "squares", squares, mean);
  const Launch launch(mean);
  const int64_t count = rows.numel();
  check_rows_of(op, "samples", samples, mean, count);
  const Tensor row = values_on_device(op, "rows", rows, count, ScalarType::Int, mean);
  values_on_device(op, "counts", counts, mean.size(0), ScalarType::Long, mean);
  const bool last = is_channels_last(mean), samples_last = is_channels_last(samples);
  const Tensor values = dense(samples, samples_last);
  Totals means(mean, last), deviations(squares, last), counted(counts, false);
  launch_path_moments(
      total, sample,
      {means.data(), deviations.data(), static_cast<int64_t*>(counted.data()), values.const_data_ptr(), last,
       samples_last, row.const_data_ptr<int32_t>(), mean.size(0), count, channels_of(mean), pixels_of(mean)},
      launch.stream());
  means.finish();
  deviations.finish();
  counted.finish();
}

Tensor path_integral_product_cuda(const Tensor& inputs, const Tensor& baselines, const Tensor& accumulator) {
  const char* op = "path_integral_product";
  const DType total = dtype_of_totals(op, "accumulator", accumulator);
  const DType input = dtype_of(inputs, "pysal::path_integral_product");
  check_alike(op, "baselines", baselines, inputs);
  PYSAL_CHECK(same_device(inputs, accumulator) && inputs.sizes().equals(accumulator.sizes()), "pysal::", op,
              ": inputs must have the shape and device of accumulator");
  const Launch launch(accumulator);
  const Tensor x = dense(inputs), b = dense(baselines), totals = dense(accumulator);
  Tensor out = empty(accumulator, accumulator.sizes());
  launch_path_product(
      total, input,
      {x.const_data_ptr(), b.const_data_ptr(), totals.const_data_ptr(), out.mutable_data_ptr(), out.numel()},
      launch.stream());
  return out;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("path_integral_points", TORCH_BOX(&pysal::cuda::path_integral_points_cuda));
  m.impl("path_integral_accumulate_", TORCH_BOX(&pysal::cuda::path_integral_accumulate_cuda));
  m.impl("path_integral_moments_", TORCH_BOX(&pysal::cuda::path_integral_moments_cuda));
  m.impl("path_integral_product", TORCH_BOX(&pysal::cuda::path_integral_product_cuda));
}
