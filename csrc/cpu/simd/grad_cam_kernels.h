// The float32 sums of grad_cam, one table per instruction set. All arrays are dense; sums are taken in double.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
struct GradCamKernels {
  double (*sum)(const float* values, int64_t count);
  double (*dot)(const double* weights, const float* values, int64_t count);
  void (*add_scaled)(double* sums, double weight, const float* values, int64_t count);
};
extern const GradCamKernels grad_cam_baseline, grad_cam_avx2, grad_cam_avx512;
}  // namespace pysal::cpu
