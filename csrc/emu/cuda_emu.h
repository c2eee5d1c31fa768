// Runs CUDA kernels on the CPU, for tests. The threads of a block are fibers on one OS thread; each runs until it
// reaches
// __syncthreads() or a warp operation. The order in which ready threads go on is set_order's: 0 forward, 1 reverse, n >
// 1 shuffled with that seed, so that a missing barrier shows in the result. Reported as an exception: barriers that not
// all threads reach, warp operations with absent lanes, launches no GPU accepts. Shared memory is a heap block of its
// exact size, filled with NaN for each block of threads. The fibers are announced to ASan and TSan; under TSan every
// CUDA thread is a thread of its own, so two that touch one word with no barrier between them are reported as a race.
// Not covered: speed, tensor cores, cp.async, TMA, inline PTX, cooperative groups, textures.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace pysal::emu {
constexpr int kWarp = 32;

struct Context {  // what a CUDA thread knows of itself
  dim3 thread, block, block_dim, grid_dim;
  int linear, lane;
};
extern Context* context;

void set_order(unsigned order);
int64_t launched();  // kernels so far
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

void* static_shared(const char* file, int line, size_t bytes);
void* dynamic_shared();
void sync_block(const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);
// Hands over `bytes` of value to the warp; result is what lane `source` handed over.
void exchange(unsigned mask, const void* value, void* result, size_t bytes, int source, const char* file, int line);
unsigned ballot(unsigned mask, bool predicate, const char* file, int line);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(std::is_arithmetic_v<T>, "shuffles move numbers");
  T result = value;
  exchange(mask, &value, &result, sizeof(T), source, file, line);
  return result;
}
}  // namespace pysal::emu

#define PYSAL_SHARED(T, name, ...)          \
  using name##_shared_type = T __VA_ARGS__; \
  name##_shared_type& name =                \
      *static_cast<name##_shared_type*>(::pysal::emu::static_shared(__FILE__, __LINE__, sizeof(name##_shared_type)))
#define PYSAL_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::pysal::emu::dynamic_shared())

#define threadIdx (::pysal::emu::context->thread)
#define blockIdx (::pysal::emu::context->block)
#define blockDim (::pysal::emu::context->block_dim)
#define gridDim (::pysal::emu::context->grid_dim)
constexpr int warpSize = ::pysal::emu::kWarp;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::pysal::emu::sync_block(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::pysal::emu::sync_warp(mask, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const int base = ::pysal::emu::context->lane & ~(width - 1);
  return ::pysal::emu::shuffle(mask, value, base + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int lane = ::pysal::emu::context->lane, within = lane & (width - 1), step = static_cast<int>(delta);
  return ::pysal::emu::shuffle(mask, value, within + step < width ? lane + step : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int lane = ::pysal::emu::context->lane, within = lane & (width - 1), step = static_cast<int>(delta);
  return ::pysal::emu::shuffle(mask, value, within >= step ? lane - step : lane, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int lane = ::pysal::emu::context->lane, other = lane ^ bits;
  const bool same_group = (other & ~(width - 1)) == (lane & ~(width - 1));
  return ::pysal::emu::shuffle(mask, value, same_group ? other : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return ::pysal::emu::ballot(mask, predicate, file, line);
}
inline bool __any_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return ::pysal::emu::ballot(mask, predicate, file, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return ::pysal::emu::ballot(mask, !predicate, file, line) == 0;
}

// Fibers share one OS thread, so any read-modify-write is atomic among them; the builtins tell TSan that it is meant
// so.
template <class T, class Combine>
T pysal_emu_atomic(T* address, Combine combine) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do next = combine(old);
  while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return pysal_emu_atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return pysal_emu_atomic(address, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return pysal_emu_atomic(address, [&](T old) { return std::min(old, value); });
}

using std::max;
using std::min;
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
// As the CUDA functions, exact where 2 x is whole; the argument is reduced first, as pi x is not representable.
inline void sincospi(double x, double* sine, double* cosine) {
  constexpr double kPi = 3.14159265358979323846;
  const double quarters = std::nearbyint(2.0 * x), rest = kPi * (x - 0.5 * quarters);
  const double s = std::sin(rest), c = std::cos(rest);
  const int quadrant = static_cast<int>(std::fmod(quarters, 4.0)) & 3;
  *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
  *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}
inline void sincospif(float x, float* sine, float* cosine) {
  double s, c;
  sincospi(x, &s, &c);
  *sine = static_cast<float>(s);
  *cosine = static_cast<float>(c);
}

namespace pysal::cuda {
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            void* /*stream*/, const Arguments&... arguments) {
  ::pysal::emu::run(name, grid, block, shared_bytes, [&] { kernel(arguments...); });
}
}  // namespace pysal::cuda
