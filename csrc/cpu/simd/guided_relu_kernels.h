// The float32 loops of guided_relu, one table per instruction set. All arrays are dense; gates starts at a whole byte.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
struct GuidedReluKernels {
  void (*forward)(const float* input, float upper, float* output, uint8_t* gates, int64_t count);
  void (*backward)(const float* grad_output, const uint8_t* gates, int rule, float* grad_input, int64_t count);
};
extern const GuidedReluKernels guided_relu_baseline, guided_relu_avx2, guided_relu_avx512;
}  // namespace pysal::cpu
