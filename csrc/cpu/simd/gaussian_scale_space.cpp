// Rows of L = K x K^T and of D = (K' - K)/h x K'^T + K x (K' - K)^T/h for one plane x.
// K is banded and Toeplitz, so no matrix is stored: element (i, k) is taps[i - k]. Reflection adds the products with
// the mirrored line, which is the same line read backwards.
// A block of 8 rows goes through the vertical products into scratch, which stays in L1, then through the horizontal
// ones. Both are the register tile of a matrix product, R rows by U vectors, restricted to the band. A tap costs one
// multiplication, at the rate of a dense matrix product, and there are never more of them than the side is long (twice
// that under reflection), so that a large sigma costs no more than two such products and a small one much less.
// Read 4 and written 4 (8 with D) bytes per pixel; the halo of a block comes from L2.
#include "gaussian_scale_space_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int kTileRows = PYSAL_VECTOR_BYTES == 64 ? 8 : 4;  // 8 x 3 of 32 registers, 4 x 3 of 16
constexpr int kTileVectors = 3;
static_assert(kScaleSpaceRows % kTileRows == 0 && kScaleSpaceMargin >= kTileVectors * kLanes);

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Vector = vfloat;
  static constexpr int64_t kWidth = kLanes;
};
template <>
struct Simd<double> {
  using Vector = vdouble;
  static constexpr int64_t kWidth = kDoubleLanes;
};

PYSAL_INLINE void fetch(const float* p, vfloat& v) { v = load(p); }
PYSAL_INLINE void fetch(const double* p, vdouble& v) { v = load(p); }
PYSAL_INLINE void fetch(const float* p, float& v) { v = *p; }
PYSAL_INLINE void fetch(const double* p, double& v) { v = *p; }
PYSAL_INLINE void store(float* p, float v) { *p = v; }
PYSAL_INLINE void store(double* p, double v) { *p = v; }

// sum over t < count of a[row a_row + t a_step] * b[t b_step + column]
template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_step, count;
};

// R x U vectors of the sum of the products.
template <class T, class Vector, int R, int U>
PYSAL_INLINE void tile(const Product<T>* products, int count, T* out, int64_t out_row) {
  constexpr int64_t width = sizeof(Vector) / sizeof(T);
  Vector sums[R][U] = {};
  for (const Product<T>* p = products; p < products + count; ++p) {
    const T *a = p->a, *b = p->b;
    const int64_t a_row = p->a_row, a_step = p->a_step, b_step = p->b_step;
    for (int64_t t = 0; t < p->count; ++t, a += a_step, b += b_step) {
      Vector values[U];
      for (int u = 0; u < U; ++u) fetch(b + u * width, values[u]);
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u) sums[r][u] += a[r * a_row] * values[u];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) store(out + r * out_row + u * width, sums[r][u]);
}

// The stretches of begin <= k < end in which position k of the extended line is an affine function of k.
struct Stretch {
  int64_t begin, end, first, direction;  // position of k is first + direction * (k - begin)
};
PYSAL_INLINE int stretches(int64_t begin, int64_t end, int64_t size, bool reflect, Stretch* out) {
  int count = 0;
  if (reflect && begin < 0) out[count++] = {begin, 0, -1 - begin, -1};
  const int64_t inner_begin = begin < 0 ? 0 : begin, inner_end = end > size ? size : end;
  out[count++] = {inner_begin, inner_end, inner_begin, 1};
  if (reflect && end > size) out[count++] = {size, end, size - 1, -1};
  return count;
}

// out[r, j] = sum over k of taps[row + r - k] x[k, j]
template <class T, class Vector, int R, int U>
PYSAL_INLINE void vertical(const ScaleSpacePlane<T>& plane, const T* taps, int64_t row, int64_t column, T* out) {
  const int64_t radius = plane.vertical.radius, width = plane.width;
  Stretch pieces[3];
  Product<T> products[3];
  const int count = stretches(row - radius, row + R + radius, plane.height, plane.reflect, pieces);
  for (int s = 0; s < count; ++s) {
    const Stretch& piece = pieces[s];
    products[s] = {
        taps + (row - piece.begin), 1, -1, plane.source + piece.first * width + column, piece.direction * width,
        piece.end - piece.begin};
  }
  tile<T, Vector, R, U>(products, count, out + column, width);
}

// Appends to products: sum over k of line[r, k] taps[column + lane - k]
template <class T, int R>
PYSAL_INLINE int horizontal(const ScaleSpacePlane<T>& plane, const T* line, const T* taps, int64_t column,
                            int64_t columns, Product<T>* products) {
  const int64_t radius = plane.horizontal.radius, width = plane.width;
  Stretch pieces[3];
  const int count = stretches(column - radius, column + columns + radius, width, plane.reflect, pieces);
  for (int s = 0; s < count; ++s) {
    const Stretch& piece = pieces[s];
    products[s] = {line + piece.first,     width, piece.direction, taps + (column - piece.begin), -1,
                   piece.end - piece.begin};
  }
  return count;
}

template <class T, int R>
struct Block {
  const ScaleSpacePlane<T>& plane;
  int64_t row;

  // U vectors of u = K x and v = (K' - K)/h x
  template <class Vector, int U>
  PYSAL_INLINE void first_pass(int64_t column) const {
    vertical<T, Vector, R, U>(plane, plane.vertical.level, row, column, plane.scratch);
    if (plane.derivatives != nullptr)
      vertical<T, Vector, R, U>(plane, plane.vertical.slope, row, column, plane.scratch + R * plane.width);
  }

  // U vectors of L = u K^T and D = v K'^T + u (K' - K)^T/h
  template <class Vector, int U>
  PYSAL_INLINE void second_pass(int64_t column) const {
    constexpr int64_t columns = U * sizeof(Vector) / sizeof(T);
    const T *u = plane.scratch, *v = plane.scratch + R * plane.width;
    const int64_t offset = row * plane.width + column;
    Product<T> products[6];
    int count = horizontal<T, R>(plane, u, plane.horizontal.level, column, columns, products);
    tile<T, Vector, R, U>(products, count, plane.levels + offset, plane.width);
    if (plane.derivatives == nullptr) return;
    count = horizontal<T, R>(plane, v, plane.horizontal.next, column, columns, products);
    count += horizontal<T, R>(plane, u, plane.horizontal.slope, column, columns, products + count);
    tile<T, Vector, R, U>(products, count, plane.derivatives + offset, plane.width);
  }

  template <class Vector, int U, bool kFirst>
  PYSAL_INLINE void pass(int64_t column) const {
    if (kFirst)
      first_pass<Vector, U>(column);
    else
      second_pass<Vector, U>(column);
  }

  template <bool kFirst>
  void columns() const {
    using Vector = typename Simd<T>::Vector;
    constexpr int64_t one = Simd<T>::kWidth, wide = kTileVectors * one;
    const int64_t width = plane.width;
    int64_t column = 0;
    for (; column + wide <= width; column += wide) pass<Vector, kTileVectors, kFirst>(column);
    for (; column + one <= width; column += one) pass<Vector, 1, kFirst>(column);
    if (column == width) return;
    if (width >= one)
      pass<Vector, 1, kFirst>(width - one);  // computes some columns twice, with the same result
    else
      for (; column < width; ++column) pass<T, 1, kFirst>(column);
  }
};

template <class T, int R>
void block(const ScaleSpacePlane<T>& plane, int64_t row) {
  const Block<T, R> work{plane, row};
  work.template columns<true>();
  work.template columns<false>();
}

template <class T>
void rows(const ScaleSpacePlane<T>& plane, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) block<T, kTileRows>(plane, row);
  for (; row < end; ++row) block<T, 1>(plane, row);
}
}  // namespace

PYSAL_TABLE(GaussianScaleSpaceKernels, gaussian_scale_space) = {rows<float>, rows<double>};
}  // namespace pysal::cpu
