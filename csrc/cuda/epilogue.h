// Launchers of epilogue_. Device pointers to dense arrays; stream is a cudaStream_t.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pysal::cuda {
// As pysal/reference/epilogue.py counts them.
enum class Activation { identity, relu, silu, hardswish, gelu, gelu_tanh, sigmoid, hardsigmoid, leaky_relu };
constexpr int kActivations = 9;

struct EpilogueParams {
  void* x;               // becomes the result
  const void* bias;      // per channel, in the arithmetic type of the dtype; or null
  const void* shortcut;  // like x, or null
  uint8_t* gates;        // (count + 7) / 8 of relu and leaky_relu, or null
  void* sums;            // like x: what the other activations are of, or null
  int64_t count, channels, pixels;
  bool channels_last;  // whether x lies in that order
  Activation activation;
  double parameter;  // where relu saturates, the slope of leaky_relu
};
void launch_epilogue(DType dtype, const EpilogueParams& params, void* stream);

struct EpilogueBackwardParams {
  void* grad;            // `times` after each other, of `count` elements each; becomes the result
  const void* added;     // like grad, or null
  const uint8_t* gates;  // (count + 7) / 8 of relu and leaky_relu, which all gradients share
  const void* sums;      // count, of the other activations but identity
  int64_t count, times;
  Activation activation;
  double parameter;
  int rule;  // of relu: 0 plain, 1 guided, 2 deconvnet
};
void launch_epilogue_backward(DType dtype, const EpilogueBackwardParams& params, void* stream);
}  // namespace pysal::cuda
