// The loops of an inverted residual block and of its input gradient, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// Maps are channels_last. Both directions are: multiply each pixel by a matrix (`enter`), combine neighbours of each of
// the `channels` in between (`depthwise`), multiply again (`leave`); after the first two stands a gate of one bit an
// element. Forward: expand, depthwise convolution, project; the gates are the ReLUs', which are written. Backward:
// project transposed, the transposed depthwise convolution, expand transposed; the gates are read.
struct InvertedResidual {
  int64_t in_channels, in_height, in_width;
  int64_t channels;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, row_stride, column_stride, top, left;  // of the depthwise convolution
  int64_t images;  // that have gates; row n of a gradient has those of image n % images
  bool expands;    // without, the block begins with the depthwise convolution, and its gradient ends with it
  // Matrices (depth, columns) lie in panels of 16 columns, (panels, depth, 16); where the columns are no multiple of 16
  // the last panel holds the last 16, some of which the panel before it has, too.
  const float* input;
  const float* enter;
  const float* enter_bias;  // biases are forward's
  float enter_upper;
  uint8_t* enter_gates;    // of in_height x in_width x channels
  const float* depthwise;  // (kernel_height, kernel_width, channels)
  const float* depthwise_bias;
  float depthwise_upper;
  uint8_t* depthwise_gates;  // of out_height x out_width x channels
  const float* leave;
  const float* leave_bias;
  const float* added;  // like the output, added to it; may be null
  float* output;
  int rule;  // backward's: 0 plain, 1 guided, 2 deconvnet
};
constexpr int64_t kMostTaps = 128;  // of a depthwise kernel

struct InvertedResidualKernels {
  int64_t (*scratch_floats)(const InvertedResidual& block, bool forward);
  // Rows [begin, end) of one image's output; scratch is aligned to 64 bytes.
  void (*forward)(const InvertedResidual& block, int64_t image, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const InvertedResidual& block, int64_t image, int64_t begin, int64_t end, float* scratch);
};
extern const InvertedResidualKernels inverted_residual_baseline, inverted_residual_avx2, inverted_residual_avx512;
}  // namespace pysal::cpu
