// torch's current CUDA stream. Its getter lives in libtorch_cuda.so, which a CPU-only torch lacks, so it cannot be
// linked; and Python loads torch's libraries privately, so it cannot be left undefined either. It is looked up in the
// library that torch has already mapped, at the first launch.
#if !defined(PYSAL_EMU)
#include <dlfcn.h>

#include "torch_cuda.h"

namespace pysal::cuda {
namespace {
using Getter = AOTITorchError (*)(int32_t, void**);

Getter find_getter() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}
}  // namespace

void* current_stream(int32_t device_index) {
  static const Getter getter = find_getter();
  PYSAL_CHECK(getter != nullptr, "pysal: this torch has no CUDA");
  void* stream = nullptr;
  PYSAL_CHECK(getter(device_index, &stream) == 0, "pysal: no current stream on CUDA device ", device_index);
  return stream;
}
}  // namespace pysal::cuda
#endif
