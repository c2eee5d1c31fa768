// Launchers of path_integral. Device pointers to dense tensors of images, contiguous unless *_last says channels_last;
// a rank other than 4 counts as one channel. Totals are float or double. stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct PathPointsParams {
  const void *inputs, *baselines;  // (batch, channels, pixels)
  bool source_last;
  const int32_t* rows;   // (count,)
  const double* alphas;  // (count,)
  void* out;             // (count, channels, pixels)
  bool out_last;
  int64_t batch, count, channels, pixels;
};
void launch_path_points(DType source, DType target, const PathPointsParams& params, void* stream);

struct PathAccumulateParams {
  void* totals;           // (batch, channels, pixels)
  const void* gradients;  // (count, channels, pixels)
  const void* factors;    // the same or null
  DType factors_dtype;
  bool totals_last, gradients_last, factors_last;
  const int32_t* rows;    // (count,)
  const double* weights;  // (count,)
  int64_t batch, count, channels, pixels;
};
void launch_path_accumulate(DType totals, DType gradients, const PathAccumulateParams& params, void* stream);

struct PathMomentsParams {
  void *mean, *squares;  // (batch, channels, pixels)
  int64_t* counts;       // (batch,)
  const void* samples;   // (count, channels, pixels)
  bool totals_last, samples_last;
  const int32_t* rows;  // (count,)
  int64_t batch, count, channels, pixels;
};
void launch_path_moments(DType totals, DType samples, const PathMomentsParams& params, void* stream);

struct PathProductParams {
  const void *inputs, *baselines, *totals;
  void* out;
  int64_t count;  // elements
};
void launch_path_product(DType totals, DType inputs, const PathProductParams& params, void* stream);
}  // namespace pysal::cuda
