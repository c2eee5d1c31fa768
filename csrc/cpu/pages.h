// Fresh memory for large outputs. malloc maps anything over 32 MiB anew on every call, and touching such memory 4 KiB
// at a time takes longer than writing it; 2 MiB pages are faulted in 512 times less often.
#pragma once
#include "../common/torch_stable.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pysal::cpu {
// Asks for large pages under a tensor that is about to be written from end to end; a hint, without effect elsewhere.
inline void prefer_large_pages([[maybe_unused]] const Tensor& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + static_cast<uintptr_t>(out.numel()) * out.element_size()) / kPage * kPage;
  if (last >= first + 4 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
}  // namespace pysal::cpu
