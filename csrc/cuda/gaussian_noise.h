// Launchers of gaussian_noise and gaussian_noise_bits. Device pointers; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
struct GaussianNoiseParams {
  const void* images;  // (batch, C, H, W), dense in channels_last order where images_last, else contiguous
  void* output;        // (count, C, H, W), the same of output_last
  DType images_dtype, output_dtype;
  bool images_last, output_last;
  const double* scales;          // (batch,)
  const int32_t* rows;           // (count,); a row outside [0, batch) gives NaN
  const int64_t *ids, *samples;  // (count,)
  int64_t seed, batch, count;
  int64_t channels, pixels;  // channels * pixels < 2^34
};
void launch_gaussian_noise(const GaussianNoiseParams& params, void* stream);

struct GaussianNoiseBitsParams {
  const int64_t *ids, *samples;   // (count,)
  int64_t* output;                // (count, elements)
  int64_t seed, count, elements;  // elements < 2^34
};
void launch_gaussian_noise_bits(const GaussianNoiseBitsParams& params, void* stream);
}  // namespace pysal::cuda
