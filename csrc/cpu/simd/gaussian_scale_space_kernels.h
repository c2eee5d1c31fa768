// The float and double loops of gaussian_scale_space, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
constexpr int64_t kScaleSpaceRows = 8;     // rows of one block of work
constexpr int64_t kScaleSpaceMargin = 48;  // zeros on both sides of the taps: the columns of the widest tile

// Symmetric kernels about their centre, 0 outside -radius..radius; radius <= size - 1 (constant) or size (reflect).
template <class T>
struct ScaleSpaceTaps {
  const T *level, *next, *slope;  // of L(sigma), of L(sigma + step), (next - level) / step
  int64_t radius;
};

template <class T>
struct ScaleSpacePlane {
  const T* source;          // height x width, dense
  T *levels, *derivatives;  // height x width, dense; derivatives is null where only L is wanted
  int64_t height, width;
  bool reflect;
  ScaleSpaceTaps<T> vertical, horizontal;
  T* scratch;  // 2 x kScaleSpaceRows x width
};

struct GaussianScaleSpaceKernels {
  // Writes the rows begin <= row < end of a plane; begin is a multiple of kScaleSpaceRows.
  void (*float_rows)(const ScaleSpacePlane<float>& plane, int64_t begin, int64_t end);
  void (*double_rows)(const ScaleSpacePlane<double>& plane, int64_t begin, int64_t end);
};
extern const GaussianScaleSpaceKernels gaussian_scale_space_baseline, gaussian_scale_space_avx2,
    gaussian_scale_space_avx512;
}  // namespace pysal::cpu
