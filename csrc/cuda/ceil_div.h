// The number of pieces of a size that cover all, on the host and in kernels.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PYSAL_HOST_DEVICE __host__ __device__
#else
#define PYSAL_HOST_DEVICE
#endif

namespace pysal::cuda {
// all / size, rounded up: all >= 0, size > 0.
PYSAL_HOST_DEVICE constexpr int64_t ceil_div(int64_t all, int64_t size) { return (all + size - 1) / size; }
}  // namespace pysal::cuda

#undef PYSAL_HOST_DEVICE
