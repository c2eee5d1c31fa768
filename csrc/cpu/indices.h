// Index tensors of the CPU kernels: their dtype and shape, and rows that stay inside a batch.
#pragma once
#include "../common/torch_stable.h"

namespace pysal::cpu {
// The tensor, dense, once it is known to hold `count` int32 on the CPU.
inline Tensor int32_values(const char* op, const char* argument, const Tensor& values, int64_t count) {
  PYSAL_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Int && values.numel() == count, "pysal::", op,
              ": ", argument, " must be ", count, " int32 on the CPU, got ", values.numel(), " elements of ",
              torch::headeronly::toString(values.scalar_type()));
  return dense(values);
}

// The same for rows[n], the image of row n, which must be one of `batch`.
inline Tensor image_rows(const char* op, const Tensor& rows, int64_t count, int64_t batch) {
  const Tensor checked = int32_values(op, "rows", rows, count);
  const int32_t* row = checked.const_data_ptr<int32_t>();
  for (int64_t n = 0; n < count; ++n)
    PYSAL_CHECK(row[n] >= 0 && row[n] < batch, "pysal::", op, ": rows must be in [0, ", batch, "), got ", row[n]);
  return checked;
}
}  // namespace pysal::cpu
