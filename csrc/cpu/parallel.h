// Loops over tasks in several threads.
#pragma once
#include <atomic>
#include <new>

#include "../common/torch_stable.h"

namespace pysal::cpu {
// Calls body(begin, end) over parts of [begin, end). A thread that finds no memory for what it computes in ends its
// part, and the call says so once all have ended: an exception must not leave a thread.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      body(from, to);
    } catch (const std::bad_alloc&) {
      failed.store(true, std::memory_order_relaxed);
    }
  });
  PYSAL_CHECK(!failed.load(), "pysal: out of memory: no room for what a thread computes in");
}
}  // namespace pysal::cpu
