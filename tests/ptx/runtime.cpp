// Stands for the CUDA runtime: kernels that nvcc compiled to PTX, translated to C++ by translate.py, start here on the
// CPU when the launchers of csrc/cuda, compiled by nvcc as for a GPU, ask the runtime for them. The threads of a block
// in which threads meet are fibers, which run in the order that set_order says, as in csrc/emu; elsewhere they run one
// after the other. A fault ends the launch, and cudaGetLastError says which.
#include <cuda_runtime_api.h>
#include <immintrin.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

Half half_of(float value) { return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))}; }
float float_of(Half value) { return _cvtsh_ss(value.bits); }

namespace {
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu, kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;

enum class State { ready, at_block, at_warp, done };
enum class Meeting { none, ballot, butterfly };

struct Call {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
struct Stop {};  // ends a thread that is no fiber

std::map<std::string, const Kernel*>& kernels() {
  static std::map<std::string, const Kernel*> found;
  return found;
}
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

std::vector<Call> calls;
std::string failure;  // of the last launch, until it is asked for
unsigned order_of_threads = 0;
int64_t launched_so_far = 0;
ucontext_t scheduler;
std::mutex launches;
const Kernel* running = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif
}  // namespace

struct Fiber {
  Thread thread;
  ucontext_t machine;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::ready;
  Meeting meeting = Meeting::none;
  int where = 0;
  uint32_t value = 0, bits = 0, lanes = 0, result = 0;
};

namespace {
std::vector<std::unique_ptr<Fiber>> pool;
Fiber* current = nullptr;

void to_scheduler(Fiber* fiber, State state) {
  fiber->state = state;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&fiber->machine, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  running->run(current->thread);
  to_scheduler(current, State::done);
  std::abort();  // nobody resumes a thread that is done
}

void resume(Fiber* fiber) {
  current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber->stack.get(), kStackBytes);
#endif
  swapcontext(&scheduler, &fiber->machine);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// What a warp has met for is done once all its lanes are there; false: some are still on their way.
bool met_in_warp(unsigned first, unsigned threads) {
  const unsigned lanes = std::min(kWarp, threads - first);
  unsigned there = 0, coming = 0;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    there += pool[first + lane]->state == State::at_warp;
    coming += pool[first + lane]->state == State::ready;
  }
  if (there == 0 || coming != 0) return false;
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = *pool[first + lane];
    if (fiber.state != State::at_warp) throw std::runtime_error("lanes absent from a warp operation");
    if (fiber.where != pool[first]->where) throw std::runtime_error("lanes of a warp at different operations");
    if (fiber.lanes != kAllLanes) throw std::runtime_error("a warp operation without all lanes");
    votes |= (fiber.value & 1u) << lane;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = *pool[first + lane];
    if (fiber.meeting == Meeting::ballot) fiber.result = votes;
    if (fiber.meeting == Meeting::butterfly) fiber.result = pool[first + (lane ^ fiber.bits) % lanes]->value;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) pool[first + lane]->state = State::ready;
  return true;
}

void met_in_block(unsigned threads) {
  int where = -1;
  unsigned there = 0;
  for (unsigned i = 0; i < threads; ++i) {
    if (pool[i]->state != State::at_block) continue;
    if (where >= 0 && pool[i]->where != where) throw std::runtime_error("threads at different barriers");
    where = pool[i]->where;
    ++there;
  }
  if (there != threads) throw std::runtime_error("a barrier that some threads do not reach");
  for (unsigned i = 0; i < threads; ++i) pool[i]->state = State::ready;
}

void run_block(const Thread& prototype, unsigned threads) {
  while (pool.size() < threads) pool.emplace_back(new Fiber);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *pool[i];
    fiber.thread = prototype;
    fiber.thread.tid[0] = i;
    fiber.thread.fiber = &fiber;
    fiber.state = State::ready;
    getcontext(&fiber.machine);
    fiber.machine.uc_stack.ss_sp = fiber.stack.get();
    fiber.machine.uc_stack.ss_size = kStackBytes;
    fiber.machine.uc_link = nullptr;
    makecontext(&fiber.machine, fiber_main, 0);
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (order_of_threads == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(order_of_threads);
  for (;;) {
    if (order_of_threads > 1) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order)
      if (pool[i]->state == State::ready) {
        resume(pool[i].get());
        if (!failure.empty()) return;
      }
    bool met = false;
    for (unsigned first = 0; first < threads; first += kWarp) met |= met_in_warp(first, threads);
    if (met) continue;
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) done += pool[i]->state == State::done;
    if (done == threads) return;
    met_in_block(threads);
  }
}

void run(const Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes) {
  const unsigned threads = block.x * block.y * block.z, most = kernel.most_threads ? kernel.most_threads : kMaxThreads;
  if (block.y != 1 || block.z != 1 || threads == 0 || threads > most) throw std::runtime_error("no such block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("no such grid");
  const size_t bytes = kernel.shared_bytes + dynamic_bytes;
  if (bytes > kMaxSharedBytes) throw std::runtime_error("too much shared memory");
  const std::unique_ptr<uint8_t[]> shared(new uint8_t[bytes]);  // its exact size, so that ASan sees an overrun
  Thread thread{};
  thread.ntid[0] = block.x, thread.ntid[1] = thread.ntid[2] = 1;
  thread.nctaid[0] = grid.x, thread.nctaid[1] = grid.y, thread.nctaid[2] = grid.z;
  thread.arguments = arguments;
  thread.shared_memory = shared.get();
  thread.shared_bytes = bytes;
  thread.kernel = kernel.name;
  running = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(shared.get(), 0xff, bytes);  // NaN, or -1
        thread.ctaid[0] = x, thread.ctaid[1] = y, thread.ctaid[2] = z;
        if (kernel.waits) {
          run_block(thread, threads);
        } else {
          for (unsigned i = 0; i < threads && failure.empty(); ++i) {
            thread.tid[0] = order_of_threads == 1 ? threads - 1 - i : i;
            kernel.run(thread);
          }
        }
        if (!failure.empty()) return;
      }
}

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes) {
  const std::lock_guard<std::mutex> lock(launches);
  ++launched_so_far;
  failure.clear();
  try {
    run(kernel, grid, block, arguments, dynamic_bytes);
  } catch (const Stop&) {
  } catch (const std::runtime_error& error) {
    failure = std::string(error.what()) + " in " + kernel.name;
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace

Registrar::Registrar(const Kernel* some, size_t count) {
  for (size_t i = 0; i < count; ++i) kernels()[some[i].name] = &some[i];
}

void Thread::fault(const char* what, uint64_t address, int bytes, int where) {
  char text[600];
  std::snprintf(text, sizeof text, "%s: %d bytes at %#llx, instruction %d of %s, block %u, thread %u", what, bytes,
                static_cast<unsigned long long>(address), where, kernel, ctaid[0], tid[0]);
  failure = text;
  if (fiber == nullptr) throw Stop();
  to_scheduler(fiber, State::done);
  std::abort();
}
void Thread::meet_block(int where) {
  fiber->where = where;
  to_scheduler(fiber, State::at_block);
}
void Thread::meet_warp(uint32_t lanes, int where) {
  fiber->where = where, fiber->lanes = lanes, fiber->meeting = Meeting::none;
  to_scheduler(fiber, State::at_warp);
}
uint32_t Thread::ballot(bool vote, uint32_t lanes, int where) {
  fiber->where = where, fiber->lanes = lanes, fiber->meeting = Meeting::ballot, fiber->value = vote;
  to_scheduler(fiber, State::at_warp);
  return fiber->result;
}
uint32_t Thread::butterfly(uint32_t value, uint32_t bits, uint32_t lanes, int where) {
  fiber->where = where, fiber->lanes = lanes, fiber->meeting = Meeting::butterfly;
  fiber->value = value, fiber->bits = bits;
  to_scheduler(fiber, State::at_warp);
  return fiber->result;
}

// ---- what nvcc's host code and this package call of the CUDA runtime
extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st* stream) {
  calls.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Call call = calls.back();
  calls.pop_back();
  *grid = call.grid, *block = call.block, *shared_bytes = call.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<Kernel*>(kernels().at(names().at(host))));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  return launch(*reinterpret_cast<const Kernel*>(kernel), grid, block, arguments, shared_bytes);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  return launch(*kernels().at(names().at(host)), grid, block, arguments, shared_bytes);
}
cudaError_t cudaGetLastError() { return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return failure.c_str(); }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
__attribute__((visibility("default"))) void pysal_emu_set_order(unsigned order) { order_of_threads = order; }
}

// ---- what tests/emu asks of csrc/emu
namespace pysal::emu {
void set_order(unsigned order) { order_of_threads = order; }
int64_t launched() { return launched_so_far; }
}  // namespace pysal::emu
void racy_kernel_for_tsan() {}
