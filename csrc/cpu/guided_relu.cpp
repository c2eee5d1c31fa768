// guided_relu: output = min(max(x, 0), upper) with the gate 1[0 < x < upper] kept as bits; its backward under a rule
// (0 plain: gate g; 1 guided: gate 1[g > 0] g; 2 deconvnet: 1[g > 0] g), after Springenberg et al. 2014. NaN is neither
// at most 0 nor at least upper, so it opens gates and passes as a gradient; at +infinity a gate without upper is open.
// Tensors are taken in memory order, contiguous or channels_last; bit i % 8 of byte i // 8 is element i.
// Work split: threads own whole bytes of gates, so that no two write to one.
// The loops are in simd/guided_relu.cpp, one set per instruction set.
#include "simd/guided_relu_kernels.h"

#include <limits>

#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "parallel.h"
#include "simd/level.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kGrain = 4096;  // bytes of gates per task at least: 32768 elements outlast the cost of a thread

// output null: the gates alone.
void forward(const float* input, float upper, float* output, uint8_t* gates, int64_t count) {
  const GuidedReluKernels& kernels = PYSAL_PICK(guided_relu);
  output ? kernels.forward_float(input, upper, output, gates, count) : kernels.gates_float(input, upper, gates, count);
}
void forward(const double* input, double upper, double* output, uint8_t* gates, int64_t count) {
  const GuidedReluKernels& kernels = PYSAL_PICK(guided_relu);
  output ? kernels.forward_double(input, upper, output, gates, count)
         : kernels.gates_double(input, upper, gates, count);
}
// float16 and bfloat16 are compared by their bits; static_cast rounds to nearest, so a neighbour may be the one wanted.
template <class Half>
void forward(const Half* input, float upper, Half* output, uint8_t* gates, int64_t count) {
  const Half rounded = static_cast<Half>(upper);
  const int16_t bits = static_cast<int16_t>(rounded.x);
  const auto infinity = static_cast<int16_t>(std::numeric_limits<Half>::infinity().x);
  const auto below = static_cast<int16_t>(static_cast<float>(rounded) > upper ? bits - 1 : bits);
  const bool over = static_cast<float>(rounded) < upper || upper == std::numeric_limits<float>::infinity();
  const auto above = static_cast<int16_t>(over ? bits + 1 : bits);
  const HalfUpper top{below, above, bits, infinity};
  const auto* const in = reinterpret_cast<const int16_t*>(input);
  const GuidedReluKernels& kernels = PYSAL_PICK(guided_relu);
  output ? kernels.forward_half(in, top, reinterpret_cast<int16_t*>(output), gates, count)
         : kernels.gates_half(in, top, gates, count);
}

void backward(const float* grad_output, const uint8_t* gates, int rule, float* grad_input, int64_t count) {
  PYSAL_PICK(guided_relu).backward_float(grad_output, gates, rule, grad_input, count);
}
void backward(const double* grad_output, const uint8_t* gates, int rule, double* grad_input, int64_t count) {
  PYSAL_PICK(guided_relu).backward_double(grad_output, gates, rule, grad_input, count);
}
template <class Half>
void backward(const Half* grad_output, const uint8_t* gates, int rule, Half* grad_input, int64_t count) {
  const auto infinity = static_cast<int16_t>(std::numeric_limits<Half>::infinity().x);
  PYSAL_PICK(guided_relu)
      .backward_half(reinterpret_cast<const int16_t*>(grad_output), gates, rule, infinity,
                     reinterpret_cast<int16_t*>(grad_input), count);
}

// The gates of a dense tensor, and where output is not null what they let through.
Tensor gates_of(const Tensor& source, double upper, Tensor* output) {
  const int64_t count = source.numel(), bytes = ceil_div(count, 8);
  Tensor gates = empty(source, {bytes}, ScalarType::Byte);
  uint8_t* bits = gates.mutable_data_ptr<uint8_t>();
  PYSAL_DISPATCH_FLOATING(source.scalar_type(), "guided_relu", [&] {
    const scalar_t* in = source.const_data_ptr<scalar_t>();
    scalar_t* out = output ? output->mutable_data_ptr<scalar_t>() : nullptr;
    const auto top = static_cast<arithmetic_t<scalar_t>>(upper);
    parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = 8 * begin, length = std::min(8 * end, count) - first;
      forward(in + first, top, out ? out + first : nullptr, bits + begin, length);
    });
  });
  return gates;
}

std::tuple<Tensor, Tensor> guided_relu_cpu(const Tensor& input, double upper, int64_t /*rule*/) {
  const bool channels_last = is_channels_last(input);
  const Tensor source = dense(input, channels_last);
  Tensor output = empty(source, source.sizes(), std::nullopt, channels_last);
  Tensor gates = gates_of(source, upper, &output);
  return {output, gates};
}

Tensor guided_relu_gates_cpu(const Tensor& input, double upper) {
  return gates_of(dense(input, is_channels_last(input)), upper, nullptr);
}

void check_backward(const char* op, const char* name, const Tensor& grad, const Tensor& gates, int64_t rule,
                    bool channels_last) {
  PYSAL_CHECK(!channels_last || grad.dim() == 4, "pysal::", op, ": channels_last must be false unless ", name,
              " is 4-D, got ", grad.dim(), " dimensions");
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::", op, ": rule must be 0, 1 or 2, got ", rule);
  const int64_t bytes = ceil_div(grad.numel(), 8);
  PYSAL_CHECK(gates.scalar_type() == ScalarType::Byte && gates.numel() == bytes && gates.is_cpu(), "pysal::", op,
              ": gates must be ", bytes, " uint8 on the CPU, got ", gates.numel(), " elements of ",
              torch::headeronly::toString(gates.scalar_type()));
}

// target may be source.
void mask(const Tensor& source, const Tensor& gates, int64_t rule, const Tensor& target) {
  const Tensor dense_gates = dense(gates);
  const int64_t count = source.numel();
  const uint8_t* bits = dense_gates.const_data_ptr<uint8_t>();
  PYSAL_DISPATCH_FLOATING(source.scalar_type(), "guided_relu_backward", [&] {
    const scalar_t* in = source.const_data_ptr<scalar_t>();
    scalar_t* out = target.mutable_data_ptr<scalar_t>();
    parallel_for(0, ceil_div(count, 8), kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = 8 * begin, length = std::min(8 * end, count) - first;
      backward(in + first, bits + begin, static_cast<int>(rule), out + first, length);
    });
  });
}

Tensor guided_relu_backward_cpu(const Tensor& grad_output, const Tensor& gates, int64_t rule, bool channels_last) {
  check_backward("guided_relu_backward", "grad_output", grad_output, gates, rule, channels_last);
  const Tensor source = dense(grad_output, channels_last);
  Tensor grad_input = empty(source, source.sizes(), std::nullopt, channels_last);
  mask(source, gates, rule, grad_input);
  return grad_input;
}

// Worked on where it lies if it is dense in that order, else on a dense copy that is written back.
void guided_relu_backward_in_place_cpu(const Tensor& grad, const Tensor& gates, int64_t rule, bool channels_last) {
  check_backward("guided_relu_backward_", "grad", grad, gates, rule, channels_last);
  const Tensor values = dense(grad, channels_last);
  mask(values, gates, rule, values);
  if (values.const_data_ptr() != grad.const_data_ptr()) {
    Tensor given = grad;
    torch::stable::copy_(given, values);
  }
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("guided_relu", TORCH_BOX(&pysal::cpu::guided_relu_cpu));
  m.impl("guided_relu_gates", TORCH_BOX(&pysal::cpu::guided_relu_gates_cpu));
  m.impl("guided_relu_backward", TORCH_BOX(&pysal::cpu::guided_relu_backward_cpu));
  m.impl("guided_relu_backward_", TORCH_BOX(&pysal::cpu::guided_relu_backward_in_place_cpu));
}
