// float32 loops of guided_relu: output = min(max(x, 0), upper), gates one bit per element, and the backward rules.
// Work split: the caller gives each thread whole bytes of gates; a step takes one vector, or two where a vector has
// fewer lanes than a byte has bits. Per element: forward reads 4 and writes 4 + 1/8 bytes, backward the reverse.
#include "guided_relu_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kStep = kLanes < 8 ? 8 : kLanes;  // elements whose bits fill whole bytes
constexpr int kVectors = static_cast<int>(kStep / kLanes);
constexpr int64_t kBytes = kStep / 8;

void forward(const float* __restrict input, float upper, float* __restrict output, uint8_t* __restrict gates,
             int64_t count) {
  const vfloat zero = {}, top = broadcast(upper);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    unsigned bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      const vfloat x = load(input + i + v * kLanes);
      // written so that a NaN, for which every comparison is false, comes through
      const vfloat floored = x < zero ? zero : x;
      store(output + i + v * kLanes, floored > top ? top : floored);
      bits |= bits_of((x > zero) & (x < top)) << (v * kLanes);
    }
    for (int64_t b = 0; b < kBytes; ++b) gates[i / 8 + b] = static_cast<uint8_t>(bits >> (8 * b));
  }
  for (int64_t first = i; first < count; first += 8) {
    unsigned bits = 0;
    for (int64_t k = first; k < count && k < first + 8; ++k) {
      const float x = input[k];
      const float floored = x < 0.0f ? 0.0f : x;
      output[k] = floored > upper ? upper : floored;
      bits |= static_cast<unsigned>(x > 0.0f && x < upper) << (k - first);
    }
    gates[first / 8] = static_cast<uint8_t>(bits);
  }
}

template <bool kGated, bool kPositive>
void backward_rule(const float* __restrict grad_output, const uint8_t* __restrict gates, float* __restrict grad_input,
                   int64_t count) {
  const vfloat zero = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    unsigned bits = 0;
    for (int64_t b = 0; b < kBytes; ++b) bits |= static_cast<unsigned>(gates[i / 8 + b]) << (8 * b);
    for (int v = 0; v < kVectors; ++v) {
      const vfloat g = load(grad_output + i + v * kLanes);
      vint passes = zero == zero;
      if (kGated) passes &= lanes_of(bits >> (v * kLanes));
      if (kPositive) passes &= g > zero;
      store(grad_input + i + v * kLanes, passes ? g : zero);
    }
  }
  for (; i < count; ++i) {
    const float g = grad_output[i];
    const bool passes = (!kGated || (gates[i / 8] >> (i % 8) & 1)) && (!kPositive || g > 0.0f);
    grad_input[i] = passes ? g : 0.0f;
  }
}

void backward(const float* grad_output, const uint8_t* gates, int rule, float* grad_input, int64_t count) {
  if (rule == 0) backward_rule<true, false>(grad_output, gates, grad_input, count);
  if (rule == 1) backward_rule<true, true>(grad_output, gates, grad_input, count);
  if (rule == 2) backward_rule<false, true>(grad_output, gates, grad_input, count);
}
}  // namespace

PYSAL_TABLE(GuidedReluKernels, guided_relu) = {forward, backward};
}  // namespace pysal::cpu
