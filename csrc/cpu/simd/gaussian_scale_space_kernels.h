// The float and double loops of gaussian_scale_space, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
constexpr int64_t kScaleSpaceRows = 16;  // of one block of work: neighbours, or 8 and their mirror images
// The longest side that is folded: up to it the matrices of a level, 1.5 MB, stay in the second-level cache.
constexpr int64_t kFoldedSide = 512;
constexpr int64_t kFoldedLine = kFoldedSide + 16;  // of scratch: no power of two, so that lines share no cache set
constexpr int64_t kScaleSpaceMargin = 32;          // zeros on both sides of the taps: the columns of the widest tile

// Symmetric kernels about their centre, 0 outside -radius..radius; radius <= size - 1 (constant) or size (reflect).
template <class T>
struct ScaleSpaceTaps {
  const T *level, *next, *slope;  // of L(sigma), of L(sigma + step), (next - level) / step
  int64_t radius;
};

// K of one side of an image, of the even and of the odd part of a line: [2][half][half], symmetric, half = (side +
// 1) / 2. What reaches further than radius is 0.
template <class T>
struct ScaleSpaceHalves {
  const T *level, *next, *slope;
  int64_t half, radius;
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

template <class T>
struct FoldedScaleSpacePlane {
  const T* source;          // [row parity][half of the rows][column parity][half of the columns], as fold leaves it
  T *levels, *derivatives;  // as above
  int64_t height, width;
  ScaleSpaceHalves<T> vertical, horizontal;
  T* scratch;  // 2 x kScaleSpaceRows x kFoldedLine
};

struct GaussianScaleSpaceKernels {
  // Writes the rows begin <= row < end of a plane; begin is a multiple of kScaleSpaceRows.
  void (*float_rows)(const ScaleSpacePlane<float>& plane, int64_t begin, int64_t end);
  void (*double_rows)(const ScaleSpacePlane<double>& plane, int64_t begin, int64_t end);
  // Writes rows of the upper half, the middle one included, and their mirror images.
  void (*folded_float_rows)(const FoldedScaleSpacePlane<float>& plane, int64_t begin, int64_t end);
  void (*folded_double_rows)(const FoldedScaleSpacePlane<double>& plane, int64_t begin, int64_t end);
};
extern const GaussianScaleSpaceKernels gaussian_scale_space_baseline, gaussian_scale_space_avx2,
    gaussian_scale_space_avx512;
}  // namespace pysal::cpu
