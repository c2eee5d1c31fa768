// The loops of an inverted residual block with smooth activations, one table per instruction set.
#pragma once
#include <stdint.h>

#include "activation_kernels.h"

namespace pysal::cpu {
// Maps are channels_last; those in between have pixels of `pitch` numbers: `channels`, and zeros up to a multiple
// of 16. A pass has what it needs; the members that say what lies where are of its own direction: the ring of rows has
// in_height x in_width pixels, and out_height x out_width are made of it. Matrices lie in panels, as
// inverted_residual's.
struct SmoothResidual {
  int64_t in_height, in_width, out_height, out_width;
  int64_t kernel_height, kernel_width, row_stride, column_stride, top, left;  // of the depthwise convolution
  int64_t images;                         // of the forward pass; row n of a gradient is one of image n % images
  int64_t channels, pitch;                // in between
  int64_t first_channels, last_channels;  // of the block's input and output
  Activation first, second;               // before and after the depthwise convolution
  float first_slope, second_slope;
  const float* input;   // of the block
  const float* expand;  // columns of `channels`; null where the block begins with the depthwise convolution
  const float* expand_bias;
  const float* depthwise;  // (kernel_height, kernel_width, pitch)
  const float* depthwise_bias;
  float* first_slopes;  // the first activation's derivative; null where there is none
  float* middle;        // what the depthwise convolution gives
  float* sums;          // (images, out_height, pitch): of the second activation over a row; or null
  const float* gate;    // (images, pitch), which the second activation is multiplied by; or null for 1
  const float* added;   // (rows, pitch), to the gradient of the second activation; or null
  const float* project;
  const float* project_bias;
  const float* grad;                // of the block's output
  const float* project_transposed;  // columns of `channels`
  float* passed;  // (rows, in_height, in_width, pitch): the product of both, which gate_sums writes down; else null
  const float* expand_transposed;  // columns of first_channels
  const float* onto;               // like the output, added to it; or null
  float* output;                   // of the block, or the gradient of its input
};

struct SmoothResidualKernels {
  int64_t (*scratch_floats)(const SmoothResidual& block, bool forward);
  // Up to the depthwise convolution: rows [begin, end) of one image. Scratch is aligned to 64 bytes.
  void (*enter)(const SmoothResidual& block, int64_t image, int64_t begin, int64_t end, float* scratch);
  // From there: `count` pixels of one image's output; scratch has room for their maps in between.
  void (*leave)(const SmoothResidual& block, int64_t image, int64_t first, int64_t count, float* scratch);
  // The sums over some pixels, (pitch,), of the second activation times `passed`: the gradient of the gate.
  void (*gate_sums)(const SmoothResidual& block, int64_t row, int64_t first, int64_t count, float* sums);
  // Rows [begin, end) of one gradient of the block's input.
  void (*backward)(const SmoothResidual& block, int64_t row, int64_t begin, int64_t end, float* scratch);
};
extern const SmoothResidualKernels smooth_residual_baseline, smooth_residual_avx2, smooth_residual_avx512;
}  // namespace pysal::cpu
