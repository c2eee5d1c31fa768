// Launchers of box_regions. Device pointers to dense arrays, images channels_last; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
// `count` images that are the map but for a box each.
struct BoxImages {
  const void* map;         // (height, width, channels)
  const void* boxes;       // (count, box_height, box_width, channels)
  const int32_t* origins;  // (count, 2)
  int64_t count, channels, height, width, box_height, box_width;
};

struct BoxRegionsParams {
  BoxImages images;
  const int32_t* corners;  // (count, 2)
  void* out;               // (count, height, width, channels)
  int64_t height, width, row_step, column_step;
  double outside;
};
void launch_box_regions(DType dtype, const BoxRegionsParams& params, void* stream);

struct BoxRegionsDepthwiseParams {
  BoxImages images;
  const int32_t* corners;  // (count, 2)
  const void* weight;      // (kernel_height, kernel_width, channels)
  const void* bias;        // (channels,)
  void* out;               // (count, height, width, channels)
  int64_t height, width, kernel_height, kernel_width, row_step, column_step, row_dilation, column_dilation;
  double lower, upper;
};
void launch_box_regions_depthwise(DType dtype, const BoxRegionsDepthwiseParams& params, void* stream);

struct BoxRegionsSumsParams {
  BoxImages images;
  double* out;  // (count, channels)
};
void launch_box_regions_sums(DType dtype, const BoxRegionsSumsParams& params, void* stream);
}  // namespace pysal::cuda
