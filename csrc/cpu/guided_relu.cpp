// guided_relu: output = min(max(x, 0), upper) with the gate 1[0 < x < upper] kept as bits; its backward under a rule
// (0 plain: gate g; 1 guided: gate 1[g > 0] g; 2 deconvnet: 1[g > 0] g), after Springenberg et al. 2014.
// Tensors are taken in memory order, contiguous or channels_last; bit i % 8 of byte i // 8 is element i.
// Work split: threads own whole bytes of gates, so that no two write to one.
// float32 has loops per instruction set (simd/guided_relu.cpp); the other dtypes compute in arithmetic_t here.
#include "simd/guided_relu_kernels.h"

#include "../common/torch_stable.h"
#include "simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kGrain = 4096;  // bytes of gates per task at least: 32768 elements outlast the cost of a thread

template <class T>
void forward(const T* input, arithmetic_t<T> upper, T* output, uint8_t* gates, int64_t count) {
  using A = arithmetic_t<T>;
  for (int64_t first = 0; first < count; first += 8) {
    unsigned bits = 0;
    for (int64_t i = first; i < std::min(first + 8, count); ++i) {
      const A x = static_cast<A>(input[i]);
      const A floored = x < A(0) ? A(0) : x;  // NaN comes through
      output[i] = static_cast<T>(floored > upper ? upper : floored);
      bits |= static_cast<unsigned>(x > A(0) && x < upper) << (i - first);
    }
    gates[first / 8] = static_cast<uint8_t>(bits);
  }
}

template <class T>
void backward(const T* grad_output, const uint8_t* gates, int64_t rule, T* grad_input, int64_t count) {
  using A = arithmetic_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    const bool gate = gates[i / 8] >> (i % 8) & 1, positive = static_cast<A>(grad_output[i]) > A(0);
    const bool passes = rule == 0 ? gate : rule == 1 ? gate && positive : positive;
    grad_input[i] = passes ? grad_output[i] : static_cast<T>(0.0f);
  }
}

void forward(const float* input, float upper, float* output, uint8_t* gates, int64_t count) {
  PYSAL_PICK(guided_relu).forward(input, upper, output, gates, count);
}

void backward(const float* grad_output, const uint8_t* gates, int64_t rule, float* grad_input, int64_t count) {
  PYSAL_PICK(guided_relu).backward(grad_output, gates, static_cast<int>(rule), grad_input, count);
}

std::tuple<Tensor, Tensor> guided_relu_cpu(const Tensor& input, double upper, int64_t /*rule*/) {
  const bool channels_last = is_channels_last(input);
  const Tensor source = dense(input, channels_last);
  const int64_t count = source.numel(), bytes = (count + 7) / 8;
  Tensor output = empty(source, source.sizes(), std::nullopt, channels_last);
  Tensor gates = empty(source, {bytes}, ScalarType::Byte);
  uint8_t* bits = gates.mutable_data_ptr<uint8_t>();
  PYSAL_DISPATCH_FLOATING(source.scalar_type(), "guided_relu", [&] {
    const scalar_t* in = source.const_data_ptr<scalar_t>();
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    const auto top = static_cast<arithmetic_t<scalar_t>>(upper);
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = 8 * begin, length = std::min(8 * end, count) - first;
      forward(in + first, top, out + first, bits + begin, length);
    });
  });
  return {output, gates};
}

Tensor guided_relu_backward_cpu(const Tensor& grad_output, const Tensor& gates, int64_t rule, bool channels_last) {
  PYSAL_CHECK(!channels_last || grad_output.dim() == 4,
              "pysal::guided_relu_backward: channels_last must be false unless grad_output is 4-D, got ",
              grad_output.dim(), " dimensions");
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::guided_relu_backward: rule must be 0, 1 or 2, got ", rule);
  const int64_t count = grad_output.numel(), bytes = (count + 7) / 8;
  PYSAL_CHECK(gates.scalar_type() == ScalarType::Byte && gates.numel() == bytes && gates.is_cpu(),
              "pysal::guided_relu_backward: gates must be ", bytes, " uint8 on the CPU, got ", gates.numel(),
              " elements of ", torch::headeronly::toString(gates.scalar_type()));
  const Tensor source = dense(grad_output, channels_last), dense_gates = dense(gates);
  Tensor grad_input = empty(source, source.sizes(), std::nullopt, channels_last);
  const uint8_t* bits = dense_gates.const_data_ptr<uint8_t>();
  PYSAL_DISPATCH_FLOATING(source.scalar_type(), "guided_relu_backward", [&] {
    const scalar_t* in = source.const_data_ptr<scalar_t>();
    scalar_t* out = grad_input.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = 8 * begin, length = std::min(8 * end, count) - first;
      backward(in + first, bits + begin, rule, out + first, length);
    });
  });
  return grad_input;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("guided_relu", TORCH_BOX(&pysal::cpu::guided_relu_cpu));
  m.impl("guided_relu_backward", TORCH_BOX(&pysal::cpu::guided_relu_backward_cpu));
}
