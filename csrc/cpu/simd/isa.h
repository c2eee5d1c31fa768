// Included by the per-ISA kernels csrc/cpu/simd/<stem>.cpp, which CMake compiles once per instruction set with
//   -DPYSAL_ISA=avx2 -DPYSAL_VECTOR_BYTES=32 and the ISA's flags.
// These files include no torch and no std:: header and keep everything in an anonymous namespace: an inline function
// compiled for AVX-512 could otherwise be the copy the linker keeps for an older CPU. tests/test_abi.py checks it.
// Each ends by defining its table of functions: PYSAL_TABLE(<Stem>Kernels, <stem>) = {forward, backward};
#pragma once
#include <stdint.h>

#ifndef PYSAL_ISA
#define PYSAL_ISA baseline
#define PYSAL_VECTOR_BYTES 16
#endif
#define PYSAL_JOIN_(a, b) a##_##b
#define PYSAL_JOIN(a, b) PYSAL_JOIN_(a, b)
#define PYSAL_TABLE(Table, stem) const Table PYSAL_JOIN(stem, PYSAL_ISA)
#define PYSAL_INLINE inline __attribute__((always_inline))

namespace pysal::cpu {
namespace {
constexpr int64_t kLanes = PYSAL_VECTOR_BYTES / 4;  // floats in a vector
constexpr int64_t kDoubleLanes = PYSAL_VECTOR_BYTES / 8;

// GCC and Clang vector extensions: arithmetic, comparison (lanes of -1 and 0) and ?: work lane by lane.
typedef float vfloat __attribute__((vector_size(PYSAL_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(PYSAL_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(PYSAL_VECTOR_BYTES)));
typedef float vfloat_memory __attribute__((vector_size(PYSAL_VECTOR_BYTES), aligned(4), may_alias));
typedef double vdouble_memory __attribute__((vector_size(PYSAL_VECTOR_BYTES), aligned(8), may_alias));

[[maybe_unused]] PYSAL_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_memory*>(p); }
[[maybe_unused]] PYSAL_INLINE vdouble load(const double* p) { return *reinterpret_cast<const vdouble_memory*>(p); }
[[maybe_unused]] PYSAL_INLINE void store(float* p, vfloat v) { *reinterpret_cast<vfloat_memory*>(p) = v; }
[[maybe_unused]] PYSAL_INLINE void store(double* p, vdouble v) { *reinterpret_cast<vdouble_memory*>(p) = v; }
[[maybe_unused]] PYSAL_INLINE vfloat broadcast(float value) { return value - vfloat{}; }
[[maybe_unused]] PYSAL_INLINE vdouble broadcast(double value) { return value - vdouble{}; }
}  // namespace
}  // namespace pysal::cpu
