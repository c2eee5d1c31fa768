// The scheduler behind cuda_emu.h. A TSan build defines PYSAL_EMU_TSAN and leaves this file uninstrumented: only what
// kernels do is looked at.
#include "cuda_emu.h"

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PYSAL_EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace pysal::emu {
Context* context = nullptr;

namespace {
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSlotBytes = 16;               // largest value a warp operation moves
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of a block, on the GPUs that have most
constexpr unsigned kMaxThreads = 1024;          // of a block

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {  // one CUDA thread
  Context context;
  ucontext_t machine;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::ready;
  unsigned mask = 0;      // lanes of the warp operation it waits in
  const char* file = "";  // where it waits
  int line = 0;
  unsigned exchanges = 0;  // parity picks the bank of slots: one barrier per exchange is enough
  unsigned block_barriers = 0, warp_barriers = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct SharedBlock {  // exact-size heap block, so that ASan sees an overrun; all ones is NaN, or -1
  const char* file;
  int line;
  size_t bytes;
  std::unique_ptr<void, void (*)(void*)> memory;
  SharedBlock(const char* file_, int line_, size_t bytes_)
      : file(file_), line(line_), bytes(bytes_), memory(std::malloc(bytes_ ? bytes_ : 1), std::free) {
    std::memset(memory.get(), 0xff, bytes);
  }
};

struct Unwind {};  // thrown into the fibers that are left when one has failed

std::mutex launches;  // one at a time
unsigned order_of_threads = 0;
int64_t launched_so_far = 0;
const char* kernel = "";
const std::function<void()>* body = nullptr;
std::vector<std::unique_ptr<Fiber>> pool;
std::vector<Fiber*> fibers;  // of the current block
Fiber* running = nullptr;
ucontext_t scheduler;
std::exception_ptr failure;
std::vector<SharedBlock> shared;  // of the current block: dynamic, exchange slots, then the static ones

// ---- what the sanitizers must know. TSan's tokens carry the happens-before edges: start of the launch -> thread ->
// end of the launch, and barriers. A thread may reach barrier n + 1 before another has left n, hence two tokens in
// turn; and nothing may order the threads of different blocks, hence tokens per block.
#if defined(PYSAL_EMU_TSAN)
constexpr unsigned kBlockTokens = 64;
char start_token, end_token, block_tokens[kBlockTokens][2], warp_tokens[kBlockTokens][kMaxThreads / kWarp][2];
unsigned block_number = 0;
void* scheduler_fiber = nullptr;
std::vector<SharedBlock> retired;  // freed after the launch: a reused address would look like a race
#endif
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;
#endif

void acquire([[maybe_unused]] void* token) {
#if defined(PYSAL_EMU_TSAN)
  __tsan_acquire(token);
#endif
}
void release([[maybe_unused]] void* token) {
#if defined(PYSAL_EMU_TSAN)
  __tsan_release(token);
#endif
}
void* block_token([[maybe_unused]] unsigned barrier) {
#if defined(PYSAL_EMU_TSAN)
  return &block_tokens[block_number % kBlockTokens][barrier & 1];
#else
  return nullptr;
#endif
}
void* warp_token([[maybe_unused]] unsigned barrier) {
#if defined(PYSAL_EMU_TSAN)
  return &warp_tokens[block_number % kBlockTokens][running->context.linear / kWarp][barrier & 1];
#else
  return nullptr;
#endif
}

// ---- messages
[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error("cuda_emu: " + std::string(kernel) + ": " + message);
}
std::string triple(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
std::string name_of(const Fiber* fiber) {
  return "thread " + triple(fiber->context.thread) + " of block " + triple(fiber->context.block);
}
std::string place(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

// ---- switching between the scheduler and the fibers
void to_scheduler([[maybe_unused]] bool last_time) {
  Fiber* const self = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last_time ? nullptr : &self->asan_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#if defined(PYSAL_EMU_TSAN)
  __tsan_switch_to_fiber(scheduler_fiber, 1);  // 1: the switch itself orders nothing
#endif
  swapcontext(&self->machine, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
  if (failure) throw Unwind();
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
#if defined(PYSAL_EMU_TSAN)
  acquire(&start_token);
#endif
  try {
    (*body)();
  } catch (const Unwind&) {
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
#if defined(PYSAL_EMU_TSAN)
  release(&end_token);
#endif
  running->state = State::done;
  to_scheduler(true);
  std::abort();  // nobody resumes a thread that is done
}

void resume(Fiber* fiber) {
  running = fiber;
  context = &fiber->context;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack.get(), kStackBytes);
#endif
#if defined(PYSAL_EMU_TSAN)
  __tsan_switch_to_fiber(fiber->tsan_fiber, 1);
#endif
  swapcontext(&scheduler, &fiber->machine);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
  context = nullptr;
}

// ---- barriers
void release_block_barrier() {
  const Fiber* waiting = nullptr;
  size_t returned = 0;
  for (const Fiber* fiber : fibers) {
    if (fiber->state == State::done) {
      ++returned;
      continue;
    }
    if (waiting && (waiting->line != fiber->line || std::strcmp(waiting->file, fiber->file) != 0))
      fail("threads of one block wait at two barriers, " + place(waiting->file, waiting->line) + " and " +
           place(fiber->file, fiber->line));
    waiting = fiber;
  }
  if (returned)
    fail("barrier " + place(waiting->file, waiting->line) + " is not reached by " + std::to_string(returned) +
         " threads that have returned; " + name_of(waiting) + " waits");
  for (Fiber* fiber : fibers) fiber->state = State::ready;
}

// Lets go the lanes of a warp that wait in one operation, once every lane of its mask does.
bool release_warp_barriers(size_t warp) {
  const size_t begin = warp * kWarp, end = std::min(begin + kWarp, fibers.size());
  bool released = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i]->state != State::at_warp_barrier) continue;
    const unsigned mask = fibers[i]->mask;
    bool complete = true;
    for (size_t k = 0; k < size_t(kWarp); ++k)
      if (mask >> k & 1)
        complete = complete && begin + k < end && fibers[begin + k]->state == State::at_warp_barrier &&
                   fibers[begin + k]->mask == mask;
    if (!complete) continue;
    for (size_t k = begin; k < end; ++k)
      if (mask >> (k - begin) & 1) fibers[k]->state = State::ready;
    released = true;
  }
  return released;
}

[[noreturn]] void fail_deadlock() {
  std::string message = "deadlock:";
  int shown = 0;
  for (const Fiber* fiber : fibers)
    if (fiber->state != State::done && shown++ < 4)
      message += " " + name_of(fiber) + " waits at " + place(fiber->file, fiber->line) + ";";
  fail(message);
}

// ---- one block
void set_up_block(dim3 grid, dim3 block, dim3 block_index, size_t shared_bytes) {
  const unsigned count = block.x * block.y * block.z;
  size_t first = 0;
#if defined(PYSAL_EMU_TSAN)
  for (SharedBlock& old : shared) retired.push_back(std::move(old));
  ++block_number;
  first = block_number % 2 * kMaxThreads;  // other fibers than the last block's, else thread i of both is one thread
#endif
  shared.clear();
  shared.emplace_back("", 0, shared_bytes);
  shared.emplace_back("", 0, (count + kWarp - 1) / kWarp * 2 * kWarp * kSlotBytes);
  while (pool.size() < first + count) pool.push_back(std::make_unique<Fiber>());
  fibers.clear();
  for (unsigned i = 0; i < count; ++i) {
    Fiber* const fiber = pool[first + i].get();
    fiber->context = {dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y)),
                      block_index,
                      block,
                      grid,
                      static_cast<int>(i),
                      static_cast<int>(i % kWarp)};
    fiber->state = State::ready;
    fiber->exchanges = fiber->block_barriers = fiber->warp_barriers = 0;
    fiber->asan_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber->stack.get(), kStackBytes);
#endif
#if defined(PYSAL_EMU_TSAN)
    if (!fiber->tsan_fiber) fiber->tsan_fiber = __tsan_create_fiber(0);
#endif
    getcontext(&fiber->machine);
    fiber->machine.uc_stack.ss_sp = fiber->stack.get();
    fiber->machine.uc_stack.ss_size = kStackBytes;
    fiber->machine.uc_link = nullptr;
    makecontext(&fiber->machine, fiber_main, 0);
    fibers.push_back(fiber);
  }
#if defined(PYSAL_EMU_TSAN)
  release(&start_token);
#endif
}

// Lets every ready thread run once; returns whether any did.
bool run_ready(std::vector<unsigned>& sequence, std::mt19937& random) {
  if (order_of_threads > 1) std::shuffle(sequence.begin(), sequence.end(), random);
  bool progress = false;
  for (const unsigned i : sequence) {
    if (fibers[i]->state != State::ready) continue;
    resume(fibers[i]);
    progress = true;
    if (failure) break;
  }
  return progress;
}

bool any_in(State state) {
  return std::any_of(fibers.begin(), fibers.end(), [&](const Fiber* fiber) { return fiber->state == state; });
}

void run_block() {
  std::vector<unsigned> sequence(fibers.size());
  std::iota(sequence.begin(), sequence.end(), 0u);
  if (order_of_threads == 1) std::reverse(sequence.begin(), sequence.end());
  const dim3 index = fibers.front()->context.block;
  std::mt19937 random(order_of_threads * 7919u + index.x + 131 * index.y + 17389 * index.z);
  failure = nullptr;
  while (!failure) {
    bool progress = run_ready(sequence, random);
    if (failure) break;
    for (size_t warp = 0; warp * kWarp < fibers.size(); ++warp) progress |= release_warp_barriers(warp);
    if (progress) continue;
    if (!any_in(State::at_block_barrier) && !any_in(State::at_warp_barrier)) return;
    try {
      if (any_in(State::at_warp_barrier)) fail_deadlock();
      release_block_barrier();
    } catch (...) {
      failure = std::current_exception();
    }
  }
  for (Fiber* fiber : fibers)  // unwind what is suspended, so that its destructors run
    if (fiber->state == State::at_block_barrier || fiber->state == State::at_warp_barrier) resume(fiber);
  std::rethrow_exception(failure);
}

unsigned char* slot(int lane) {  // [warp][bank][lane]
  const size_t warp = static_cast<size_t>(running->context.linear / kWarp);
  const size_t index = (warp * 2 + (running->exchanges & 1)) * kWarp + static_cast<size_t>(lane);
  return static_cast<unsigned char*>(shared[1].memory.get()) + index * kSlotBytes;
}

int lanes_in_warp() {
  const int begin = running->context.linear / kWarp * kWarp;
  return std::min(kWarp, static_cast<int>(fibers.size()) - begin);
}

void wait(State state, const char* file, int line) {
  running->state = state;
  running->file = file;
  running->line = line;
  to_scheduler(false);
}
}  // namespace

void set_order(unsigned order) { order_of_threads = order; }
int64_t launched() { return launched_so_far; }

void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launches);
  ++launched_so_far;
  kernel = name;
  body = &thread;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) fail("no GPU has blocks of " + triple(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("no GPU has a grid of " + triple(grid) + " blocks");
  if (shared_bytes > kMaxSharedBytes) fail("no GPU has " + std::to_string(shared_bytes) + " bytes of shared memory");
#if defined(PYSAL_EMU_TSAN)
  scheduler_fiber = __tsan_get_current_fiber();
  struct End {
    ~End() {
      acquire(&end_token);
      retired.clear();
    }
  } const end;
#endif
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order_of_threads == 1 ? blocks - 1 - i : i;
    const dim3 index(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / (uint64_t(grid.x) * grid.y)));
    set_up_block(grid, block, index, shared_bytes);
    run_block();
  }
}

void* dynamic_shared() { return shared.front().memory.get(); }

void* static_shared(const char* file, int line, size_t bytes) {
  void* memory = nullptr;
  for (const SharedBlock& block : shared)
    if (block.line == line && block.bytes == bytes && std::strcmp(block.file, file) == 0) memory = block.memory.get();
  if (memory == nullptr) {
    shared.emplace_back(file, line, bytes);
    memory = shared.back().memory.get();
    release(memory);  // the filling of it comes before every thread's use
  }
  acquire(memory);
  return memory;
}

void sync_block(const char* file, int line) {
  void* const token = block_token(running->block_barriers++);
  release(token);
  wait(State::at_block_barrier, file, line);
  acquire(token);
}

void sync_warp(unsigned mask, const char* file, int line) {
  const int lanes = lanes_in_warp();
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> running->context.lane & 1)) fail(place(file, line) + ": " + name_of(running) + " is not in its mask");
  running->mask = mask;
  void* const token = warp_token(running->warp_barriers++);
  release(token);
  wait(State::at_warp_barrier, file, line);
  acquire(token);
}

void exchange(unsigned mask, const void* value, void* result, size_t bytes, int source, const char* file, int line) {
  std::memcpy(slot(running->context.lane), value, bytes);
  sync_warp(mask, file, line);
  if (source >= lanes_in_warp() || !(mask >> source & 1))
    fail(place(file, line) + ": " + name_of(running) + " reads lane " + std::to_string(source) +
         ", which takes no part");
  std::memcpy(result, slot(source), bytes);
  ++running->exchanges;
}

unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  *slot(running->context.lane) = predicate;
  sync_warp(mask, file, line);
  unsigned votes = 0;
  for (int lane = 0; lane < lanes_in_warp(); ++lane)
    if (mask >> lane & 1) votes |= static_cast<unsigned>(*slot(lane)) << lane;
  ++running->exchanges;
  return votes;
}
}  // namespace pysal::emu

// For tests that hold only a handle of the library.
extern "C" __attribute__((visibility("default"))) void pysal_emu_set_order(unsigned order) {
  pysal::emu::set_order(order);
}
