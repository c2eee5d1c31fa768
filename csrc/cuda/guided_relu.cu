// guided_relu: output = min(max(x, 0), upper), gate 1[0 < x < upper] kept as one bit; its backward under a rule
// (0 plain: gate g; 1 guided: gate 1[g > 0] g; 2 deconvnet: 1[g > 0] g), after Springenberg et al. 2014. NaN is neither
// at most 0 nor at least upper, so it opens gates and passes as a gradient; at +infinity a gate without upper is open.
// Layout: dense arrays in the memory order of output; bit i % 8 of byte i // 8 is element i.
// Work split: a thread owns eight elements and their byte, so no two threads write one byte and no ballot is needed.
// Bytes per element of size s: forward reads s, writes s + 1/8, or 1/8 for the gates alone; backward reads s + 1/8
// (deconvnet s), writes s.
#include "guided_relu.h"

#include <cmath>

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 256;
constexpr int kPerThread = 8;
constexpr int kPlain = 0, kGuided = 1, kDeconvnet = 2;

// A gate is closed at most 0 and from `bound`, which is NaN where upper is infinite: comparisons with it are false.
template <class A>
struct Forward {
  A upper, bound;
  __device__ __forceinline__ A output(A x) const {
    const A floored = x < A(0) ? A(0) : x;  // comparisons with NaN are false, so it comes through
    return floored > upper ? upper : floored;
  }
  __device__ __forceinline__ bool gate(A x) const { return !(x <= A(0)) && !(x >= bound); }
};

template <class A, int kRule>
struct Backward {
  static constexpr bool kGated = kRule != kDeconvnet;
  static constexpr bool kPositive = kRule != kPlain;
  __device__ __forceinline__ bool passes(A g, bool gate) const {
    return (!kGated || gate) && (!kPositive || !(g <= A(0)));
  }
};

template <class T, bool kAligned, bool kStores>
__global__ void __launch_bounds__(kBlock) guided_relu_kernel(const GuidedReluParams params) {
  using A = arithmetic_t<T>;
  const T* __restrict__ const input = static_cast<const T*>(params.input);
  T* __restrict__ const output = static_cast<T*>(params.output);
  const A upper = static_cast<A>(params.upper);
  const Forward<A> forward{upper, upper == static_cast<A>(INFINITY) ? static_cast<A>(NAN) : upper};
  const int64_t whole = params.count / kPerThread, stride = int64_t(gridDim.x) * blockDim.x;

  int64_t byte = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; byte < whole; byte += stride) {
    const Eight<T> x = load_eight<kAligned>(input + kPerThread * byte);
    Eight<T> y;
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const A value = static_cast<A>(x.values[k]);
      y.values[k] = static_cast<T>(forward.output(value));
      bits |= static_cast<unsigned>(forward.gate(value)) << k;
    }
    if constexpr (kStores) store_eight<kAligned>(output + kPerThread * byte, y);
    params.gates[byte] = static_cast<uint8_t>(bits);
  }

  // the last, partial byte falls to the one thread whose loop ended on it
  if (byte == whole && kPerThread * whole < params.count) {
    unsigned bits = 0;
    for (int64_t i = kPerThread * whole; i < params.count; ++i) {
      const A value = static_cast<A>(input[i]);
      if constexpr (kStores) output[i] = static_cast<T>(forward.output(value));
      bits |= static_cast<unsigned>(forward.gate(value)) << (i % kPerThread);
    }
    params.gates[whole] = static_cast<uint8_t>(bits);
  }
}

// grad_input may be grad_output, so neither is __restrict__: a thread reads its eight elements before it writes them.
template <class T, bool kAligned, int kRule>
__global__ void __launch_bounds__(kBlock) guided_relu_backward_kernel(const GuidedReluBackwardParams params) {
  using A = arithmetic_t<T>;
  const T* const grad_output = static_cast<const T*>(params.grad_output);
  T* const grad_input = static_cast<T*>(params.grad_input);
  const uint8_t* __restrict__ const gates = params.gates;
  const Backward<A, kRule> backward;
  const T zero = static_cast<T>(0.0f);
  const int64_t whole = params.count / kPerThread, stride = int64_t(gridDim.x) * blockDim.x;

  int64_t byte = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; byte < whole; byte += stride) {
    const unsigned bits = backward.kGated ? gates[byte] : 0;
    const Eight<T> g = load_eight<kAligned>(grad_output + kPerThread * byte);
    Eight<T> d;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k)
      d.values[k] = backward.passes(static_cast<A>(g.values[k]), bits >> k & 1) ? g.values[k] : zero;
    store_eight<kAligned>(grad_input + kPerThread * byte, d);
  }

  if (byte == whole && kPerThread * whole < params.count) {
    const unsigned bits = backward.kGated ? gates[whole] : 0;
    for (int64_t i = kPerThread * whole; i < params.count; ++i) {
      const T g = grad_output[i];
      grad_input[i] = backward.passes(static_cast<A>(g), bits >> (i % kPerThread) & 1) ? g : zero;
    }
  }
}
}  // namespace

void launch_guided_relu(DType dtype, const GuidedReluParams& params, void* stream) {
  if (params.count == 0) return;
  const dim3 grid = blocks_for(ceil_div(params.count, kPerThread), kBlock);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = aligned_to_16(params.input, params.output);
    const auto kernel = params.output == nullptr
                            ? (aligned ? guided_relu_kernel<T, true, false> : guided_relu_kernel<T, false, false>)
                            : (aligned ? guided_relu_kernel<T, true, true> : guided_relu_kernel<T, false, true>);
    launch("guided_relu", kernel, grid, kBlock, 0, stream, params);
  });
}

void launch_guided_relu_backward(DType dtype, const GuidedReluBackwardParams& params, void* stream) {
  if (params.count == 0) return;
  const dim3 grid = blocks_for(ceil_div(params.count, kPerThread), kBlock);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto rule) {
      constexpr int kRule = decltype(rule)::value;
      const auto kernel = aligned_to_16(params.grad_output, params.grad_input)
                              ? guided_relu_backward_kernel<T, true, kRule>
                              : guided_relu_backward_kernel<T, false, kRule>;
      launch("guided_relu_backward", kernel, grid, kBlock, 0, stream, params);
    };
    if (params.rule == kPlain) run(std::integral_constant<int, kPlain>());
    if (params.rule == kGuided) run(std::integral_constant<int, kGuided>());
    if (params.rule == kDeconvnet) run(std::integral_constant<int, kDeconvnet>());
  });
}
}  // namespace pysal::cuda
