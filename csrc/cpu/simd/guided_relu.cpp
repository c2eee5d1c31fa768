// Loops of guided_relu: output = min(max(x, 0), upper), gates one bit per element, and the backward rules.
// Work split: the caller gives each thread whole bytes of gates; a step takes as many vectors as fill whole bytes. The
// two 16-bit floats share one loop over their bits, in vectors of 16 bytes, whose eight lanes are one byte of gates.
// Bytes per element of size s: forward reads s and writes s + 1/8, or 1/8 for the gates alone; backward reads s + 1/8
// and writes s.
#include "guided_relu_kernels.h"

#include "gates.h"

namespace pysal::cpu {
namespace {
typedef int64_t vlong __attribute__((vector_size(PYSAL_VECTOR_BYTES)));
typedef int16_t vshort __attribute__((vector_size(16)));
typedef int16_t vshort_memory __attribute__((vector_size(16), aligned(2), may_alias));

PYSAL_INLINE vshort load(const int16_t* p) { return *reinterpret_cast<const vshort_memory*>(p); }
PYSAL_INLINE void store(int16_t* p, vshort v) { *reinterpret_cast<vshort_memory*>(p) = v; }

PYSAL_INLINE unsigned bits_of(vlong lanes) {
#if defined(__AVX512DQ__) && PYSAL_VECTOR_BYTES == 64
  typedef long long isa_long __attribute__((vector_size(64)));
  return static_cast<uint8_t>(__builtin_ia32_cvtq2mask512(reinterpret_cast<isa_long>(lanes)));
#elif defined(__AVX__) && PYSAL_VECTOR_BYTES == 32
  return static_cast<unsigned>(__builtin_ia32_movmskpd256(reinterpret_cast<vdouble>(lanes)));
#elif defined(__SSE2__) && PYSAL_VECTOR_BYTES == 16
  return static_cast<unsigned>(__builtin_ia32_movmskpd(reinterpret_cast<vdouble>(lanes)));
#else
  unsigned bits = 0;
  for (int64_t k = 0; k < kDoubleLanes; ++k) bits |= static_cast<unsigned>(lanes[k] & 1) << k;
  return bits;
#endif
}
PYSAL_INLINE unsigned bits_of(vshort lanes) {
#if defined(__SSE2__)
  return static_cast<uint8_t>(__builtin_ia32_pmovmskb128(__builtin_ia32_packsswb128(lanes, lanes)));
#else
  unsigned bits = 0;
  for (int k = 0; k < 8; ++k) bits |= (lanes[k] & 1u) << k;
  return bits;
#endif
}

// One vector of each type: forward gives the output and the gate's bits, positive says what is not at most 0, so NaN,
// too.
struct Float {
  typedef float T;
  typedef vfloat Vector;
  typedef vint Mask;
  static constexpr int kCount = static_cast<int>(kLanes);
  vfloat top, bound;
  explicit PYSAL_INLINE Float(float upper) : top(broadcast(upper)), bound(broadcast(gate_bound(upper))) {}
  PYSAL_INLINE vfloat output(vfloat x) const {
    const vfloat zero = {}, floored = x < zero ? zero : x;  // comparisons with NaN are false, so it comes through
    return floored > top ? top : floored;
  }
  PYSAL_INLINE vint gate(vfloat x) const { return ~((x <= vfloat{}) | (x >= bound)); }
  PYSAL_INLINE vint positive(vfloat x) const { return ~(x <= vfloat{}); }
  static PYSAL_INLINE vint lanes(unsigned bits) { return lanes_of<vint, int32_t, kCount>(bits); }
};

struct Double {
  typedef double T;
  typedef vdouble Vector;
  typedef vlong Mask;
  static constexpr int kCount = static_cast<int>(kDoubleLanes);
  vdouble top, bound;
  explicit PYSAL_INLINE Double(double upper) : top(broadcast(upper)), bound(broadcast(gate_bound(upper))) {}
  PYSAL_INLINE vdouble output(vdouble x) const {
    const vdouble zero = {}, floored = x < zero ? zero : x;
    return floored > top ? top : floored;
  }
  PYSAL_INLINE vlong gate(vdouble x) const { return ~((x <= vdouble{}) | (x >= bound)); }
  PYSAL_INLINE vlong positive(vdouble x) const { return ~(x <= vdouble{}); }
  static PYSAL_INLINE vlong lanes(unsigned bits) { return lanes_of<vlong, int64_t, kCount>(bits); }
};

struct Half {  // the bits of a float16 or bfloat16
  typedef int16_t T;
  typedef vshort Vector;
  typedef vshort Mask;
  static constexpr int kCount = 8;
  HalfUpper upper;
  explicit PYSAL_INLINE Half(HalfUpper upper_) : upper(upper_) {}
  PYSAL_INLINE vshort is_nan(vshort x) const { return (x & static_cast<int16_t>(0x7fff)) > upper.infinity; }
  PYSAL_INLINE vshort positive(vshort x) const { return (x > 0) | is_nan(x); }
  PYSAL_INLINE vshort output(vshort x) const {
    const vshort floored = x & positive(x), capped = (x > upper.below) & ~is_nan(x);
    return (floored & ~capped) | (capped & upper.rounded);
  }
  PYSAL_INLINE vshort gate(vshort x) const { return ((x > 0) & (x < upper.above)) | is_nan(x); }
  static PYSAL_INLINE vshort lanes(unsigned bits) { return lanes_of<vshort, int16_t, kCount>(bits); }
};

template <class Kind>
constexpr int kStep = Kind::kCount < 8 ? 8 : Kind::kCount;  // elements whose bits fill whole bytes

template <bool kStores, class Kind>
PYSAL_INLINE void forward_step(const Kind& kind, const typename Kind::T* input, typename Kind::T* output,
                               uint8_t* gates) {
  unsigned bits = 0;
  for (int first = 0; first < kStep<Kind>; first += Kind::kCount) {
    const typename Kind::Vector x = load(input + first);
    if (kStores) store(output + first, kind.output(x));
    bits |= bits_of(kind.gate(x)) << first;
  }
  for (int b = 0; b < kStep<Kind> / 8; ++b) gates[b] = static_cast<uint8_t>(bits >> (8 * b));
}

// kStores: output is written, else it may be null.
template <bool kStores, class Kind>
PYSAL_INLINE void forward(const Kind& kind, const typename Kind::T* __restrict input,
                          typename Kind::T* __restrict output, uint8_t* __restrict gates, int64_t count) {
  int64_t i = 0;
  for (; i + kStep<Kind> <= count; i += kStep<Kind>)
    forward_step<kStores>(kind, input + i, kStores ? output + i : nullptr, gates + i / 8);
  if (i == count) return;
  typename Kind::T in[kStep<Kind>] = {}, out[kStep<Kind>];  // the rest, in a step of its own
  uint8_t bytes[kStep<Kind> / 8];
  for (int64_t k = i; k < count; ++k) in[k - i] = input[k];
  forward_step<kStores>(kind, in, out, bytes);
  for (int64_t k = i; kStores && k < count; ++k) output[k] = out[k - i];
  for (int64_t k = i; k < count; k += 8) gates[k / 8] = bytes[(k - i) / 8];
}

template <bool kGated, bool kPositive, class Kind>
PYSAL_INLINE void backward_step(const Kind& kind, const typename Kind::T* grad_output, const uint8_t* gates,
                                typename Kind::T* grad_input) {
  unsigned bits = 0;
  for (int b = 0; kGated && b < kStep<Kind> / 8; ++b) bits |= static_cast<unsigned>(gates[b]) << (8 * b);
  for (int first = 0; first < kStep<Kind>; first += Kind::kCount) {
    const typename Kind::Vector g = load(grad_output + first);
    typename Kind::Mask passes = ~typename Kind::Mask{};
    if (kGated) passes &= Kind::lanes(bits >> first);
    if (kPositive) passes &= kind.positive(g);
    store(grad_input + first, passes ? g : typename Kind::Vector{});
  }
}

// grad_input may be grad_output: a step reads its elements before it writes them.
template <bool kGated, bool kPositive, class Kind>
PYSAL_INLINE void backward_rule(const Kind& kind, const typename Kind::T* grad_output, const uint8_t* __restrict gates,
                                typename Kind::T* grad_input, int64_t count) {
  int64_t i = 0;
  for (; i + kStep<Kind> <= count; i += kStep<Kind>)
    backward_step<kGated, kPositive>(kind, grad_output + i, gates + i / 8, grad_input + i);
  if (i == count) return;
  typename Kind::T in[kStep<Kind>] = {}, out[kStep<Kind>];
  uint8_t bytes[kStep<Kind> / 8] = {};
  for (int64_t k = i; k < count; ++k) in[k - i] = grad_output[k];
  for (int64_t k = i; k < count; k += 8) bytes[(k - i) / 8] = gates[k / 8];
  backward_step<kGated, kPositive>(kind, in, bytes, out);
  for (int64_t k = i; k < count; ++k) grad_input[k] = out[k - i];
}

template <class Kind>
PYSAL_INLINE void backward(const Kind& kind, const typename Kind::T* grad_output, const uint8_t* gates, int rule,
                           typename Kind::T* grad_input, int64_t count) {
  if (rule == 0) backward_rule<true, false>(kind, grad_output, gates, grad_input, count);
  if (rule == 1) backward_rule<true, true>(kind, grad_output, gates, grad_input, count);
  if (rule == 2) backward_rule<false, true>(kind, grad_output, gates, grad_input, count);
}

void forward_float(const float* input, float upper, float* output, uint8_t* gates, int64_t count) {
  forward<true>(Float(upper), input, output, gates, count);
}
void forward_double(const double* input, double upper, double* output, uint8_t* gates, int64_t count) {
  forward<true>(Double(upper), input, output, gates, count);
}
void forward_half(const int16_t* input, HalfUpper upper, int16_t* output, uint8_t* gates, int64_t count) {
  forward<true>(Half(upper), input, output, gates, count);
}
void gates_float(const float* input, float upper, uint8_t* gates, int64_t count) {
  forward<false>(Float(upper), input, nullptr, gates, count);
}
void gates_double(const double* input, double upper, uint8_t* gates, int64_t count) {
  forward<false>(Double(upper), input, nullptr, gates, count);
}
void gates_half(const int16_t* input, HalfUpper upper, uint8_t* gates, int64_t count) {
  forward<false>(Half(upper), input, nullptr, gates, count);
}
void backward_float(const float* grad_output, const uint8_t* gates, int rule, float* grad_input, int64_t count) {
  backward(Float(0.0f), grad_output, gates, rule, grad_input, count);
}
void backward_double(const double* grad_output, const uint8_t* gates, int rule, double* grad_input, int64_t count) {
  backward(Double(0.0), grad_output, gates, rule, grad_input, count);
}
void backward_half(const int16_t* grad_output, const uint8_t* gates, int rule, int16_t infinity, int16_t* grad_input,
                   int64_t count) {
  backward(Half({0, 0, 0, infinity}), grad_output, gates, rule, grad_input, count);
}
}  // namespace

PYSAL_TABLE(GuidedReluKernels, guided_relu) = {forward_float,  forward_double,  forward_half,
                                               gates_float,    gates_double,    gates_half,
                                               backward_float, backward_double, backward_half};
}  // namespace pysal::cpu
