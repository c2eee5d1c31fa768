// The float32 convolution that bf16x6.cpp describes, on the matrix unit of x86.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// What a gradient goes through last, as guided_relu's backward does: g where the gate is open, also where g > 0, or
// where g > 0 alone.
enum class Bf16x6Rule : int64_t { none = -1, plain = 0, guided = 1, deconvnet = 2 };

// The largest kernel, stride, dilation and padding: larger ones are nobody's, and what a task computes in grows with
// them.
constexpr int64_t kMostBf16x6Step = 512;

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
  // Bit i % 8 of byte i / 8 is element i; out_channels must be a multiple of 16 where there are any.
  uint8_t* gates;       // where 0 < output < upper, or null
  const uint8_t* mask;  // of as many pixels, which follow each other as often as there are more images
  int64_t mask_pixels;
  Bf16x6Rule rule;
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
