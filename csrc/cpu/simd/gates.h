// Gates as bits: of a vector's comparison, and back. For the per-ISA kernels alone, like isa.h.
#pragma once
#include "isa.h"

#if PYSAL_VECTOR_BYTES == 64
#include <immintrin.h>  // whose functions leave no symbols behind
#endif

namespace pysal::cpu {
namespace {
constexpr int kTogether = kLanes < 8 ? 2 : 1;  // vectors whose gates fill whole bytes

// Bit k of the result says whether lane k of a comparison's result is true.
[[maybe_unused]] PYSAL_INLINE unsigned bits_of(vint lanes) {
#if defined(__AVX512DQ__) && PYSAL_VECTOR_BYTES == 64
  typedef int isa_int __attribute__((vector_size(64)));
  return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(reinterpret_cast<isa_int>(lanes)));
#elif defined(__AVX__) && PYSAL_VECTOR_BYTES == 32
  return static_cast<unsigned>(__builtin_ia32_movmskps256(reinterpret_cast<vfloat>(lanes)));
#elif defined(__SSE2__) && PYSAL_VECTOR_BYTES == 16
  return static_cast<unsigned>(__builtin_ia32_movmskps(reinterpret_cast<vfloat>(lanes)));
#else
  unsigned bits = 0;
  for (int64_t k = 0; k < kLanes; ++k) bits |= (lanes[k] & 1u) << k;
  return bits;
#endif
}

// The inverse: lane k is -1 where bit k is set, else 0.
template <class Mask, class Lane, int kCount>
PYSAL_INLINE Mask lanes_of(unsigned bits) {
  Mask lane_bit;
  for (int k = 0; k < kCount; ++k) lane_bit[k] = static_cast<Lane>(1 << k);
  return (lane_bit & static_cast<Lane>(bits)) != 0;
}

// What a gate is closed from: upper, or nothing where that is infinite, as comparisons with NaN are false.
template <class T>
PYSAL_INLINE T gate_bound(T upper) {
  return upper == static_cast<T>(__builtin_inff()) ? static_cast<T>(__builtin_nanf("")) : upper;
}

// Bit k is 0 where lane k is at most 0, or at least the bound: 1 where it is NaN, whose gradient torch lets through,
// too.
[[maybe_unused]] PYSAL_INLINE unsigned gates_of(vfloat x, vfloat bound) {
#if PYSAL_VECTOR_BYTES == 64  // what the compiler makes of the other goes from masks to vectors and back
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  return _mm512_mask_cmp_ps_mask(positive, (__m512)x, (__m512)bound, _CMP_NGE_UQ);
#else
  return bits_of(~((x <= vfloat{}) | (x >= bound)));
#endif
}

// The lanes whose bit is set in `open`, and which are not at most 0 or any sign will do (-1; 0: it will not); 0
// elsewhere.
[[maybe_unused]] PYSAL_INLINE vfloat passed(vfloat x, unsigned open, int any_sign) {
#if PYSAL_VECTOR_BYTES == 64
  const unsigned positive = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  const auto passes = static_cast<__mmask16>(open & (positive | static_cast<unsigned>(any_sign)));
  return (vfloat)_mm512_maskz_mov_ps(passes, (__m512)x);
#else
  const vint passes = lanes_of<vint, int32_t, kLanes>(open) & (~(x <= vfloat{}) | any_sign);
  return passes ? x : vfloat{};
#endif
}
}  // namespace
}  // namespace pysal::cpu
