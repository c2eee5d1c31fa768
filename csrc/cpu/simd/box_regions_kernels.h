// The float32 loop of box_regions_depthwise, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// One line of outputs and how it lies in its input.
struct DepthwiseLine {
  int64_t width, channels, kernel_height, kernel_width, step, dilation;
  double lower, upper;  // what the sums are clamped to
};

struct BoxRegionsKernels {
  // taps (kernel_height, across): where the channels of each input pixel lie; weight (kernel_height, kernel_width,
  // channels), bias (channels,), target (width, channels).
  void (*depthwise)(const float* const* taps, int64_t across, const DepthwiseLine& line, const float* weight,
                    const float* bias, float* target);
};
extern const BoxRegionsKernels box_regions_baseline, box_regions_avx2, box_regions_avx512;
}  // namespace pysal::cpu
