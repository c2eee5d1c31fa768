#include "../../csrc/cuda/guided_relu.h"

#include <torch/headeronly/util/Half.h>

#include "harness.h"

using namespace pysal::cuda;

namespace {
// offset != 0: no 16-byte words
template <class T>
void forward_and_backward(DType dtype, size_t count, size_t offset) {
  const auto input = emu_test::random<T>(count + offset), grad = emu_test::random<T>(count + offset, 2);
  const auto output = emu_test::unwritten<T>(count + offset), grad_input = emu_test::unwritten<T>(count + offset);
  const size_t bytes = (count + 7) / 8;
  const std::unique_ptr<uint8_t[]> gates(new uint8_t[bytes]);
  const int64_t n = static_cast<int64_t>(count);
  launch_guided_relu(dtype, {input.get() + offset, output.get() + offset, gates.get(), n, 0.5}, nullptr);
  for (size_t i = 0; i < count; ++i) {
    const double x = static_cast<double>(input[i + offset]), y = static_cast<double>(output[i + offset]);
    EXPECT(y == (x < 0 ? 0 : x > 0.5 ? 0.5 : x), std::to_string(i));
    EXPECT((gates[i / 8] >> (i % 8) & 1) == (x > 0 && x < 0.5), std::to_string(i));
  }
  // of what came out they are the same, and the output is left alone
  const std::unique_ptr<uint8_t[]> alone(new uint8_t[bytes]);
  launch_guided_relu(dtype, {output.get() + offset, nullptr, alone.get(), n, 0.5}, nullptr);
  for (size_t i = 0; i < bytes; ++i) EXPECT(alone[i] == gates[i], std::to_string(i));
  for (int rule = 0; rule < 3; ++rule) {
    launch_guided_relu_backward(dtype, {grad.get() + offset, gates.get(), grad_input.get() + offset, n, rule}, nullptr);
    for (size_t i = 0; i < count; ++i) {
      const double x = static_cast<double>(input[i + offset]), g = static_cast<double>(grad[i + offset]);
      const bool gate = x > 0 && x < 0.5, passes = rule == 0 ? gate : rule == 1 ? gate && g > 0 : g > 0;
      EXPECT(static_cast<double>(grad_input[i + offset]) == (passes ? g : 0), std::to_string(i));
    }
    const auto in_place = emu_test::random<T>(count + offset, 2);
    T* const lies = in_place.get() + offset;
    launch_guided_relu_backward(dtype, {lies, gates.get(), lies, n, rule}, nullptr);
    for (size_t i = 0; i < count; ++i)
      EXPECT(static_cast<double>(lies[i]) == static_cast<double>(grad_input[i + offset]), std::to_string(i));
  }
}
}  // namespace

CASE(guided_relu_matches_its_formula) {
  for (const size_t count : {0, 1, 7, 8, 9, 255, 2048, 4099})
    for (const size_t offset : {0, 1}) {
      forward_and_backward<float>(DType::float32, count, offset);
      forward_and_backward<double>(DType::float64, count, offset);
      forward_and_backward<c10::Half>(DType::float16, count, offset);
    }
}
