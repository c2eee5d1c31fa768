// Images in contiguous or channels_last order: where an element of the one lies in the other, and moving eight at once.
#pragma once
#include "cuda_lang.h"

namespace pysal::cuda {
struct Layout {
  int64_t channels, pixels;
  bool from_last, to_last;  // channels_last instead of contiguous

  __host__ __device__ int64_t size() const { return channels * pixels; }

  // The place in order `from` of the element at `place` in order `to`.
  __device__ __forceinline__ int64_t source(int64_t place) const {
    if (from_last == to_last) return place;
    return to_last ? place % channels * pixels + place / channels : place % pixels * channels + place / pixels;
  }
};

// kCount elements of an image, 8, 4 or 1, from `place` in order `to`. words: they lie together and are aligned.
template <int kCount, class A, class T>
__device__ __forceinline__ void load_elements(const T* __restrict__ image, const Layout& layout, int64_t place,
                                              bool words, A* values) {
  if constexpr (kCount > 1) {
    if (words) {
      const Several<T, kCount> several = load_several<kCount>(image + place);
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = static_cast<A>(several.values[k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = static_cast<A>(image[layout.source(place + k)]);
}

// Rounds through the target's arithmetic type, as torch does from double to 16 bits.
template <int kCount, class T, class A>
__device__ __forceinline__ void store_elements(T* __restrict__ target, const A* values) {
  if constexpr (kCount > 1) {
    Several<T, kCount> several;
#pragma unroll
    for (int k = 0; k < kCount; ++k) several.values[k] = static_cast<T>(static_cast<arithmetic_t<T>>(values[k]));
    store_several<kCount>(target, several);
  } else {
    *target = static_cast<T>(static_cast<arithmetic_t<T>>(*values));
  }
}

inline bool aligned_to_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }
}  // namespace pysal::cuda
