// The dtypes of the launchers' type-erased pointers.
#pragma once

namespace pysal::cuda {
enum class DType { float32, float64, float16, bfloat16 };
}  // namespace pysal::cuda
