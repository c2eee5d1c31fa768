// What kernels translated from PTX call: registers read as the type that an instruction names, memory, arithmetic that
// C++ lacks, and the threads of a block. translate.py writes the code, runtime.cpp has the rest.
#pragma once
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Fiber;

struct Thread {
  uint32_t tid[3], ntid[3], ctaid[3], nctaid[3];
  void** arguments;
  uint8_t* shared_memory;  // of the block
  uint64_t shared_bytes;
  Fiber* fiber;
  const char* kernel;

  // `where` is the number of the instruction in its kernel.
  void meet_block(int where);
  void meet_warp(uint32_t lanes, int where);
  uint32_t ballot(bool vote, uint32_t lanes, int where);
  uint32_t butterfly(uint32_t value, uint32_t bits, uint32_t lanes, int where);
  [[noreturn]] void fault(const char* what, uint64_t address, int bytes, int where);

  // A GPU faults where an access is not aligned to its size; 4096 is what no allocation reaches.
  void check_global(uint64_t address, int bytes, int where) {
    if (__builtin_expect(address < 4096 || address % bytes != 0, 0))
      fault("misaligned or null global access", address, bytes, where);
  }
  void check_shared(uint64_t address, int bytes, int where) {
    if (__builtin_expect(address % bytes != 0 || address + bytes > shared_bytes, 0))
      fault("shared access misaligned or outside", address, bytes, where);
  }
  uint64_t shared(uint64_t address) const { return reinterpret_cast<uint64_t>(shared_memory) + address; }
};

struct Kernel {
  const char* name;
  void (*run)(Thread&);
  bool waits;             // whether threads meet in it
  unsigned shared_bytes;  // of its static shared memory
  unsigned most_threads;  // of a block, 0: as many as any
};
struct Registrar {
  Registrar(const Kernel* kernels, size_t count);
};

// A register is read, and written, as a type of its width, or a narrower or wider whole number.
template <class T, class R>
T read(R value) {
  if constexpr (sizeof(T) == sizeof(R)) {
    T found;
    std::memcpy(&found, &value, sizeof(T));
    return found;
  } else {
    static_assert(std::is_integral_v<T> && std::is_integral_v<R>);
    return static_cast<T>(value);
  }
}
template <class T, class R>
void write(R& target, T value) {
  target = read<R>(value);
}
inline void write(bool& target, bool value) { target = value; }

template <class T>
T load(uint64_t address) {
  T found;
  std::memcpy(&found, reinterpret_cast<const void*>(address), sizeof(T));
  return found;
}
template <class T>
void store(uint64_t address, T value) {
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
}

// Division by zero, and of the lowest number by -1, are no errors on a GPU.
template <class T>
T quotient(T a, T b) {
  return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0 - uint64_t(a)) : T(a / b);
}
template <class T>
T remainder_of(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
inline float add_towards_zero(float a, float b) {
  volatile float one = a, other = b;
  std::fesetround(FE_TOWARDZERO);
  volatile float sum = one + other;
  std::fesetround(FE_TONEAREST);
  return sum;
}
// What rcp.approx.ftz.f64 promises: the high half of the result, from which division goes on.
inline double rough_reciprocal(double x) {
  const uint64_t bits = read<uint64_t>(1.0 / x) & 0xffffffff00000000u;
  return read<double>(bits);
}
// .rm: towards minus infinity.
inline float fma_down(float a, float b, float c) {
  volatile float one = a, two = b, three = c;
  std::fesetround(FE_DOWNWARD);
  volatile float sum = std::fma(one, two, three);
  std::fesetround(FE_TONEAREST);
  return sum;
}
// .sat: between 0 and 1, and 0 for NaN.
inline float saturated(float x) { return x >= 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }
// .ftz: what is below the smallest normal number is 0 of its sign, given or found.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float power_of_two(float x) { return flushed(std::exp2(flushed(x))); }
inline float flushed_reciprocal(float x) { return flushed(1.0f / flushed(x)); }

Half half_of(float value);
float float_of(Half value);
inline BFloat16 bfloat16_of(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = read<uint32_t>(value);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float float_of(BFloat16 value) { return read<float>(uint32_t(value.bits) << 16); }

template <class To, class Of>
To converted(Of value) {
  if constexpr (std::is_same_v<Of, To>)
    return value;
  else if constexpr (std::is_same_v<Of, Half> || std::is_same_v<Of, BFloat16>)
    return converted<To>(float_of(value));
  else if constexpr (std::is_same_v<To, Half>)
    return half_of(static_cast<float>(value));
  else if constexpr (std::is_same_v<To, BFloat16>)
    return bfloat16_of(static_cast<float>(value));
  else
    return static_cast<To>(value);
}
// Towards zero, and to the nearest there is where the number is out of range.
template <class T, class F>
T whole(F value) {
  constexpr long double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  const long double cut = std::trunc(static_cast<long double>(value));
  return std::isnan(value) ? T(0)
         : cut <= low      ? std::numeric_limits<T>::min()
         : cut >= high     ? std::numeric_limits<T>::max()
                           : T(cut);
}

inline uint32_t popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t bfind(uint32_t x) { return x ? __builtin_clz(x) : 0xffffffffu; }  // .shiftamt
inline uint32_t brev(uint32_t x) {
  uint32_t found = 0;
  for (int bit = 0; bit < 32; ++bit) found |= (x >> bit & 1u) << (31 - bit);
  return found;
}
inline uint32_t bfi(uint32_t a, uint32_t b, uint32_t place, uint32_t length) {
  const uint32_t mask = (length >= 32 ? 0xffffffffu : (1u << length) - 1) << place;
  return (b & ~mask) | (a << place & mask);
}
inline uint32_t bfe(uint32_t a, uint32_t place, uint32_t length) {
  return place >= 32 ? 0 : a >> place & (length >= 32 ? 0xffffffffu : (1u << length) - 1);
}
