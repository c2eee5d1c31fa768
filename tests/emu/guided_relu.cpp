#include "../../csrc/cuda/guided_relu.h"

#include <torch/headeronly/util/Half.h>

#include "harness.h"

using namespace pysal::cuda;

namespace {
template <class T>
void forward_and_backward(DType dtype, size_t count, emu_test::Offsets offsets) {
  const auto input = emu_test::random<T>(count + offsets.in), grad = emu_test::random<T>(count + offsets.in, 2);
  const auto output = emu_test::unwritten<T>(count + offsets.out),
             grad_input = emu_test::unwritten<T>(count + offsets.out);
  const size_t bytes = (count + 7) / 8;
  const std::unique_ptr<uint8_t[]> gates(new uint8_t[bytes]);
  const int64_t n = static_cast<int64_t>(count);
  launch_guided_relu(dtype, {input.get() + offsets.in, output.get() + offsets.out, gates.get(), n, 0.5}, nullptr);
  for (size_t i = 0; i < count; ++i) {
    const double x = static_cast<double>(input[i + offsets.in]), y = static_cast<double>(output[i + offsets.out]);
    EXPECT(y == (x < 0 ? 0 : x > 0.5 ? 0.5 : x), std::to_string(i));
    EXPECT((gates[i / 8] >> (i % 8) & 1) == (x > 0 && x < 0.5), std::to_string(i));
  }
  // of what came out they are the same, and the output is left alone
  const std::unique_ptr<uint8_t[]> alone(new uint8_t[bytes]);
  launch_guided_relu(dtype, {output.get() + offsets.out, nullptr, alone.get(), n, 0.5}, nullptr);
  for (size_t i = 0; i < bytes; ++i) EXPECT(alone[i] == gates[i], std::to_string(i));
  for (int rule = 0; rule < 3; ++rule) {
    launch_guided_relu_backward(dtype, {grad.get() + offsets.in, gates.get(), grad_input.get() + offsets.out, n, rule},
                                nullptr);
    for (size_t i = 0; i < count; ++i) {
      const double x = static_cast<double>(input[i + offsets.in]), g = static_cast<double>(grad[i + offsets.in]);
      const bool gate = x > 0 && x < 0.5, passes = rule == 0 ? gate : rule == 1 ? gate && g > 0 : g > 0;
      EXPECT(static_cast<double>(grad_input[i + offsets.out]) == (passes ? g : 0), std::to_string(i));
    }
    const auto in_place = emu_test::random<T>(count + offsets.in, 2);
    T* const lies = in_place.get() + offsets.in;
    launch_guided_relu_backward(dtype, {lies, gates.get(), lies, n, rule}, nullptr);
    for (size_t i = 0; i < count; ++i)
      EXPECT(static_cast<double>(lies[i]) == static_cast<double>(grad_input[i + offsets.out]), std::to_string(i));
  }
}
}  // namespace

CASE(guided_relu_matches_its_formula) {
  for (const size_t count : {0, 1, 7, 8, 9, 255, 2048, 4099})
    for (const emu_test::Offsets offsets : emu_test::kOffsets) {
      forward_and_backward<float>(DType::float32, count, offsets);
      forward_and_backward<double>(DType::float64, count, offsets);
      forward_and_backward<c10::Half>(DType::float16, count, offsets);
    }
}
