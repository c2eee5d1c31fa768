// The loops of guided_relu, one table per instruction set. All arrays are dense; gates starts at a whole byte.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// What a 16-bit float must know of `upper` to be compared by its bits, which order non-negative numbers as they do
// integers.
struct HalfUpper {
  int16_t below;     // the largest number <= upper
  int16_t above;     // the smallest number whose gate is closed: >= upper, or above infinity where that is upper
  int16_t rounded;   // upper, rounded
  int16_t infinity;  // larger ones are NaN
};

struct GuidedReluKernels {
  void (*forward_float)(const float* input, float upper, float* output, uint8_t* gates, int64_t count);
  void (*forward_double)(const double* input, double upper, double* output, uint8_t* gates, int64_t count);
  void (*forward_half)(const int16_t* input, HalfUpper upper, int16_t* output, uint8_t* gates, int64_t count);
  void (*gates_float)(const float* input, float upper, uint8_t* gates, int64_t count);
  void (*gates_double)(const double* input, double upper, uint8_t* gates, int64_t count);
  void (*gates_half)(const int16_t* input, HalfUpper upper, uint8_t* gates, int64_t count);
  // grad_input may be grad_output
  void (*backward_float)(const float* grad_output, const uint8_t* gates, int rule, float* grad_input, int64_t count);
  void (*backward_double)(const double* grad_output, const uint8_t* gates, int rule, double* grad_input, int64_t count);
  void (*backward_half)(const int16_t* grad_output, const uint8_t* gates, int rule, int16_t infinity,
                        int16_t* grad_input, int64_t count);
};
extern const GuidedReluKernels guided_relu_baseline, guided_relu_avx2, guided_relu_avx512;
}  // namespace pysal::cpu
