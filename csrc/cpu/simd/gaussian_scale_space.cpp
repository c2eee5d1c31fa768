// Rows of L = K x K^T and of D = (K' - K)/h x K'^T + K x (K' - K)^T/h for one plane x.
// A block of rows goes through the vertical products into scratch, which stays in L1, then through the horizontal ones.
// Both are the register tile of a matrix product, R rows by U vectors, restricted to the band. There are two forms:
// Block, for kernels shorter than the image: K is banded and Toeplitz, so no matrix is stored, element (i, k) is
// taps[i - k]. Reflection adds the products with the mirrored line, which is the same line read backwards.
// FoldedBlock, for those that span it: even and odd parts of lines have each a matrix of half the side, which is half
// the multiplications, with reflection a quarter. Sums and differences of the parts are taken in registers.
// Read 4 and written 4 (8 with D) bytes per pixel; the halo of a block, and the matrices, come from L2.
#include "gaussian_scale_space_kernels.h"

#include "isa.h"

namespace pysal::cpu {
namespace {
constexpr int kTileRows = PYSAL_VECTOR_BYTES == 64 ? 8 : 4;  // 8 x 2 of 32 registers, 4 x 3 of 16
constexpr int kTileVectors = PYSAL_VECTOR_BYTES == 64 ? 2 : 3;
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

// R x U vectors of the sum of the products; kRow is their a_row, 0 where it is not known here.
template <class T, class Vector, int R, int U, int64_t kRow = 0>
PYSAL_INLINE void multiply(const Product<T>* products, int count, Vector found[R][U]) {
  constexpr int64_t width = sizeof(Vector) / sizeof(T);
  Vector sums[R][U] = {};
  for (const Product<T>* p = products; p < products + count; ++p) {
    const T *a = p->a, *b = p->b;
    const int64_t a_row = kRow == 0 ? p->a_row : kRow, a_step = p->a_step, b_step = p->b_step;
    for (int64_t t = 0; t < p->count; ++t, a += a_step, b += b_step) {
      Vector values[U];
      for (int u = 0; u < U; ++u) fetch(b + u * width, values[u]);
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u) sums[r][u] += a[r * a_row] * values[u];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) found[r][u] = sums[r][u];
}

template <class T, class Vector, int R, int U>
PYSAL_INLINE void tile(const Product<T>* products, int count, T* out, int64_t out_row) {
  constexpr int64_t width = sizeof(Vector) / sizeof(T);
  Vector sums[R][U];
  multiply<T, Vector, R, U>(products, count, sums);
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
};

// All columns of a pass over `width` of them, as tiles of kTileVectors vectors, of one, or of numbers.
template <bool kFirst, class T, class Work>
void columns(const Work& work, int64_t width) {
  using Vector = typename Simd<T>::Vector;
  constexpr int64_t one = Simd<T>::kWidth, wide = kTileVectors * one;
  int64_t column = 0;
  for (; column + wide <= width; column += wide) work.template pass<Vector, kTileVectors, kFirst>(column);
  for (; column + one <= width; column += one) work.template pass<Vector, 1, kFirst>(column);
  if (column == width) return;
  if (width >= one)
    work.template pass<Vector, 1, kFirst>(width - one);  // computes some columns twice, with the same result
  else
    for (; column < width; ++column) work.template pass<T, 1, kFirst>(column);
}

template <class T, int R>
void block(const ScaleSpacePlane<T>& plane, int64_t row) {
  const Block<T, R> work{plane, row};
  columns<true, T>(work, plane.width);
  columns<false, T>(work, plane.width);
}

template <class T>
void rows(const ScaleSpacePlane<T>& plane, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) block<T, kTileRows>(plane, row);
  for (; row < end; ++row) block<T, 1>(plane, row);
}

PYSAL_INLINE float reversed(float value) { return value; }
PYSAL_INLINE double reversed(double value) { return value; }
template <class Vector>
PYSAL_INLINE Vector reversed(Vector value) {
  constexpr int lanes = sizeof value / sizeof value[0];
#if defined(__clang__)
  Vector result;
  for (int k = 0; k < lanes; ++k) result[k] = value[lanes - 1 - k];
  return result;
#else
  decltype(value < value) order;
  for (int k = 0; k < lanes; ++k) order[k] = lanes - 1 - k;
  return __builtin_shuffle(value, order);
#endif
}

// R rows of the upper half and their mirror images, of an image and matrices that are folded.
template <class T, int R>
struct FoldedBlock {
  static constexpr int64_t kLine = kFoldedLine;
  const FoldedScaleSpacePlane<T>& plane;
  int64_t row;

  // What of the sum over 0 <= k < half reaches the places begin <= i < end.
  static Product<T> reaching(const ScaleSpaceHalves<T>& side, int64_t begin, int64_t end, Product<T> all) {
    const int64_t first = begin - side.radius < 0 ? 0 : begin - side.radius;
    const int64_t last = end + side.radius > side.half ? side.half : end + side.radius;
    return {all.a + first * all.a_step, all.a_row, all.a_step, all.b + first * all.b_step, all.b_step, last - first};
  }

  // U vectors of K x, the rows before their mirror images; columns stay folded. The matrices are symmetric: what
  // belongs to neighbouring rows lies side by side.
  template <class Vector, int U>
  PYSAL_INLINE void vertical(const T* matrices, int64_t column, T* out) const {
    constexpr int64_t lanes = sizeof(Vector) / sizeof(T);
    const int64_t half = plane.vertical.half, width = 2 * plane.horizontal.half;
    Vector parts[2][R][U];
    for (int odd = 0; odd < 2; ++odd) {
      const Product<T> product = reaching(
          plane.vertical, row, row + R,
          {matrices + odd * half * half + row, 1, half, plane.source + odd * half * width + column, width, half});
      multiply<T, Vector, R, U, 1>(&product, 1, parts[odd]);
    }
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) {
        T* const place = out + r * kLine + column + u * lanes;
        store(place, parts[0][r][u] + parts[1][r][u]);
        store(place + R * kLine, parts[0][r][u] - parts[1][r][u]);
      }
  }

  struct Factors {
    const T *lines, *matrices;
  };

  // U vectors of the sum of lines K^T on the left, and their mirror images on the right
  template <class Vector, int U>
  PYSAL_INLINE void horizontal(const Factors* factors, int count, int64_t column, T* out) const {
    constexpr int64_t lanes = sizeof(Vector) / sizeof(T);
    const int64_t half = plane.horizontal.half, width = plane.width;
    Vector parts[2][2][R][U];
    for (int odd = 0; odd < 2; ++odd)
      for (int mirrored = 0; mirrored < 2;
           ++mirrored) {  // inside, so that the matrices come from the first-level cache
        Product<T> products[2];
        for (int f = 0; f < count; ++f)
          products[f] = reaching(plane.horizontal, column, column + U * lanes,
                                 {factors[f].lines + mirrored * R * kLine + odd * half, kLine, 1,
                                  factors[f].matrices + odd * half * half + column, half, half});
        multiply<T, Vector, R, U, kLine>(products, count, parts[mirrored][odd]);
      }
    for (int mirrored = 0; mirrored < 2; ++mirrored)
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u) {
          T* const line = out + (mirrored ? plane.height - 1 - row - r : row + r) * width;
          const Vector even = parts[mirrored][0][r][u], odd = parts[mirrored][1][r][u];
          const int64_t left = column + u * lanes;
          store(line + left, even + odd);
          store(line + width - left - lanes, reversed(even - odd));
        }
  }

  template <class Vector, int U, bool kFirst>
  PYSAL_INLINE void pass(int64_t column) const {
    T *u = plane.scratch, *v = u + 2 * R * kLine;
    if (kFirst) {
      vertical<Vector, U>(plane.vertical.level, column, u);
      if (plane.derivatives != nullptr) vertical<Vector, U>(plane.vertical.slope, column, v);
    } else {
      const Factors level[] = {{u, plane.horizontal.level}};
      const Factors derivative[] = {{v, plane.horizontal.next}, {u, plane.horizontal.slope}};
      horizontal<Vector, U>(level, 1, column, plane.levels);
      if (plane.derivatives != nullptr) horizontal<Vector, U>(derivative, 2, column, plane.derivatives);
    }
  }
};

template <class T, int R>
void folded_block(const FoldedScaleSpacePlane<T>& plane, int64_t row) {
  const FoldedBlock<T, R> work{plane, row};
  columns<true, T>(work, 2 * plane.horizontal.half);
  columns<false, T>(work, plane.horizontal.half);
}

template <class T>
void folded_rows(const FoldedScaleSpacePlane<T>& plane, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) folded_block<T, kTileRows>(plane, row);
  for (; row < end; ++row) folded_block<T, 1>(plane, row);
}
}  // namespace

PYSAL_TABLE(GaussianScaleSpaceKernels, gaussian_scale_space) = {rows<float>, rows<double>, folded_rows<float>,
                                                                folded_rows<double>};
}  // namespace pysal::cpu
