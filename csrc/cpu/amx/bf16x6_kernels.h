// The float32 convolution that csrc/cpu/bf16x6.cpp describes, on the matrix unit of x86.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// All maps are channels_last: input (images, height, width, channels), output and shortcut (images, out_height,
// out_width, out_channels).
struct Bf16x6Convolution {
  int64_t height, width, channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, row_stride, column_stride, top, left, row_dilation, column_dilation;
  const float* input;
  const uint16_t* weight;  // as bf16x6_weight arranges it
  const float* bias;       // (out_channels,) or null
  const float* shortcut;   // or null
  float* output;
  float lower, upper;  // what the sums are clamped to
};

// Output pixels [first, last), counted through all images, at most kBf16x6Pixels; scratch is aligned to 64 bytes.
constexpr int64_t kBf16x6Pixels = 256;
int64_t bf16x6_scratch_bytes(const Bf16x6Convolution& convolution);
void bf16x6_pixels(const Bf16x6Convolution& convolution, int64_t first, int64_t last, void* scratch);
// Asks the operating system for the matrix unit, once per process; false where there is none.
bool bf16x6_available();
}  // namespace pysal::cpu
