// The one header through which device code sees CUDA. nvcc gets a few additions to the language; the host compiler with
// -DPYSAL_EMU gets csrc/emu instead, so that the same .cu files run on a machine without a GPU. Kernels declare
//   PYSAL_SHARED(float, tile, [8][33]);     for   __shared__ float tile[8][33];
//   PYSAL_DYNAMIC_SHARED(float, rows);      for   extern __shared__ float rows[];
// and are started by launch("name", kernel<T>, grid, block, shared_bytes, stream, arguments...).
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ceil_div.h"
#include "dtype.h"

#if defined(PYSAL_EMU)
#include "../emu/cuda_emu.h"
#else
#include <cuda_runtime.h>

#define PYSAL_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define PYSAL_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char pysal_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pysal_dynamic_shared)

namespace pysal::cuda {
inline void check(cudaError_t status, const char* name) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("pysal: CUDA kernel ") + name + ": " + cudaGetErrorString(status));
}

// Starts a kernel on a cudaStream_t. Throws std::runtime_error where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;  // more dynamic shared memory than this must be asked for
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}
}  // namespace pysal::cuda
#endif

namespace pysal::cuda {
// Arithmetic type of a dtype: float, but double for double.
template <class T>
using arithmetic_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body(T()) with the C++ type of the dtype.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(float());
    case DType::float64:
      return body(double());
    case DType::float16:
      return body(c10::Half());
    case DType::bfloat16:
      return body(c10::BFloat16());
  }
}

// The most blocks along a side of a grid: kernels go on in grid-stride loops.
#if defined(PYSAL_EMU)
constexpr int64_t kMaxBlocks = 3;  // so that small cases go round those loops
#else
constexpr int64_t kMaxBlocks = 1 << 15;  // more than a GPU runs at once, so the tail of the last wave stays short
#endif

// Blocks for one thread per item, at most kMaxBlocks.
inline dim3 blocks_for(int64_t items, int64_t block) {
  const int64_t blocks = ceil_div(items, block);
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

// How many elements of the types a thread moves at once: those of a 16-byte word of the widest, so that the threads of
// a warp read and write whole sectors, each a word beside its neighbour's. Of doubles two words: they are for
// comparison.
template <class... Types>
constexpr int kElements = ((sizeof(Types) >= 4) || ...) ? 4 : 8;

// Elements that lie together and are moved as words of 16 bytes, or of 8 where they are no more.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount >= 16 ? 16 : 8) Several {
  T values[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Several<T, kCount> load_several(const T* source) {
  using Word = std::conditional_t<sizeof(T) * kCount >= 16, uint4, uint2>;
  Several<T, kCount> several;
  const Word* const words = reinterpret_cast<const Word*>(source);
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(T) * kCount / sizeof(Word)); ++k)
    reinterpret_cast<Word*>(several.values)[k] = words[k];
  return several;
}

template <int kCount, class T>
__device__ __forceinline__ void store_several(T* target, const Several<T, kCount>& several) {
  using Word = std::conditional_t<sizeof(T) * kCount >= 16, uint4, uint2>;
  Word* const words = reinterpret_cast<Word*>(target);
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(T) * kCount / sizeof(Word)); ++k)
    words[k] = reinterpret_cast<const Word*>(several.values)[k];
}

// A number divided by another, and what remains; most arrays are small enough for 32 bits, which takes a tenth of the
// time.
struct Divided {
  int64_t quotient, remainder;
};
__device__ __forceinline__ Divided divided(int64_t number, int64_t by, bool narrow) {
  if (narrow) {
    const unsigned n = static_cast<unsigned>(number), d = static_cast<unsigned>(by), q = n / d;
    return {q, n - q * d};
  }
  const int64_t q = number / by;
  return {q, number - q * by};
}

// Eight elements, moved as 16-byte words where kAligned says that the address allows it.
template <class T>
struct alignas(16) Eight {
  T values[8];
};

template <bool kAligned, class T>
__device__ __forceinline__ Eight<T> load_eight(const T* source) {
  Eight<T> eight;
  if constexpr (kAligned) {
    const uint4* const words = reinterpret_cast<const uint4*>(source);
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) reinterpret_cast<uint4*>(eight.values)[k] = words[k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) eight.values[k] = source[k];
  }
  return eight;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_eight(T* target, const Eight<T>& eight) {
  if constexpr (kAligned) {
    uint4* const words = reinterpret_cast<uint4*>(target);
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k)
      words[k] = reinterpret_cast<const uint4*>(eight.values)[k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) target[k] = eight.values[k];
  }
}

inline bool aligned_to_16(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}
}  // namespace pysal::cuda
