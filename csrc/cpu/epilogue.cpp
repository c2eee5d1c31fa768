// epilogue: x <- activation(x + bias + shortcut) in place, bias and shortcut each optional, and what the gradient
// needs: a gate of a bit for relu, min(max(s, 0), parameter), and leaky_relu, the sum s itself for the smooth
// activations; and the gradient of the sum, (grad + added) activation'(s), in place. The sum is rounded to the dtype
// once, and a gate is that of the rounded sum. Prepared models on a CPU have oneDNN do this, so these are plain loops.
// Tensors are taken in memory order, contiguous or channels_last; bit i % 8 of byte i // 8 is element i.
// Work split: threads own whole bytes of gates, so that no two write to one.
#include <cmath>
#include <limits>

#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "parallel.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kGrain = 1024;  // bytes of gates, eight elements each, per task at least
constexpr int64_t kIdentity = 0, kRelu = 1, kSilu = 2, kHardswish = 3, kGelu = 4, kGeluTanh = 5, kSigmoid = 6,
                  kLeaky = 8;
constexpr int64_t kLast = kLeaky;
constexpr double kRootHalf = 0.7071067811865476, kDensity = 0.3989422804014327, kTanhScale = 0.7978845608028654;

bool has_gates(int64_t activation) { return activation == kRelu || activation == kLeaky; }

void check_activation(const char* op, int64_t activation) {
  PYSAL_CHECK(activation >= 0 && activation <= kLast, "pysal::", op, ": activation must be 0 to ", kLast, ", got ",
              activation);
}

template <class A>
A smooth_value(int64_t activation, A x) {
  if (activation == kSilu) return x / (1 + std::exp(-x));
  if (activation == kHardswish) return x * std::min(std::max(x + 3, A(0)), A(6)) / 6;
  if (activation == kGelu) return x * A(0.5) * std::erfc(-x * A(kRootHalf));
  if (activation == kGeluTanh) return x * A(0.5) * (1 + std::tanh(A(kTanhScale) * (x + A(0.044715) * x * x * x)));
  if (activation == kSigmoid) return 1 / (1 + std::exp(-x));
  return std::isnan(x) ? x : std::min(std::max(x + 3, A(0)), A(6)) / 6;
}

template <class A>
A smooth_derivative(int64_t activation, A x) {
  const A s = 1 / (1 + std::exp(-x));
  if (activation == kSilu) return s * (1 + x * (1 - s));
  if (activation == kHardswish) return x <= -3 ? 0 : x >= 3 ? 1 : x / 3 + A(0.5);
  if (activation == kGelu) return A(0.5) * std::erfc(-x * A(kRootHalf)) + x * A(kDensity) * std::exp(x * x * A(-0.5));
  if (activation == kGeluTanh) {
    const A t = std::tanh(A(kTanhScale) * (x + A(0.044715) * x * x * x));
    return A(0.5) * (1 + t) + A(0.5) * x * (1 - t * t) * A(kTanhScale) * (1 + A(3 * 0.044715) * x * x);
  }
  if (activation == kSigmoid) return s * (1 - s);
  return x <= -3 || x >= 3 ? A(0) : A(1.0 / 6);
}

Tensor epilogue_cpu(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& shortcut,
                    int64_t activation, double parameter, bool keep) {
  check_activation("epilogue_", activation);
  PYSAL_CHECK(x.dim() >= 2, "pysal::epilogue_: x must have at least 2 dimensions, got ", x.dim());
  const bool channels_last = is_channels_last(x);
  const int64_t count = x.numel(), channels = x.size(1);
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> biases, other;
  if (bias) {
    PYSAL_CHECK(bias->is_cpu() && bias->scalar_type() == wide && bias->numel() == channels,
                "pysal::epilogue_: bias must be ", channels, " ", torch::headeronly::toString(wide),
                " on the CPU, got ", bias->numel(), " elements of ", torch::headeronly::toString(bias->scalar_type()));
    biases = dense(*bias);
  }
  if (shortcut) {
    PYSAL_CHECK(shortcut->is_cpu() && shortcut->scalar_type() == x.scalar_type() && shortcut->sizes().equals(x.sizes()),
                "pysal::epilogue_: shortcut must have the shape, dtype and device of x");
    other = dense(*shortcut, channels_last);
  }
  const Tensor values = dense(x, channels_last);
  const bool gates = keep && has_gates(activation), sums = keep && !gates && activation != kIdentity;
  Tensor kept = sums ? empty(x, x.sizes(), std::nullopt, channels_last)
                     : empty(x, {gates ? ceil_div(count, 8) : 0}, ScalarType::Byte);
  PYSAL_DISPATCH_FLOATING(x.scalar_type(), "epilogue_", [&] {
    using A = arithmetic_t<scalar_t>;
    scalar_t* const data = values.mutable_data_ptr<scalar_t>();
    const A* const offsets = biases ? biases->const_data_ptr<A>() : nullptr;
    const scalar_t* const added = other ? other->const_data_ptr<scalar_t>() : nullptr;
    uint8_t* const bits = gates ? kept.mutable_data_ptr<uint8_t>() : nullptr;
    scalar_t* const keeps = sums ? kept.mutable_data_ptr<scalar_t>() : nullptr;
    const A bound = static_cast<A>(parameter);
    parallel_for(0, ceil_div(count, 8), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t byte = begin; byte < end; ++byte) {
        unsigned found = 0;
        for (int64_t i = 8 * byte; i < std::min(8 * byte + 8, count); ++i) {
          A sum = static_cast<A>(data[i]);
          if (offsets) sum += offsets[channels_last ? i % channels : i / pixels % channels];
          if (added) sum += static_cast<A>(added[i]);
          const scalar_t stored = static_cast<scalar_t>(sum);
          const A rounded = static_cast<A>(stored);
          bool gate = false;
          if (activation == kIdentity) {
            data[i] = stored;
          } else if (activation == kRelu) {
            gate = !(rounded <= 0) && (!(rounded >= bound) || bound == std::numeric_limits<A>::infinity());
            data[i] = rounded < 0 ? static_cast<scalar_t>(0) : rounded > bound ? static_cast<scalar_t>(bound) : stored;
          } else if (activation == kLeaky) {
            gate = rounded > 0;
            data[i] = gate ? stored : static_cast<scalar_t>(sum * bound);
          } else {
            data[i] = static_cast<scalar_t>(smooth_value(activation, sum));
          }
          found |= static_cast<unsigned>(gate) << (i % 8);
          if (keeps) keeps[i] = stored;
        }
        if (bits) bits[byte] = static_cast<uint8_t>(found);
      }
    });
  });
  if (values.const_data_ptr() != x.const_data_ptr()) {
    Tensor given = x;
    torch::stable::copy_(given, values);
  }
  return kept;
}

void epilogue_backward_cpu(const Tensor& grad, const std::optional<Tensor>& added, const Tensor& kept,
                           int64_t activation, double parameter, int64_t rule, int64_t images, bool channels_last) {
  check_activation("epilogue_backward_", activation);
  PYSAL_CHECK(rule >= 0 && rule <= 2, "pysal::epilogue_backward_: rule must be 0, 1 or 2, got ", rule);
  PYSAL_CHECK(grad.dim() >= 1 && (!channels_last || grad.dim() == 4),
              "pysal::epilogue_backward_: grad must have at least 1 dimension, and 4 where channels_last is true, got ",
              grad.dim());
  const int64_t rows = grad.size(0);
  PYSAL_CHECK(images > 0 ? rows % images == 0 : rows == 0, "pysal::epilogue_backward_: grad must have a multiple of ",
              images, " rows, got ", rows);
  if (grad.numel() == 0) return;
  const int64_t count = grad.numel() / rows * images;
  const bool gated = has_gates(activation);
  std::optional<Tensor> other, sums;
  if (added) {
    PYSAL_CHECK(added->is_cpu() && added->scalar_type() == grad.scalar_type() && added->sizes().equals(grad.sizes()),
                "pysal::epilogue_backward_: added must have the shape, dtype and device of grad");
    other = dense(*added, channels_last);
  }
  PYSAL_CHECK(activation == kIdentity ||
                  (kept.is_cpu() && kept.scalar_type() == (gated ? ScalarType::Byte : grad.scalar_type()) &&
                   kept.numel() == (gated ? ceil_div(count, 8) : count)),
              "pysal::epilogue_backward_: kept must be what epilogue_ returned for ", count,
              " elements on the device of grad");
  PYSAL_CHECK(gated || activation == kIdentity || !channels_last || kept.dim() == 4,
              "pysal::epilogue_backward_: kept must have 4 dimensions where channels_last is true");
  if (activation != kIdentity) sums = dense(kept, channels_last && !gated);
  const Tensor values = dense(grad, channels_last);
  PYSAL_DISPATCH_FLOATING(grad.scalar_type(), "epilogue_backward_", [&] {
    using A = arithmetic_t<scalar_t>;
    scalar_t* const data = values.mutable_data_ptr<scalar_t>();
    const scalar_t* const more = other ? other->const_data_ptr<scalar_t>() : nullptr;
    const uint8_t* const bits = gated ? sums->const_data_ptr<uint8_t>() : nullptr;
    const scalar_t* const keeps = sums && !gated ? sums->const_data_ptr<scalar_t>() : nullptr;
    const A slope = static_cast<A>(parameter);
    parallel_for(0, values.numel(), 8 * kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = i % count;
        A total = static_cast<A>(data[i]);
        if (more) total += static_cast<A>(more[i]);
        const bool gate = bits && (bits[place / 8] >> (place % 8) & 1);
        if (activation == kRelu && ((rule != 2 && !gate) || (rule != 0 && total <= 0))) total = 0;
        if (activation == kLeaky && !gate) total *= slope;
        if (keeps) total *= smooth_derivative(activation, static_cast<A>(keeps[place]));
        data[i] = static_cast<scalar_t>(total);
      }
    });
  });
  if (values.const_data_ptr() != grad.const_data_ptr()) {
    Tensor given = grad;
    torch::stable::copy_(given, values);
  }
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("epilogue_", TORCH_BOX(&pysal::cpu::epilogue_cpu));
  m.impl("epilogue_backward_", TORCH_BOX(&pysal::cpu::epilogue_backward_cpu));
}
