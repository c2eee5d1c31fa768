// Torch glue of the CUDA kernels of occlusion_masks; occlusion_masks.cu says what they compute.
#include "occlusion_masks.h"

#include "arguments.h"

namespace pysal::cuda {
namespace {
// labels and ids, or boxes
Tensor occluded(const char* op, const Tensor& images, const Tensor& fills, const Tensor& rows, const Tensor* labels,
                const Tensor* ids, const Tensor* boxes, ScalarType dtype, bool channels_last,
                const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  PYSAL_CHECK(images.dim() == 4, "pysal::", op, ": images must have 4 dimensions, got ", images.dim());
  check_alike(op, "fills", fills, images);
  const DType source = dtype_of(images, "pysal::occlusion_masks"), target = asked_dtype(op, dtype);
  const Launch launch(images);
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t count = rows.numel();
  const Tensor row = values_on_device(op, "rows", rows, count, ScalarType::Int, images);
  const Tensor map = labels == nullptr
                         ? row
                         : values_on_device(op, "labels", *labels, batch * height * width, ScalarType::Int, images);
  const Tensor id = ids == nullptr ? row : values_on_device(op, "ids", *ids, count, ScalarType::Int, images);
  const Tensor box = boxes == nullptr ? row : values_on_device(op, "boxes", *boxes, 4 * count, ScalarType::Int, images);
  PYSAL_CHECK(mean.has_value() == std.has_value(), "pysal::", op, ": mean and std must be given together");
  const Tensor means = mean ? values_on_device(op, "mean", *mean, channels, ScalarType::Double, images) : row;
  const Tensor stds = std ? values_on_device(op, "std", *std, channels, ScalarType::Double, images) : row;
  const bool last = is_channels_last(images);
  const Tensor dense_images = dense(images, last), dense_fills = dense(fills, last);
  Tensor out = empty(images, {count, channels, height, width}, dtype, channels_last);
  const int32_t* const none = nullptr;
  launch_occlusion(
      source, target,
      {dense_images.const_data_ptr(), dense_fills.const_data_ptr(), last,
       mean ? means.const_data_ptr<double>() : nullptr, std ? stds.const_data_ptr<double>() : nullptr,
       row.const_data_ptr<int32_t>(), labels == nullptr ? none : map.const_data_ptr<int32_t>(),
       ids == nullptr ? none : id.const_data_ptr<int32_t>(), boxes == nullptr ? none : box.const_data_ptr<int32_t>(),
       out.mutable_data_ptr(), channels_last, batch, count, channels, height, width},
      launch.stream());
  return out;
}

Tensor occlusion_masks_cuda(const Tensor& images, const Tensor& fills, const Tensor& labels, const Tensor& rows,
                            const Tensor& ids, ScalarType dtype, bool channels_last, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& std) {
  return occluded("occlusion_masks", images, fills, rows, &labels, &ids, nullptr, dtype, channels_last, mean, std);
}

Tensor occlusion_masks_boxes_cuda(const Tensor& images, const Tensor& fills, const Tensor& boxes, const Tensor& rows,
                                  ScalarType dtype, bool channels_last, const std::optional<Tensor>& mean,
                                  const std::optional<Tensor>& std) {
  return occluded("occlusion_masks_boxes", images, fills, rows, nullptr, nullptr, &boxes, dtype, channels_last, mean,
                  std);
}

Tensor occlusion_masks_map_cuda(const Tensor& scores, const Tensor& labels) {
  const char* op = "occlusion_masks_map";
  PYSAL_CHECK(scores.dim() == 3, "pysal::occlusion_masks_map: scores must have 3 dimensions, got ", scores.dim());
  PYSAL_CHECK(labels.dim() == 3 && labels.size(0) == scores.size(0),
              "pysal::occlusion_masks_map: labels must have 3 dimensions and the batch of scores, got ", labels.dim(),
              " dimensions");
  const DType dtype = dtype_of(scores, "pysal::occlusion_masks_map");
  const Launch launch(scores);
  const int64_t pixels = labels.size(1) * labels.size(2);
  const Tensor map = values_on_device(op, "labels", labels, labels.size(0) * pixels, ScalarType::Int, scores);
  const Tensor values = dense(scores);
  Tensor out = empty(scores, {scores.size(0), scores.size(1), labels.size(1), labels.size(2)});
  launch_occlusion_map(dtype,
                       {values.const_data_ptr(), map.const_data_ptr<int32_t>(), out.mutable_data_ptr(), scores.size(0),
                        scores.size(1), scores.size(2), pixels},
                       launch.stream());
  return out;
}

Tensor occlusion_masks_boxes_map_cuda(const Tensor& scores, const Tensor& boxes, int64_t height, int64_t width) {
  const char* op = "occlusion_masks_boxes_map";
  PYSAL_CHECK(scores.dim() == 3, "pysal::occlusion_masks_boxes_map: scores must have 3 dimensions, got ", scores.dim());
  PYSAL_CHECK(height >= 0 && width >= 0, "pysal::occlusion_masks_boxes_map: height and width must be at least 0, got ",
              height, " and ", width);
  const DType dtype = dtype_of(scores, "pysal::occlusion_masks_boxes_map");
  const Launch launch(scores);
  const Tensor box = values_on_device(op, "boxes", boxes, 4 * scores.size(2), ScalarType::Int, scores);
  const Tensor values = dense(scores);
  Tensor out = empty(scores, {scores.size(0), scores.size(1), height, width});
  launch_occlusion_boxes_map(dtype,
                             {values.const_data_ptr(), box.const_data_ptr<int32_t>(), out.mutable_data_ptr(),
                              scores.size(0) * scores.size(1), scores.size(2), height, width},
                             launch.stream());
  return out;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("occlusion_masks", TORCH_BOX(&pysal::cuda::occlusion_masks_cuda));
  m.impl("occlusion_masks_boxes", TORCH_BOX(&pysal::cuda::occlusion_masks_boxes_cuda));
  m.impl("occlusion_masks_map", TORCH_BOX(&pysal::cuda::occlusion_masks_map_cuda));
  m.impl("occlusion_masks_boxes_map", TORCH_BOX(&pysal::cuda::occlusion_masks_boxes_map_cuda));
}
