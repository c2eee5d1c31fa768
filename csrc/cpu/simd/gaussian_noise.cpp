// Philox4x32-10 words (Salmon et al. 2011, doi 10.1145/2063384.2063405) and float32 normals made of them by Box-Muller.
// Work split: one counter per lane; all state is in registers or L1. No bytes are read, 4 are written per element.
// The normals keep float32's relative accuracy over the whole range of a 32-bit word r, u = (r + 0.5) 2^-32:
//   near u = 1, -ln u comes from 1 - u = (~r + 0.5) 2^-32, which a float holds where it would round u to 1;
//   the angle 2 pi u is reduced to an eighth of a turn in integers, so that no bit of r is lost to 2 pi.
#include "gaussian_noise_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kIncrement0 = 0x9E3779B9, kIncrement1 = 0xBB67AE85;

typedef uint32_t vuint __attribute__((vector_size(PYSAL_VECTOR_BYTES)));
typedef uint64_t vulong __attribute__((vector_size(PYSAL_VECTOR_BYTES)));

// Products of the even 32-bit lanes, 64 bits each.
PYSAL_INLINE vulong multiply_even(vuint a, vuint b) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__) && PYSAL_VECTOR_BYTES == 64
  typedef int isa_int __attribute__((vector_size(64)));
  typedef long long isa_long __attribute__((vector_size(64)));
  return reinterpret_cast<vulong>(__builtin_ia32_pmuludq512_mask(
      reinterpret_cast<isa_int>(a), reinterpret_cast<isa_int>(b), isa_long{}, static_cast<uint8_t>(-1)));
#elif defined(__AVX2__) && PYSAL_VECTOR_BYTES == 32
  typedef int isa_int __attribute__((vector_size(32)));
  return reinterpret_cast<vulong>(
      __builtin_ia32_pmuludq256(reinterpret_cast<isa_int>(a), reinterpret_cast<isa_int>(b)));
#elif defined(__SSE2__) && PYSAL_VECTOR_BYTES == 16
  typedef int isa_int __attribute__((vector_size(16)));
  return reinterpret_cast<vulong>(
      __builtin_ia32_pmuludq128(reinterpret_cast<isa_int>(a), reinterpret_cast<isa_int>(b)));
#else
  return (reinterpret_cast<vulong>(a) & 0xFFFFFFFFu) * (reinterpret_cast<vulong>(b) & 0xFFFFFFFFu);
#endif
}

PYSAL_INLINE void multiply(vuint a, uint32_t factor, vuint& high, vuint& low) {
  constexpr uint64_t kHigh = 0xFFFFFFFF00000000u;
  const vuint b = vuint{} + factor;
  const vulong even = multiply_even(a, b);
  const vulong odd = multiply_even(reinterpret_cast<vuint>(reinterpret_cast<vulong>(a) >> 32), b);
  high = reinterpret_cast<vuint>((even >> 32) | (odd & kHigh));
  low = reinterpret_cast<vuint>((even & ~kHigh) | (odd << 32));
}

// words[k], lane q: word k of quad first + q
PYSAL_INLINE void philox(const NoiseStream& stream, uint32_t first, vuint words[4]) {
  vuint lane;
  for (uint32_t q = 0; q < kLanes; ++q) lane[q] = q;
  vuint c0 = first + lane, c1 = vuint{} + stream.sample, c2 = vuint{} + stream.id_low, c3 = vuint{} + stream.id_high;
  uint32_t key0 = stream.key_low, key1 = stream.key_high;
  for (int round = 0; round < kRounds; ++round, key0 += kIncrement0, key1 += kIncrement1) {
    vuint high0, low0, high1, low1;
    multiply(c0, kMultiplier0, high0, low0);
    multiply(c2, kMultiplier1, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Of lanes below 2^31.
PYSAL_INLINE vfloat to_float(vuint lanes) { return __builtin_convertvector(reinterpret_cast<vint>(lanes), vfloat); }

PYSAL_INLINE vfloat square_root(vfloat x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof lanes);
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] = __builtin_sqrtf(lanes[k]);  // one vector instruction
  __builtin_memcpy(&x, lanes, sizeof lanes);
  return x;
}

// sqrt(-2 ln((r + 0.5) 2^-32))
PYSAL_INLINE vfloat radius_of(vuint r) {
  constexpr uint32_t kSqrtHalf = 0xB504F334;     // sqrt(1/2) 2^32
  constexpr int32_t kSqrtHalfBits = 0x3F3504F3;  // sqrt(1/2) as a float
  constexpr int32_t kOneBits = 0x3F800000;
  constexpr float kLn2 = 0.693147180559945309f;
  // u = 2^-exponent (1 + z): from r + 0.5, with 1 + z in [sqrt(1/2), sqrt(2)), or exponent 0 and z = u - 1
  const vfloat value = to_float(r >> 16) * 65536.0f + (to_float(r & 0xFFFF) + 0.5f);
  const vint shifted = reinterpret_cast<vint>(value) + (kOneBits - kSqrtHalfBits);
  const vfloat fraction = reinterpret_cast<vfloat>((shifted & 0x007FFFFF) + kSqrtHalfBits);
  const vfloat turns = __builtin_convertvector(32 + 127 - (shifted >> 23), vfloat);
  const vfloat below_one = (to_float(~r & 0x7FFFFFFF) + 0.5f) * -0x1p-32f;
  const auto high = r >= kSqrtHalf;
  const vfloat z = high ? below_one : fraction - 1.0f, exponent = high ? vfloat{} : turns;
  // ln(1 + z) = 2 artanh(s), s = z / (2 + z), |s| <= 0.172: the series' next term is s^10 / 11 < 2.1e-9 of it
  const vfloat s = z / (2.0f + z), t = s * s;
  const vfloat series = 1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return square_root(2.0f * (exponent * kLn2 - 2.0f * s * series));
}

// radius times cos and sin of 2 pi (r + 0.5) 2^-32
PYSAL_INLINE void rotate(vfloat radius, vuint r, vfloat& along, vfloat& across) {
  constexpr float kStep = 1.46291807926715968e-9f;  // 2 pi 2^-32
  const vuint quarter = (r + 0x20000000u) >> 30;
  // |x| <= pi/4: the series' next terms are x^11 / 11! < 1.8e-9 and x^12 / 12! < 1.2e-10
  const vfloat x = (to_float(r - (quarter << 30)) + 0.5f) * kStep, t = x * x;
  const vfloat sine = x + x * t * (-1.0f / 6 + t * (1.0f / 120 + t * (-1.0f / 5040 + t * (1.0f / 362880))));
  const vfloat cosine =
      1.0f + t * (-1.0f / 2 + t * (1.0f / 24 + t * (-1.0f / 720 + t * (1.0f / 40320 + t * (-1.0f / 3628800)))));
  const auto odd = (quarter & 1) != 0;
  const vuint along_sign = (quarter + 1) >> 1 << 31, across_sign = quarter >> 1 << 31;
  along = reinterpret_cast<vfloat>(reinterpret_cast<vuint>(radius * (odd ? sine : cosine)) ^ along_sign);
  across = reinterpret_cast<vfloat>(reinterpret_cast<vuint>(radius * (odd ? cosine : sine)) ^ across_sign);
}

// a[0] b[0] a[1] b[1] ...: the first and the second half of it
template <class Vector>
PYSAL_INLINE void zip(Vector a, Vector b, Vector& first, Vector& second) {
  constexpr int32_t lanes = kLanes, half = lanes / 2;
#if defined(__clang__)
  for (int32_t k = 0; k < half; ++k) {
    first[2 * k] = a[k], first[2 * k + 1] = b[k];
    second[2 * k] = a[half + k], second[2 * k + 1] = b[half + k];
  }
#else
  vint first_lanes, second_lanes;
  for (int32_t k = 0; k < half; ++k) {
    first_lanes[2 * k] = k, first_lanes[2 * k + 1] = lanes + k;
    second_lanes[2 * k] = half + k, second_lanes[2 * k + 1] = lanes + half + k;
  }
  first = __builtin_shuffle(a, b, first_lanes);
  second = __builtin_shuffle(a, b, second_lanes);
#endif
}

// out[4 q + k] = lane q of values[k]
template <class Vector, class T>
PYSAL_INLINE void store_quads(const Vector values[4], T* out) {
  Vector even[2], odd[2], quads[4];
  zip(values[0], values[2], even[0], even[1]);
  zip(values[1], values[3], odd[0], odd[1]);
  zip(even[0], odd[0], quads[0], quads[1]);
  zip(even[1], odd[1], quads[2], quads[3]);
  __builtin_memcpy(out, quads, sizeof quads);
}

void words(const NoiseStream& stream, uint32_t first, int64_t quads, uint32_t* out) {
  for (int64_t quad = 0; quad < quads; quad += kLanes) {
    vuint words[4];
    philox(stream, first + static_cast<uint32_t>(quad), words);
    store_quads(words, out + 4 * quad);
  }
}

void normals(const NoiseStream& stream, uint32_t first, int64_t quads, float* out) {
  for (int64_t quad = 0; quad < quads; quad += kLanes) {
    vuint words[4];
    vfloat normals[4];
    philox(stream, first + static_cast<uint32_t>(quad), words);
    rotate(radius_of(words[0]), words[1], normals[0], normals[1]);
    rotate(radius_of(words[2]), words[3], normals[2], normals[3]);
    store_quads(normals, out + 4 * quad);
  }
}
}  // namespace

PYSAL_TABLE(GaussianNoiseKernels, gaussian_noise) = {words, normals};
}  // namespace pysal::cpu
