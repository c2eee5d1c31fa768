// The float32 convolution that bf16x6.cpp describes, on the matrix unit of x86.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// All maps are channels_last: input (images, height, width, channels), output and shortcut (images, out_height,
// out_width, out_channels).
struct Bf16x6Convolution {
  int64_t images, height, width, channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, row_stride, column_stride, top, left, row_dilation, column_dilation;
  const float* input;
  const uint16_t* weight;  // as bf16x6_weight arranges it
  const float* bias;       // (out_channels,) or null
  const float* shortcut;   // or null
  float* output;
  float lower, upper;  // what the sums are clamped to
};

// What is computed at once: some rows of some images.
struct Bf16x6Task {
  int64_t first_image, images, first_row, rows;
};

// Returns the task that most others are like: so many rows of so many images.
Bf16x6Task bf16x6_task(const Bf16x6Convolution& convolution, int64_t threads);
// Scratch is aligned to 64 bytes.
int64_t bf16x6_scratch_bytes(const Bf16x6Convolution& convolution, const Bf16x6Task& task);
void bf16x6_run(const Bf16x6Convolution& convolution, const Bf16x6Task& task, void* scratch);
// Asks the operating system for the matrix unit, once per process; false where there is none.
bool bf16x6_available();
}  // namespace pysal::cpu
