// The loops of smooth activations and of the gates of squeeze-and-excitation, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
enum class Activation : int { identity, silu, hardswish, gelu, gelu_tanh, sigmoid, hardsigmoid, leaky_relu };
constexpr int kActivations = 8;

// Pixels of `channels` numbers each, one after the other. What has no gate is one pixel of many channels.
struct Activated {
  Activation activation;
  float slope;         // of leaky_relu below zero
  const float* input;  // (pixels, channels)
  int64_t pixels, channels;
  const float* gate;   // (channels,), or null for 1
  const float* added;  // (channels,), to the gradient of the activation's output; or null
};

struct ActivationKernels {
  // activation(input) gate
  void (*forward)(const Activated& a, float* output);
  // grad becomes (grad gate + added) activation'(input)
  void (*backward)(const Activated& a, float* grad);
  // sums over pixels of activation(input), times grad where that is not null; `partial` has room for `channels` numbers
  void (*sums)(const Activated& a, const float* grad, float* partial, float* sums);
};
extern const ActivationKernels activation_baseline, activation_avx2, activation_avx512;
}  // namespace pysal::cpu
