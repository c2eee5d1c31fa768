// The emulation itself: barriers, warp operations, shared memory, and what it must refuse.
#include <cstring>

#include "../../csrc/cuda/cuda_lang.h"
#include "harness.h"

using pysal::cuda::launch;

namespace {
constexpr int kTile = 16;

// reads what other threads wrote, so it needs its barrier
__global__ void transpose_kernel(const float* in, float* out, bool with_barrier) {
  PYSAL_SHARED(float, tile, [kTile][kTile + 1]);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  tile[y][x] = in[y * kTile + x];
  if (with_barrier) __syncthreads();
  out[y * kTile + x] = tile[x][y];
}

__global__ void block_sum_kernel(const float* in, float* sums, int n) {
  PYSAL_DYNAMIC_SHARED(float, parts);
  const int thread = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x * blockDim.x) + thread;
  float value = i < n ? in[i] : 0.0f;
  for (int d = 16; d > 0; d /= 2) value += __shfl_down_sync(0xffffffffu, value, d);
  if (thread % 32 == 0) parts[thread / 32] = value;
  __syncthreads();
  if (thread < 32) {
    value = thread < static_cast<int>(blockDim.x) / 32 ? parts[thread] : 0.0f;
    for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(0xffffffffu, value, d);
    if (thread == 0) atomicAdd(sums, value);
  }
}

__global__ void ballot_kernel(unsigned* votes) {
  const unsigned vote = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
  if (threadIdx.x == 0) *votes = vote;
}

__global__ void divergent_barrier_kernel(int kind) {
  if (kind == 0 && threadIdx.x == 3) return;
  if (kind == 1 && threadIdx.x < 32) __syncthreads();
  if (kind == 2) __shfl_sync(0x0000ffffu, 1, threadIdx.x < 16 ? 20 : 0);
  if (kind == 3 && threadIdx.x < 16) __shfl_down_sync(0xffffffffu, 1, 1);
  __syncthreads();
}

__global__ void read_unwritten_kernel(float* out) {
  PYSAL_SHARED(float, tile, [4]);
  *out = tile[2];
}

std::string message_of(void (*call)()) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
}  // namespace

// main calls it by itself under TSan, which must report it
void racy_kernel_for_tsan() {
  const auto in = emu_test::random<float>(kTile * kTile), out = emu_test::unwritten<float>(kTile * kTile);
  launch("racy", transpose_kernel, 1, dim3(kTile, kTile), 0, nullptr, in.get(), out.get(), false);
}

CASE(barriers_and_shared_memory) {
  const auto in = emu_test::random<float>(kTile * kTile), out = emu_test::unwritten<float>(kTile * kTile);
  launch("transpose", transpose_kernel, 1, dim3(kTile, kTile), 0, nullptr, in.get(), out.get(), true);
  for (int y = 0; y < kTile; ++y)
    for (int x = 0; x < kTile; ++x) EXPECT(out[y * kTile + x] == in[x * kTile + y]);
}

CASE(warp_operations_and_atomics) {
  constexpr int kCount = 700;
  const std::unique_ptr<float[]> in(new float[kCount]);
  for (int i = 0; i < kCount; ++i) in[i] = static_cast<float>(i);  // sums of whole numbers are exact in any order
  float sum = 0;
  launch("block_sum", block_sum_kernel, 3, 256, 8 * sizeof(float), nullptr, in.get(), &sum, kCount);
  EXPECT(sum == kCount * (kCount - 1) / 2, std::to_string(sum));
  unsigned votes = 0;
  launch("ballot", ballot_kernel, 1, 32, 0, nullptr, &votes);
  EXPECT(votes == 0x49249249u);
}

CASE(unwritten_shared_memory_is_nan) {
  float value = 0;
  launch("read_unwritten", read_unwritten_kernel, 1, 1, 0, nullptr, &value);
  EXPECT(std::isnan(value));
}

CASE(divergence_is_refused) {
  const auto refused = [](int kind) {
    try {
      launch("divergent", divergent_barrier_kernel, 1, 64, 0, nullptr, kind);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT(contains(refused(0), "threads that have returned"), refused(0));
  EXPECT(contains(refused(1), "wait at two barriers"), refused(1));
  EXPECT(contains(refused(2), "not in its mask") || contains(refused(2), "takes no part"), refused(2));
  EXPECT(contains(refused(3), "deadlock"), refused(3));
}

CASE(impossible_launches_are_refused) {
  EXPECT(contains(message_of([] { launch("block", ballot_kernel, 1, 2048, 0, nullptr, nullptr); }), "no GPU"));
  EXPECT(contains(message_of([] { launch("grid", ballot_kernel, dim3(1, 70000), 1, 0, nullptr, nullptr); }), "no GPU"));
  EXPECT(contains(message_of([] { launch("shared", ballot_kernel, 1, 1, 1 << 20, nullptr, nullptr); }), "no GPU"));
}
