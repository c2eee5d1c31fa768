// float32 depthwise convolution of one line of channels_last pixels, read through pointers and clamped: blocks of
// kPixels outputs by kVectors vectors of channels stay in registers, so that a weight is loaded once for kPixels of
// them.
#include "box_regions_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
// Sums of outputs j to j + kPixels for channels c to c + kVectors * kLanes.
template <int kPixels, int kVectors>
PYSAL_INLINE void block(const float* const* taps, int64_t across, const DepthwiseLine& line,
                        const float* __restrict weight, const float* __restrict bias, float* __restrict target,
                        int64_t j, int64_t c) {
  vfloat sums[kPixels][kVectors];
  for (int i = 0; i < kPixels; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = load(bias + c + v * kLanes);
  for (int64_t p = 0; p < line.kernel_height; ++p)
    for (int64_t q = 0; q < line.kernel_width; ++q) {
      const float* const* tap = taps + p * across + j * line.step + q * line.dilation;
      const float* const w = weight + (p * line.kernel_width + q) * line.channels + c;
      vfloat weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = load(w + v * kLanes);
      for (int i = 0; i < kPixels; ++i) {
        const float* const pixel = tap[i * line.step] + c;
        for (int v = 0; v < kVectors; ++v) sums[i][v] += weights[v] * load(pixel + v * kLanes);
      }
    }
  const vfloat lower = broadcast(static_cast<float>(line.lower)), upper = broadcast(static_cast<float>(line.upper));
  for (int i = 0; i < kPixels; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const vfloat floored = sums[i][v] < lower ? lower : sums[i][v];  // NaN comes through
      store(target + (j + i) * line.channels + c + v * kLanes, floored > upper ? upper : floored);
    }
}

template <int kVectors>
PYSAL_INLINE void channels_block(const float* const* taps, int64_t across, const DepthwiseLine& line,
                                 const float* weight, const float* bias, float* target, int64_t c) {
  int64_t j = 0;
  for (; j + 4 <= line.width; j += 4) block<4, kVectors>(taps, across, line, weight, bias, target, j, c);
  for (; j + 2 <= line.width; j += 2) block<2, kVectors>(taps, across, line, weight, bias, target, j, c);
  for (; j < line.width; ++j) block<1, kVectors>(taps, across, line, weight, bias, target, j, c);
}

void depthwise(const float* const* taps, int64_t across, const DepthwiseLine& line, const float* weight,
               const float* bias, float* target) {
  const int64_t channels = line.channels;
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) channels_block<4>(taps, across, line, weight, bias, target, c);
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) channels_block<2>(taps, across, line, weight, bias, target, c);
  for (; c + kLanes <= channels; c += kLanes) channels_block<1>(taps, across, line, weight, bias, target, c);
  const float lower = static_cast<float>(line.lower), upper = static_cast<float>(line.upper);
  for (; c < channels; ++c)
    for (int64_t j = 0; j < line.width; ++j) {
      float sum = bias[c];
      for (int64_t p = 0; p < line.kernel_height; ++p)
        for (int64_t q = 0; q < line.kernel_width; ++q)
          sum += weight[(p * line.kernel_width + q) * channels + c] *
                 taps[p * across + j * line.step + q * line.dilation][c];
      sum = sum < lower ? lower : sum;
      target[j * channels + c] = sum > upper ? upper : sum;
    }
}
}  // namespace

PYSAL_TABLE(BoxRegionsKernels, box_regions) = {depthwise};
}  // namespace pysal::cpu
