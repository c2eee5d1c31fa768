// float32 sums of grad_cam in double: over a plane, over a pixel's channels, and into a block of sums.
// Four vectors of partial sums hide the latency of an addition. Reads 4 bytes per element.
#include "grad_cam_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kVectors = 4, kStep = kVectors * kDoubleLanes;
typedef float vnarrow __attribute__((vector_size(PYSAL_VECTOR_BYTES / 2)));  // as many floats as doubles in a vector
typedef float vnarrow_memory __attribute__((vector_size(PYSAL_VECTOR_BYTES / 2), aligned(4), may_alias));

PYSAL_INLINE vdouble widen(const float* p) {
  const vnarrow values = *reinterpret_cast<const vnarrow_memory*>(p);
  return __builtin_convertvector(values, vdouble);
}

PYSAL_INLINE double total(const vdouble* partial) {
  const vdouble sums = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  double sum = 0.0;
  for (int64_t lane = 0; lane < kDoubleLanes; ++lane) sum += sums[lane];
  return sum;
}

double sum(const float* __restrict values, int64_t count) {
  vdouble partial[kVectors] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int64_t v = 0; v < kVectors; ++v) partial[v] += widen(values + i + v * kDoubleLanes);
  double rest = 0.0;
  for (; i < count; ++i) rest += static_cast<double>(values[i]);
  return total(partial) + rest;
}

double dot(const double* __restrict weights, const float* __restrict values, int64_t count) {
  vdouble partial[kVectors] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int64_t v = 0; v < kVectors; ++v)
      partial[v] += load(weights + i + v * kDoubleLanes) * widen(values + i + v * kDoubleLanes);
  double rest = 0.0;
  for (; i < count; ++i) rest += weights[i] * static_cast<double>(values[i]);
  return total(partial) + rest;
}

void add_scaled(double* __restrict sums, double weight, const float* __restrict values, int64_t count) {
  const vdouble weights = broadcast(weight);
  int64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes) store(sums + i, load(sums + i) + weights * widen(values + i));
  for (; i < count; ++i) sums[i] += weight * static_cast<double>(values[i]);
}
}  // namespace

PYSAL_TABLE(GradCamKernels, grad_cam) = {sum, dot, add_scaled};
}  // namespace pysal::cpu
