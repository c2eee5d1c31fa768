// The loops of gaussian_noise, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// What Philox is keyed and counted by, but for the first counter word, which is the quad: elements 4 quad .. 4 quad
// + 3.
constexpr int64_t kNoiseQuads = 16;  // lanes of the widest vector

struct NoiseStream {
  uint32_t key_low, key_high, sample, id_low, id_high;
};

struct GaussianNoiseKernels {
  // Both write 4 * quads values, those of the quads first, first + 1, ...; quads is a multiple of 16 (kNoiseQuads).
  void (*words)(const NoiseStream& stream, uint32_t first, int64_t quads, uint32_t* out);
  void (*normals)(const NoiseStream& stream, uint32_t first, int64_t quads, float* out);
};
extern const GaussianNoiseKernels gaussian_noise_baseline, gaussian_noise_avx2, gaussian_noise_avx512;
}  // namespace pysal::cpu
