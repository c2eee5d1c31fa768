// The CPU loops that have no library around them, csrc/cpu/simd, against plain loops: what another processor runs is
// the part of them that has no instruction of x86 in it. tests/cross.sh aarch64 compiles this for 64-bit ARM and runs
// it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/cpu/simd/box_regions_kernels.h"
#include "../csrc/cpu/simd/gaussian_noise_kernels.h"
#include "../csrc/cpu/simd/grad_cam_kernels.h"
#include "../csrc/cpu/simd/guided_relu_kernels.h"

using namespace pysal::cpu;

namespace {
int failures = 0;

void expect(bool holds, const char* what, int64_t count) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s of %lld elements\n", what, static_cast<long long>(count));
}

// In [-1, 1), with the numbers that comparisons treat specially among them.
template <class T>
std::vector<T> numbers(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(engine() * 0x1p-31 - 1.0);
  const T special[] = {0, -T(0), std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN()};
  for (int64_t i = 3; i < count; i += 7) values[i] = special[i % 5];
  return values;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))) return false;
  return true;
}

template <class T, class Forward, class Gates, class Backward>
void guided_relu(int64_t count, Forward forward, Gates gates_alone, Backward backward) {
  const T upper = T(0.5);
  const std::vector<T> input = numbers<T>(count, 1), gradient = numbers<T>(count, 2);
  std::vector<T> output(count), wanted(count), wanted_gradient(count), found(count);
  std::vector<uint8_t> gates((count + 7) / 8), alone(gates.size()), bits(gates.size());
  for (int64_t i = 0; i < count; ++i) {
    wanted[i] = input[i] < 0 ? T(0) : input[i] > upper ? upper : input[i];
    const bool open = !(input[i] <= 0 || input[i] >= upper);
    if (open) bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | 1 << i % 8);
  }
  forward(input.data(), upper, output.data(), gates.data(), count);
  gates_alone(input.data(), upper, alone.data(), count);
  expect(same(output, wanted), "guided_relu, output", count);
  expect(gates == bits && alone == bits, "guided_relu, gates", count);
  for (int rule = 0; rule < 3; ++rule) {  // the gradient, guided, deconvnet
    for (int64_t i = 0; i < count; ++i) {
      const bool open = bits[i / 8] >> i % 8 & 1, positive = !(gradient[i] <= 0);
      wanted_gradient[i] = (rule == 2 || open) && (rule == 0 || positive) ? gradient[i] : T(0);
    }
    backward(gradient.data(), gates.data(), rule, found.data(), count);
    expect(same(found, wanted_gradient), "guided_relu, backward", count);
  }
}

void grad_cam(int64_t count) {
  std::vector<float> values(count);
  std::vector<double> weights(count), sums(count, 0.25);
  std::mt19937 engine(3);
  double sum = 0, dot = 0, magnitude = 0;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(engine() * 0x1p-31 - 1.0);
    weights[i] = engine() * 0x1p-31 - 1.0;
    sum += values[i];
    dot += weights[i] * values[i];
    magnitude += std::abs(values[i]);
  }
  // two sums of n numbers in some order differ by 2 n eps of the magnitudes; weights are at most 1
  const double bound = 2 * static_cast<double>(count) * std::numeric_limits<double>::epsilon() * magnitude;
  expect(std::abs(grad_cam_baseline.sum(values.data(), count) - sum) <= bound, "grad_cam, sum", count);
  expect(std::abs(grad_cam_baseline.dot(weights.data(), values.data(), count) - dot) <= bound, "grad_cam, dot", count);
  grad_cam_baseline.add_scaled(sums.data(), 0.5, values.data(), count);  // by a half: exact
  bool exact = true;
  for (int64_t i = 0; i < count; ++i) exact = exact && sums[i] == 0.25 + 0.5 * values[i];
  expect(exact, "grad_cam, add_scaled", count);
}

void gaussian_noise(int64_t quads) {
  const NoiseStream stream{0x12345678, 0x9ABCDEF0, 7, 0xDEADBEEF, 0x00C0FFEE};
  const uint32_t first = 0xFFFFFFF0 - static_cast<uint32_t>(quads);
  std::vector<uint32_t> found(4 * quads), wanted(4 * quads);
  for (int64_t quad = 0; quad < quads; ++quad) {
    uint32_t counter[4] = {first + static_cast<uint32_t>(quad), stream.sample, stream.id_low, stream.id_high};
    uint32_t key[2] = {stream.key_low, stream.key_high};
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
      const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                                static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
      std::memcpy(counter, next, sizeof counter);
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    std::memcpy(&wanted[4 * quad], counter, sizeof counter);
  }
  gaussian_noise_baseline.words(stream, first, quads, found.data());
  expect(found == wanted, "gaussian_noise, words", 4 * quads);
}

void depthwise(int64_t channels, int64_t width) {
  const DepthwiseLine line{width, channels, 3, 3, 1, 1, -0.75, 0.75};
  const int64_t across = width + 2;
  std::mt19937 engine(4);
  auto random = [&engine](int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(engine() * 0x1p-31 - 1.0);
    return values;
  };
  const std::vector<float> input = random(3 * across * channels), weight = random(9 * channels),
                           bias = random(channels);
  std::vector<const float*> taps;
  for (int64_t i = 0; i < 3 * across; ++i) taps.push_back(input.data() + i * channels);
  std::vector<float> target(width * channels);
  box_regions_baseline.depthwise(taps.data(), across, line, weight.data(), bias.data(), target.data());
  bool near = true;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = bias[c], magnitude = std::abs(bias[c]);
      for (int64_t p = 0; p < 3; ++p)
        for (int64_t q = 0; q < 3; ++q) {
          const double term = double(weight[(p * 3 + q) * channels + c]) * taps[p * across + j + q][c];
          sum += term;
          magnitude += std::abs(term);
        }
      const double clamped = sum < line.lower ? line.lower : sum > line.upper ? line.upper : sum;
      // ten sums and nine products, each rounded
      near = near && std::abs(target[j * channels + c] - clamped) <= 19 * 0x1p-24 * magnitude;
    }
  expect(near, "box_regions, depthwise", width * channels);
}
}  // namespace

int main() {
  for (const int64_t count : {1, 7, 8, 9, 63, 64, 1000}) {
    const GuidedReluKernels& table = guided_relu_baseline;
    guided_relu<float>(count, table.forward_float, table.gates_float, table.backward_float);
    guided_relu<double>(count, table.forward_double, table.gates_double, table.backward_double);
    grad_cam(count);
    depthwise(count, 5);
  }
  for (const int64_t quads : {16, 64, 1024}) gaussian_noise(quads);
  std::printf("%d of the loops are wrong\n", failures);
  return failures != 0;
}
