// What the torch glue of CUDA ops needs beyond common/torch_stable.h: device guard, current stream, dtype,
// registration. With -DPYSAL_EMU the same glue registers the emulated kernels as pysal_emu::<op> for CPU tensors.
#pragma once
#include "../common/torch_stable.h"
#include "dtype.h"

#if defined(PYSAL_EMU)
#define PYSAL_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pysal_emu, CPU, m)
#else
#define PYSAL_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pysal, CUDA, m)
#endif

namespace pysal::cuda {
inline DType dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      break;
  }
  PYSAL_CHECK(false, op, ": dtype must be float32, float64, float16 or bfloat16, got ",
              torch::headeronly::toString(tensor.scalar_type()));
  return DType::float32;
}

#if defined(PYSAL_EMU)
inline bool same_device(const Tensor& a, const Tensor& b) { return a.is_cpu() && b.is_cpu(); }

// The tensor's device made current, and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

void* current_stream(int32_t device_index);  // stream.cpp

// The tensor's device made current, and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};
#endif
}  // namespace pysal::cuda
