// Launchers of guided_relu. Device pointers to dense arrays of `count` elements; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct GuidedReluParams {
  const void* input;
  void* output;    // null: the gates alone are wanted
  uint8_t* gates;  // (count + 7) / 8
  int64_t count;
  double upper;
};
void launch_guided_relu(DType dtype, const GuidedReluParams& params, void* stream);

struct GuidedReluBackwardParams {
  const void* grad_output;
  const uint8_t* gates;  // (count + 7) / 8
  void* grad_input;      // may be grad_output
  int64_t count;
  int rule;  // 0 plain, 1 guided, 2 deconvnet
};
void launch_guided_relu_backward(DType dtype, const GuidedReluBackwardParams& params, void* stream);
}  // namespace pysal::cuda
