// The loops of Winograd's 3 x 3 convolutions, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
constexpr int64_t kWinogradTile = 4;    // rows and columns of the output that are made at once
constexpr int64_t kWinogradWindow = 6;  // of the input that they see
constexpr int64_t kWinogradProducts = kWinogradWindow * kWinogradWindow;

// Maps are channels_last, channels multiples of 16. Tile t is that of image t / (down across), and so on; tiles at the
// right and below may reach beyond the output.
struct WinogradConvolution {
  int64_t height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t top, left;     // zeros around the input
  int64_t down, across;  // tiles of an image
  const float* input;
  const float* weight;  // (products, panels of 16 output channels, channels, 16)
  const float* bias;    // (out_channels,) or null
  const float* added;   // like the output, or null; it may be the output itself
  float* output;
  float lower, upper;
  uint8_t* gates;       // written: where 0 < result < upper; or null
  const uint8_t* mask;  // read: of a map like the output or of its first images; or null
  int64_t mask_images;
  int rule;  // what the mask lets through: 0 plain, 1 guided, 2 deconvnet; -1 everything
};

struct WinogradKernels {
  int64_t (*scratch_floats)(const WinogradConvolution& convolution, int64_t tiles);
  // Tiles [first, first + tiles); scratch is aligned to 64 bytes.
  void (*run)(const WinogradConvolution& convolution, int64_t first, int64_t tiles, float* scratch);
};
extern const WinogradKernels winograd_baseline, winograd_avx2, winograd_avx512;
}  // namespace pysal::cpu
