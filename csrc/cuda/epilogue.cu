// epilogue: x <- activation(x + bias + shortcut) in place on what a convolution without bias returned, bias and
// shortcut each optional, and what the gradient needs: a gate of a bit for relu, min(max(s, 0), parameter), and
// leaky_relu, the sum s itself for the smooth activations. Its backward: grad <- (grad + added) activation'(s), added
// optional, relu's under a rule (guided_relu.cu has those). Sums are formed in the arithmetic type; s is rounded to T
// once, and a gate is that of the rounded sum, so that it agrees with the result. Layout: dense arrays in contiguous or
// channels_last order; bit i % 8 of byte i // 8 is element i. Work split: a thread owns eight elements and their byte.
// Where several gradients share gates or sums, each is a row of the grid, so that no index is divided. Bytes per
// element of size s: 2 s, + 1/8 with gates, + s with a shortcut or with sums kept; backward 2 s + 1/8 or 3 s,
// + s with something added.
#include "epilogue.h"

#include <cmath>

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 256;
constexpr int kPerThread = 8;
constexpr int kPlain = 0, kDeconvnet = 2;
// Which of them a kernel is compiled for: those with gates apart, as they need fewer registers.
constexpr int kIdentity = 0, kGated = 1, kSmooth = 2;

// Eight at once only where that pays: at addresses that words may have, and of doubles not where the activation is
// long, which needs more registers than there are.
template <class T, bool kAligned, int kFamily>
constexpr bool kOneByOne = !kAligned || (kFamily == kSmooth && sizeof(T) == 8);

int family_of(Activation activation) {
  if (activation == Activation::identity) return kIdentity;
  return activation == Activation::relu || activation == Activation::leaky_relu ? kGated : kSmooth;
}

template <class A>
__device__ __forceinline__ A logistic(A x) {
  return A(1) / (A(1) + exp(-x));
}

// Half of erfc(-x / sqrt(2)): 1 + erf(x / sqrt(2)) would cancel below zero.
template <class A>
__device__ __forceinline__ A normal_distribution(A x) {
  return A(0.5) * erfc(x * A(-0.70710678118654752440));
}

template <class A>
__device__ __forceinline__ A hard_sigmoid(A x) {
  const A raised = x + A(3), floored = raised < A(0) ? A(0) : raised;
  return (floored > A(6) ? A(6) : floored) / A(6);
}

// Twice the argument of gelu's tanh, of which (1 + tanh(u)) / 2 is the logistic function.
template <class A>
__device__ __forceinline__ A twice_inner(A x) {
  return x * (A(1.5957691216057307117598) + x * x * A(0.071354816272600248));
}

template <class A>
__device__ __forceinline__ A smooth_value(Activation activation, A x) {
  switch (activation) {
    case Activation::silu:
      return x / (A(1) + exp(-x));
    case Activation::hardswish:
      return x * hard_sigmoid(x);
    case Activation::gelu:
      return x * normal_distribution(x);
    case Activation::gelu_tanh:
      return x / (A(1) + exp(-twice_inner(x)));
    case Activation::sigmoid:
      return logistic(x);
    default:
      return hard_sigmoid(x);
  }
}

template <class A>
__device__ __forceinline__ A smooth_derivative(Activation activation, A x) {
  switch (activation) {
    case Activation::silu: {
      const A s = logistic(x);
      return s * (A(1) + x * (A(1) - s));
    }
    case Activation::hardswish:
      return x <= A(-3) ? A(0) : x >= A(3) ? A(1) : x * A(1.0 / 3.0) + A(0.5);
    case Activation::gelu:
      return normal_distribution(x) + x * A(0.39894228040143267794) * exp(x * x * A(-0.5));
    case Activation::gelu_tanh: {
      const A s = logistic(twice_inner(x));
      return s + x * s * (A(1) - s) * (A(1.5957691216057307117598) + x * x * A(0.214064448817800744));
    }
    case Activation::sigmoid: {
      const A s = logistic(x);
      return s * (A(1) - s);
    }
    default:
      return x <= A(-3) || x >= A(3) ? A(0) : A(1.0 / 6.0);
  }
}

// The bias of one element.
template <class A>
__device__ __forceinline__ A bias_of(const EpilogueParams& params, int64_t place, bool narrow) {
  const A* __restrict__ const bias = static_cast<const A*>(params.bias);
  const int64_t whole = params.channels_last ? place : divided(place, params.pixels, narrow).quotient;
  return bias[divided(whole, params.channels, narrow).remainder];
}

// Adds the biases of eight elements that lie together from `first`.
template <class A>
__device__ __forceinline__ void add_biases(const EpilogueParams& params, int64_t first, bool narrow, bool words,
                                           A* sums) {
  const A* __restrict__ const bias = static_cast<const A*>(params.bias);
  if (params.channels_last) {
    int64_t channel = divided(first, params.channels, narrow).remainder;
    if (words) {  // the channels are a multiple of eight
      const Eight<A> eight = load_eight<true>(bias + channel);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) sums[k] += eight.values[k];
      return;
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      sums[k] += bias[channel];
      if (++channel == params.channels) channel = 0;
    }
    return;
  }
  const Divided place = divided(first, params.pixels, narrow);
  int64_t channel = divided(place.quotient, params.channels, narrow).remainder, pixel = place.remainder;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    sums[k] += bias[channel];
    if (++pixel == params.pixels) {
      pixel = 0;
      if (++channel == params.channels) channel = 0;
    }
  }
}

// What becomes of a sum.
template <class T, int kFamily>
struct Forward {
  using A = arithmetic_t<T>;
  Activation activation;
  A parameter;
  A bound;  // from where a gate of relu is closed; NaN where that is nowhere, as comparisons with it are false
  __device__ __forceinline__ explicit Forward(const EpilogueParams& params)
      : activation(params.activation),
        parameter(static_cast<A>(params.parameter)),
        bound(parameter == static_cast<A>(INFINITY) ? static_cast<A>(NAN) : parameter) {}

  __device__ __forceinline__ T result(A sum, T stored) const {
    if constexpr (kFamily == kIdentity) return stored;
    if constexpr (kFamily == kSmooth) return static_cast<T>(smooth_value(activation, sum));
    const A rounded = static_cast<A>(stored);
    if (activation == Activation::leaky_relu) return rounded > A(0) ? stored : static_cast<T>(sum * parameter);
    const A floored = rounded < A(0) ? A(0) : rounded;
    return static_cast<T>(floored > parameter ? parameter : floored);
  }
  __device__ __forceinline__ bool gate(T stored) const {
    const A rounded = static_cast<A>(stored);
    if (activation == Activation::leaky_relu) return rounded > A(0);
    return !(rounded <= A(0)) && !(rounded >= bound);
  }
};

template <class T, bool kAligned, int kFamily>
__global__ void __launch_bounds__(kBlock)
    epilogue_kernel(const EpilogueParams params, const bool narrow, const bool words) {
  using A = arithmetic_t<T>;
  T* const x = static_cast<T*>(params.x);
  const T* __restrict__ const shortcut = static_cast<const T*>(params.shortcut);
  T* __restrict__ const sums = static_cast<T*>(params.sums);
  const Forward<T, kFamily> forward(params);
  const int64_t whole = params.count / kPerThread, stride = int64_t(gridDim.x) * blockDim.x;

  // One element; whether its gate is open.
  const auto one = [&](int64_t i) -> unsigned {
    A total = static_cast<A>(x[i]);
    if (params.bias) total += bias_of<A>(params, i, narrow);
    if (shortcut) total += static_cast<A>(shortcut[i]);
    const T stored = static_cast<T>(total);
    x[i] = forward.result(total, stored);
    if (kFamily == kSmooth && sums) sums[i] = stored;
    return kFamily == kGated && forward.gate(stored);
  };

  int64_t byte = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; byte < whole; byte += stride) {
    const int64_t first = kPerThread * byte;
    if constexpr (kOneByOne<T, kAligned, kFamily>) {
      unsigned bits = 0;
#pragma unroll 1
      for (int k = 0; k < kPerThread; ++k) bits |= one(first + k) << k;
      if (kFamily == kGated && params.gates) params.gates[byte] = static_cast<uint8_t>(bits);
      continue;
    }
    A total[kPerThread];
    const Eight<T> found = load_eight<kAligned>(x + first);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) total[k] = static_cast<A>(found.values[k]);
    if (params.bias) add_biases<A>(params, first, narrow, words, total);
    if (shortcut) {
      const Eight<T> other = load_eight<kAligned>(shortcut + first);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) total[k] += static_cast<A>(other.values[k]);
    }
    Eight<T> stored, result;
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      stored.values[k] = static_cast<T>(total[k]);
      result.values[k] = forward.result(total[k], stored.values[k]);
      if constexpr (kFamily == kGated) bits |= static_cast<unsigned>(forward.gate(stored.values[k])) << k;
    }
    store_eight<kAligned>(x + first, result);
    if (kFamily == kSmooth && sums) store_eight<kAligned>(sums + first, stored);
    if (kFamily == kGated && params.gates) params.gates[byte] = static_cast<uint8_t>(bits);
  }

  // the last, partial byte falls to the one thread whose loop ended on it
  if (byte == whole && kPerThread * whole < params.count) {
    unsigned bits = 0;
    for (int64_t i = kPerThread * whole; i < params.count; ++i) bits |= one(i) << (i % kPerThread);
    if (kFamily == kGated && params.gates) params.gates[whole] = static_cast<uint8_t>(bits);
  }
}

// What becomes of a gradient.
template <class T, int kFamily>
struct Backward {
  using A = arithmetic_t<T>;
  Activation activation;
  A slope;
  bool gated, positive;  // what relu's rule looks at
  __device__ __forceinline__ explicit Backward(const EpilogueBackwardParams& params)
      : activation(params.activation),
        slope(static_cast<A>(params.parameter)),
        gated(params.rule != kDeconvnet),
        positive(params.rule != kPlain) {}

  __device__ __forceinline__ T result(A grad, bool gate, T sum) const {
    if constexpr (kFamily == kIdentity) return static_cast<T>(grad);
    if constexpr (kFamily == kSmooth) return static_cast<T>(grad * smooth_derivative(activation, static_cast<A>(sum)));
    if (activation == Activation::leaky_relu) return static_cast<T>(gate ? grad : grad * slope);
    return static_cast<T>((gate || !gated) && !(positive && grad <= A(0)) ? grad : A(0));
  }
};

template <class T, bool kAligned, int kFamily>
__global__ void __launch_bounds__(kBlock) epilogue_backward_kernel(const EpilogueBackwardParams params) {
  using A = arithmetic_t<T>;
  const T* __restrict__ const sums = static_cast<const T*>(params.sums);
  const Backward<T, kFamily> backward(params);
  const int64_t whole = params.count / kPerThread, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t time = blockIdx.y; time < params.times; time += gridDim.y) {
    T* const grad = static_cast<T*>(params.grad) + time * params.count;
    const T* __restrict__ const added =
        params.added ? static_cast<const T*>(params.added) + time * params.count : nullptr;

    const auto one = [&](int64_t i, bool gate) {
      A total = static_cast<A>(grad[i]);
      if (added) total += static_cast<A>(added[i]);
      grad[i] = backward.result(total, gate, kFamily == kSmooth ? sums[i] : grad[i]);
    };

    int64_t byte = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; byte < whole; byte += stride) {
      const int64_t first = kPerThread * byte;
      const unsigned bits = kFamily == kGated ? params.gates[byte] : 0;
      if constexpr (kOneByOne<T, kAligned, kFamily>) {
#pragma unroll 1
        for (int k = 0; k < kPerThread; ++k) one(first + k, bits >> k & 1);
        continue;
      }
      const Eight<T> found = load_eight<kAligned>(grad + first);
      A total[kPerThread];
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) total[k] = static_cast<A>(found.values[k]);
      if (added) {
        const Eight<T> other = load_eight<kAligned>(added + first);
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) total[k] += static_cast<A>(other.values[k]);
      }
      Eight<T> sum = found, result;
      if constexpr (kFamily == kSmooth) sum = load_eight<kAligned>(sums + first);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) result.values[k] = backward.result(total[k], bits >> k & 1, sum.values[k]);
      store_eight<kAligned>(grad + first, result);
    }

    if (byte == whole && kPerThread * whole < params.count) {
      const unsigned bits = kFamily == kGated ? params.gates[whole] : 0;
      for (int64_t i = kPerThread * whole; i < params.count; ++i) one(i, bits >> (i % kPerThread) & 1);
    }
  }
}
}  // namespace

void launch_epilogue(DType dtype, const EpilogueParams& params, void* stream) {
  if (params.count == 0) return;
  const dim3 grid = blocks_for(ceil_div(params.count, kPerThread), kBlock);
  const bool narrow = params.count <= INT32_MAX;
  const bool words =
      params.bias && params.channels_last && params.channels % kPerThread == 0 && aligned_to_16(params.bias, nullptr);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = aligned_to_16(params.x, params.shortcut) && aligned_to_16(params.sums, nullptr);
    const auto run = [&](auto family) {
      constexpr int kFamily = decltype(family)::value;
      const auto kernel = aligned ? epilogue_kernel<T, true, kFamily> : epilogue_kernel<T, false, kFamily>;
      launch("epilogue", kernel, grid, kBlock, 0, stream, params, narrow, words);
    };
    const int family = family_of(params.activation);
    if (family == kIdentity) run(std::integral_constant<int, kIdentity>());
    if (family == kGated) run(std::integral_constant<int, kGated>());
    if (family == kSmooth) run(std::integral_constant<int, kSmooth>());
  });
}

void launch_epilogue_backward(DType dtype, const EpilogueBackwardParams& params, void* stream) {
  if (params.count == 0 || params.times == 0) return;
  dim3 grid = blocks_for(ceil_div(params.count, kPerThread), kBlock);
  constexpr int64_t kMostRows = 65535;  // of a grid, on every GPU
  grid.y = static_cast<unsigned>(params.times < kMostRows ? params.times : kMostRows);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool rows_aligned = params.times == 1 || params.count * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned =
        rows_aligned && aligned_to_16(params.grad, params.added) && aligned_to_16(params.sums, nullptr);
    const auto run = [&](auto family) {
      constexpr int kFamily = decltype(family)::value;
      const auto kernel =
          aligned ? epilogue_backward_kernel<T, true, kFamily> : epilogue_backward_kernel<T, false, kFamily>;
      launch("epilogue_backward", kernel, grid, kBlock, 0, stream, params);
    };
    const int family = family_of(params.activation);
    if (family == kIdentity) run(std::integral_constant<int, kIdentity>());
    if (family == kGated) run(std::integral_constant<int, kGated>());
    if (family == kSmooth) run(std::integral_constant<int, kSmooth>());
  });
}
}  // namespace pysal::cuda
