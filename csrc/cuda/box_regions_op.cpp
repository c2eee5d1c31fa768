// Torch glue of the CUDA kernels of box_regions; box_regions.cu says what they compute.
#include "box_regions.h"

#include "../common/checked.h"
#include "arguments.h"

namespace pysal::cuda {
namespace {
// The tensors of BoxImages, kept alive while its pointers are used.
struct Checked {
  Tensor map, boxes, origins;
  BoxImages images() const {
    return {map.const_data_ptr(),
            boxes.const_data_ptr(),
            origins.const_data_ptr<int32_t>(),
            boxes.size(0),
            map.size(1),
            map.size(2),
            map.size(3),
            boxes.size(2),
            boxes.size(3)};
  }
};

Checked check(const char* op, const Tensor& map, const Tensor& boxes, const Tensor& origins) {
  PYSAL_CHECK(map.dim() == 4 && map.size(0) == 1, "pysal::", op, ": map must be (1, C, H, W)");
  PYSAL_CHECK(boxes.dim() == 4 && boxes.size(1) == map.size(1) && same_device(boxes, map) &&
                  boxes.scalar_type() == map.scalar_type(),
              "pysal::", op, ": boxes must be (N, C, h, w) with the channels, dtype and device of map");
  return {dense(map, true), dense(boxes, true),
          values_on_device(op, "origins", origins, 2 * boxes.size(0), ScalarType::Int, map)};
}

Tensor box_regions_cuda(const Tensor& map, const Tensor& boxes, const Tensor& origins, const Tensor& corners,
                        int64_t height, int64_t width, int64_t row_step, int64_t column_step, double outside) {
  const DType dtype = dtype_of(map, "pysal::box_regions");
  const Launch launch(map);
  const Checked checked = check("box_regions", map, boxes, origins);
  const int64_t count = boxes.size(0);
  const Tensor corner = values_on_device("box_regions", "corners", corners, 2 * count, ScalarType::Int, map);
  PYSAL_CHECK(height >= 0 && width >= 0 && row_step >= 1 && column_step >= 1,
              "pysal::box_regions: sizes must be at least 0 and steps at least 1");
  reach("pysal::box_regions", "rows", {{height, row_step}});
  reach("pysal::box_regions", "columns", {{width, column_step}});
  Tensor out = empty(map, {count, map.size(1), height, width}, std::nullopt, true);
  launch_box_regions(dtype,
                     {checked.images(), corner.const_data_ptr<int32_t>(), out.mutable_data_ptr(), height, width,
                      row_step, column_step, outside},
                     launch.stream());
  return out;
}

Tensor box_regions_depthwise_cuda(const Tensor& map, const Tensor& boxes, const Tensor& origins, const Tensor& corners,
                                  int64_t height, int64_t width, const Tensor& weight, const Tensor& bias,
                                  int64_t row_step, int64_t column_step, int64_t row_dilation, int64_t column_dilation,
                                  double lower, double upper) {
  const char* op = "box_regions_depthwise";
  const DType dtype = dtype_of(map, "pysal::box_regions_depthwise");
  const Launch launch(map);
  const Checked checked = check(op, map, boxes, origins);
  const int64_t count = boxes.size(0), channels = map.size(1);
  const Tensor corner = values_on_device(op, "corners", corners, 2 * count, ScalarType::Int, map);
  PYSAL_CHECK(
      height >= 0 && width >= 0 && row_step >= 1 && column_step >= 1 && row_dilation >= 1 && column_dilation >= 1,
      "pysal::", op, ": sizes must be at least 0, steps and dilations at least 1");
  PYSAL_CHECK(weight.dim() == 3 && weight.size(2) == channels && weight.numel() > 0 && bias.dim() == 1, "pysal::", op,
              ": weight must be (kh, kw, C) and bias (C,)");
  reach("pysal::box_regions_depthwise", "rows", {{height, row_step}, {weight.size(0), row_dilation}});
  reach("pysal::box_regions_depthwise", "columns", {{width, column_step}, {weight.size(1), column_dilation}});
  const Tensor weights = values_on_device(op, "weight", weight, weight.numel(), map.scalar_type(), map);
  const Tensor biases = values_on_device(op, "bias", bias, channels, map.scalar_type(), map);
  Tensor out = empty(map, {count, channels, height, width}, std::nullopt, true);
  launch_box_regions_depthwise(dtype,
                               {checked.images(), corner.const_data_ptr<int32_t>(), weights.const_data_ptr(),
                                biases.const_data_ptr(), out.mutable_data_ptr(), height, width, weight.size(0),
                                weight.size(1), row_step, column_step, row_dilation, column_dilation, lower, upper},
                               launch.stream());
  return out;
}

Tensor box_regions_sums_cuda(const Tensor& map, const Tensor& boxes, const Tensor& origins) {
  const DType dtype = dtype_of(map, "pysal::box_regions_sums");
  const Launch launch(map);
  const Checked checked = check("box_regions_sums", map, boxes, origins);
  Tensor out = empty(map, {boxes.size(0), map.size(1)}, ScalarType::Double);
  launch_box_regions_sums(dtype, {checked.images(), out.mutable_data_ptr<double>()}, launch.stream());
  return out;
}
}  // namespace
}  // namespace pysal::cuda

PYSAL_CUDA_LIBRARY_IMPL(m) {
  m.impl("box_regions", TORCH_BOX(&pysal::cuda::box_regions_cuda));
  m.impl("box_regions_depthwise", TORCH_BOX(&pysal::cuda::box_regions_depthwise_cuda));
  m.impl("box_regions_sums", TORCH_BOX(&pysal::cuda::box_regions_sums_cuda));
}
