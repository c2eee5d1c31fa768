// Gates as bits: of a vector's comparison, and back. For the per-ISA kernels alone, like isa.h.
#pragma once
#include "isa.h"

namespace pysal::cpu {
namespace {
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
}  // namespace
}  // namespace pysal::cpu
