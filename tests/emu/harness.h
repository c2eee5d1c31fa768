// What the torch-free tests of the emulated kernels share: tests/emu/<stem>.cpp hold CASE(name) { ... } with
// EXPECT(...).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>

namespace emu_test {
struct Case {
  Case(const char* name, void (*run)());
  const char* name;
  void (*run)();
  const Case* next;
};
void failed(const char* condition, const char* file, int line, const std::string& detail);

// An exact-size heap block, so that ASan sees its end; uniform in [-1, 1).
template <class T>
std::unique_ptr<T[]> random(size_t count, unsigned seed = 1) {
  std::unique_ptr<T[]> values(new T[count]);
  std::mt19937 engine(seed);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<T>(static_cast<float>(engine()) * 0x1p-31f - 1.0f);
  return values;
}

// The same without values: NaN, so that an element nobody writes is seen.
template <class T>
std::unique_ptr<T[]> unwritten(size_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<T>(NAN);
  return values;
}

// How many elements inputs and outputs lie past an address that 16-byte words may have.
struct Offsets {
  size_t in, out;
};
constexpr Offsets kOffsets[] = {{0, 0}, {1, 1}, {1, 0}, {0, 1}};
}  // namespace emu_test

#define EMU_TEST_JOIN_(a, b) a##b
#define EMU_TEST_JOIN(a, b) EMU_TEST_JOIN_(a, b)
#define CASE(name)                                                       \
  static void name();                                                    \
  static const ::emu_test::Case EMU_TEST_JOIN(case_, name)(#name, name); \
  static void name()
// EXPECT(condition) or EXPECT(condition, detail as std::string)
#define EXPECT(condition, ...) \
  ((condition) ? static_cast<void>(0) : ::emu_test::failed(#condition, __FILE__, __LINE__, std::string(__VA_ARGS__)))
