// Launchers of grad_cam. Device pointers to dense tensors; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct GradCamParams {
  const void *activations, *gradients;     // (batch, channels, height, width)
  bool activations_last, gradients_last;   // channels_last instead of contiguous
  int64_t batch, channels, height, width;  // of the layer
  void* weights;                           // workspace: (batch, channels) float, double for float64
  void* out;                               // (batch, 1, out_height, out_width) contiguous
  int64_t out_height, out_width;
  bool relu;
};
void launch_grad_cam(DType dtype, const GradCamParams& params, void* stream);
}  // namespace pysal::cuda
