// What the torch glue of every op needs: the stable ABI's headers, checks, dtype dispatch, allocation.
// Included by csrc/cpu/*.cpp and csrc/cuda/*_op.cpp only; kernels see no torch.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

// Python has refused bad arguments with a readable error before; C++ checks what memory safety needs.
#define PYSAL_CHECK STD_TORCH_CHECK

// Runs a lambda body with scalar_t bound to the dtype. THO_DISPATCH_V2 (2.10 to 2.13) expands its wrapper one
// macro level too early and breaks on a body with a bare comma; SWITCH and CASE are variadic and do not.
#define PYSAL_DISPATCH_FLOATING(TYPE, NAME, ...)                                                  \
  THO_DISPATCH_SWITCH(TYPE, NAME,                                                                 \
                      THO_DISPATCH_CASE(torch::headeronly::ScalarType::Float, __VA_ARGS__)        \
                          THO_DISPATCH_CASE(torch::headeronly::ScalarType::Double, __VA_ARGS__)   \
                              THO_DISPATCH_CASE(torch::headeronly::ScalarType::Half, __VA_ARGS__) \
                                  THO_DISPATCH_CASE(torch::headeronly::ScalarType::BFloat16, __VA_ARGS__))

namespace pysal {
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using FloatList = torch::headeronly::HeaderOnlyArrayRef<double>;

// Arithmetic type of a dtype: float, but double for double.
template <class T>
using arithmetic_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Dense in channels_last order and not also in contiguous order (as with one channel or one pixel).
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// What `make` returns, a new tensor whose sizes are known to be right: all that can fail is the allocation. What
// torch's allocators say of it does not come through the stable ABI; pysal/engine/running/chunks.py knows these words.
template <class Make>
Tensor allocated(int64_t elements, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    PYSAL_CHECK(false, "pysal: out of memory: no room for a tensor of ", elements, " elements");
    throw;
  }
}

// The tensor itself where it is already dense in that order: asking the dispatcher costs microseconds.
inline Tensor dense(const Tensor& t, bool channels_last = false) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  return allocated(t.numel(), [&] { return torch::stable::contiguous(t, memory_format(channels_last)); });
}

// An uninitialised tensor of that shape on the device of `like`, in its dtype unless another is given.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt, bool channels_last = false) {
  constexpr int64_t most = int64_t{1} << 60;
  int64_t elements = 1;  // of all sizes but those that are 0: torch multiplies them for strides, too
  for (const int64_t size : sizes) {
    PYSAL_CHECK(size >= 0 && size <= most / elements,
                "pysal: sizes of a tensor must be at least 0 and have a product below 2^60");
    elements *= std::max<int64_t>(size, 1);
  }
  return allocated(elements, [&] {
    return torch::stable::empty(sizes, dtype.value_or(like.scalar_type()), std::nullopt, like.device(), std::nullopt,
                                memory_format(channels_last));
  });
}
}  // namespace pysal
