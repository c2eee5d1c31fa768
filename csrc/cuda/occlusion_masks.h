// Launchers of occlusion_masks. Device pointers to dense tensors, contiguous unless *_last says channels_last; stream
// is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct OcclusionParams {
  const void *images, *fills;  // (batch, channels, height, width)
  bool source_last;
  const double *mean, *std;  // (channels,) each, or both null: (x - mean) / std is written
  const int32_t* rows;       // (count,)
  const int32_t* labels;     // (batch, height, width), read where boxes is null
  const int32_t* ids;        // (count,)
  const int32_t* boxes;      // (count, 4) or null
  void* out;                 // (count, channels, height, width)
  bool out_last;
  int64_t batch, count, channels, height, width;
};
void launch_occlusion(DType source, DType target, const OcclusionParams& params, void* stream);

struct OcclusionMapParams {
  const void* scores;     // (batch, classes, segments)
  const int32_t* labels;  // (batch, pixels)
  void* out;              // (batch, classes, pixels)
  int64_t batch, classes, segments, pixels;
};
void launch_occlusion_map(DType dtype, const OcclusionMapParams& params, void* stream);

struct OcclusionBoxesMapParams {
  const void* scores;    // (planes, segments)
  const int32_t* boxes;  // (segments, 4)
  void* out;             // (planes, height, width)
  int64_t planes, segments, height, width;
};
void launch_occlusion_boxes_map(DType dtype, const OcclusionBoxesMapParams& params, void* stream);
}  // namespace pysal::cuda
