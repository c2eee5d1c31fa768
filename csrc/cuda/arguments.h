// Index and weight tensors of the CUDA glue. Their values stay on the device: what rows outside a batch do is the
// kernels' to say.
#pragma once
#include "torch_cuda.h"

namespace pysal::cuda {
// The tensor, dense, once it is known to hold `count` numbers of the dtype on the device of `like`.
inline Tensor values_on_device(const char* op, const char* argument, const Tensor& values, int64_t count,
                               ScalarType dtype, const Tensor& like) {
  PYSAL_CHECK(same_device(values, like) && values.scalar_type() == dtype && values.numel() == count, "pysal::", op,
              ": ", argument, " must be ", count, " ", torch::headeronly::toString(dtype),
              " on the device of what they go with, got ", values.numel(), " elements of ",
              torch::headeronly::toString(values.scalar_type()));
  return dense(values);
}

inline void check_alike(const char* op, const char* argument, const Tensor& values, const Tensor& like) {
  PYSAL_CHECK(
      same_device(values, like) && values.scalar_type() == like.scalar_type() && values.sizes().equals(like.sizes()),
      "pysal::", op, ": ", argument, " must have the shape, dtype and device of what it goes with");
}

// A dtype that is asked for, as dtype_of has it for a tensor's.
inline DType asked_dtype(const char* op, ScalarType dtype) {
  PYSAL_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                  dtype == ScalarType::BFloat16,
              "pysal::", op, ": dtype must be float32, float64, float16 or bfloat16, got ",
              torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float    ? DType::float32
         : dtype == ScalarType::Double ? DType::float64
         : dtype == ScalarType::Half   ? DType::float16
                                       : DType::bfloat16;
}
}  // namespace pysal::cuda
