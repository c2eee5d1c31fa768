// Launcher of gaussian_scale_space and its derivative. Device pointers but for sigmas; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct GaussianScaleSpaceParams {
  const void* images;  // (count, channels, height, width) contiguous, or (1, channels, height, width) where repeated
  void *levels, *derivatives;  // (count, channels, height, width) contiguous; derivatives null where only L is wanted
  const double* sigmas;        // (count,), in host memory; the launch keeps no reference to it
  double step;
  int64_t count, channels, height, width;  // sides below 2^29
  bool repeated, reflect;
  // memory to work in, in the arithmetic type: float, double for float64
  void* columns;     // (2 where derivatives are wanted, else 1) * count * channels * height * width
  void* taps;        // (3 where derivatives are wanted, else 1) * count * (height + width + 2)
  int32_t* reaches;  // count * 2
};
void launch_gaussian_scale_space(DType dtype, const GaussianScaleSpaceParams& params, void* stream);
}  // namespace pysal::cuda
