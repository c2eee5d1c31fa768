// gaussian_scale_space: L = K x K^T, a separable Gaussian blur with its own sigma for each image of a batch, and
// gaussian_scale_space_derivative: L with D = (L(sigma + h) - L(sigma)) / h or, for h = 0, dL/dsigma (Xu et al. 2020,
// arXiv:2004.03383, eq. 7), from u = K x and v = (K' - K)/h x as L = u K^T and D = v K'^T + u (K' - K)^T/h.
// Layout: planes of images, levels and derivatives are height x width; those of u and v are width x height, so that
// both passes are one kernel: a filter down the columns whose result is stored transposed.
// Three launches: the taps, in double; the columns; the rows. Sigmas travel by value, so nothing is copied to the GPU.
// Work split of a pass: a block owns 64 lines x 32 columns of a plane's result, a warp 8 lines, a thread 8 lines of one
// column. The block goes through the band in chunks of 64 lines in shared memory, a warp through the part of it that
// reaches its lines: this is the register tile of a matrix product with the band matrix K, which is Toeplitz, so that
// 8 x 8 of its elements are 15 taps of which 8 are new.
// Cost: 8 + 2 reach multiplications per element and product, 2 products for L and 5 with D, where reach is
// min(int(4 sigma + 0.5), side - 1), under reflection min(.., side): a stencil for small sigma, the dense matrix
// product for a large one, whatever sigma is. So there are not two algorithms, and no crossover between them to choose.
// Bytes: 4 elements moved for L, 7 with D; u and v come from L2 where they fit. By these counts an H100, with 3.35e12
// bytes/s and ten times as many multiplications/s, is bound by memory for L in float32 up to 16 + 4 reach = 10 * 16, a
// reach of 36 or sigma of 9, and by arithmetic beyond. Not measured.
#include "gaussian_scale_space.h"

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
// ---- taps
constexpr int kTapsBlock = 128;
constexpr int kSigmas = 64;  // of one launch: 512 of the 4096 bytes that arguments may take

enum Kind { kLevel, kNext, kSlope, kKinds };  // of L(sigma), of L(sigma + step), (next - level) / step

struct TapsParams {
  double sigmas[kSigmas];
  double step;
  int64_t sides[2];  // height, width
  bool derivative, reflect;
  int64_t first;  // the image of sigmas[0]
  void* taps;
  int32_t* reaches;
};

// Where the half kernels of an image and axis are, j = 0..side each: height's kinds, then width's.
__host__ __device__ __forceinline__ int64_t taps_offset(int64_t n, int axis, int64_t height, int64_t width, int kinds) {
  return kinds * (n * (height + width + 2) + (axis == 0 ? 0 : height + 1));
}

// The weights of k and k' before normalisation, and of their difference, which is never taken between nearly equal
// numbers: g' - g = g expm1(j^2 (1/sigma^2 - 1/sigma'^2) / 2), in the limit h = 0 over h, g j^2 / sigma^3.
struct Gaussian {
  double sigma, step, after, exponent;
  int64_t inner, radius;

  __device__ __forceinline__ Gaussian(double sigma_, double step_)
      : sigma(sigma_),
        step(step_),
        after(sigma_ + step_),
        exponent(step_ * (2 * sigma_ + step_) / (2 * sigma_ * sigma_ * after * after)),
        inner(radius_of(sigma_)),
        radius(radius_of(after)) {}

  static __device__ __forceinline__ int64_t radius_of(double sigma) { return static_cast<int64_t>(4 * sigma + 0.5); }
  static __device__ __forceinline__ double weight(double j, double sigma) {
    const double ratio = j / sigma;
    return exp(-0.5 * ratio * ratio);
  }

  // adds times the weights of tap j to sums
  __device__ __forceinline__ void add(int64_t j, double times, bool derivative, double* sums) const {
    const double place = static_cast<double>(j);
    const double before = j == 0 ? 1.0 : j <= inner ? weight(place, sigma) : 0.0;
    sums[kLevel] += times * before;
    if (!derivative) return;
    const double next = j == 0 ? 1.0 : weight(place, after);
    sums[kNext] += times * next;
    if (j == 0) return;
    if (step == 0)
      sums[kSlope] += times * (before * place * place / (sigma * sigma * sigma));
    else
      sums[kSlope] += times * ((j <= inner ? before * expm1(exponent * place * place) : next) / step);
  }
};

// One block per image and axis. Under reflection the line has the period 2 side: tap j acts on the offset j mod 2 side.
template <class A>
__global__ void __launch_bounds__(kTapsBlock) taps_kernel(const TapsParams params) {
  PYSAL_SHARED(double, sums, [kKinds][kTapsBlock]);
  const int thread = static_cast<int>(threadIdx.x), axis = static_cast<int>(blockIdx.y);
  const int64_t n = params.first + blockIdx.x, side = params.sides[axis];
  const Gaussian gaussian(params.sigmas[blockIdx.x], params.step);

  // sums over j = -radius..radius, small weights first, then over the threads as a tree
  double own[kKinds] = {0.0, 0.0, 0.0};
  for (int64_t j = gaussian.radius - thread; j >= 0; j -= kTapsBlock)
    gaussian.add(j, j == 0 ? 1.0 : 2.0, params.derivative, own);
  for (int kind = 0; kind < kKinds; ++kind) sums[kind][thread] = own[kind];
  for (int half = kTapsBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half)
      for (int kind = 0; kind < kKinds; ++kind) sums[kind][thread] += sums[kind][thread + half];
  }
  __syncthreads();
  const double total = sums[kLevel][0], total_after = sums[kNext][0], growth = sums[kSlope][0];

  const int64_t furthest = params.reflect ? side : side - 1;
  const int64_t reach = gaussian.radius < furthest ? gaussian.radius : furthest;
  const int kinds = params.derivative ? kKinds : 1;
  A* __restrict__ const taps =
      static_cast<A*>(params.taps) + taps_offset(n, axis, params.sides[0], params.sides[1], kinds);
  for (int64_t m = thread; m <= reach; m += kTapsBlock) {
    double tap[kKinds] = {0.0, 0.0, 0.0};
    if (params.reflect) {
      for (int64_t j = m; j <= gaussian.radius; j += 2 * side) gaussian.add(j, 1.0, params.derivative, tap);
      if (m < side)
        for (int64_t j = 2 * side - m; j <= gaussian.radius; j += 2 * side)
          gaussian.add(j, 1.0, params.derivative, tap);
    } else {
      gaussian.add(m, 1.0, params.derivative, tap);
    }
    const double level = tap[kLevel] / total;
    taps[m] = static_cast<A>(level);
    if (params.derivative) {
      taps[kNext * (side + 1) + m] = static_cast<A>(tap[kNext] / total_after);
      taps[kSlope * (side + 1) + m] = static_cast<A>((tap[kSlope] - level * growth) / total_after);
    }
  }
  if (thread == 0) params.reaches[2 * n + axis] = static_cast<int32_t>(reach);
}

// ---- filters
constexpr int kRun = 8;  // lines of a thread
constexpr int kWarps = 8, kLanes = 32;
constexpr int kBlock = kWarps * kLanes;
constexpr int kTile = kWarps * kRun;  // lines of a block, and of a chunk of the band
constexpr int kPitch = kLanes + 1;    // so that the transposed store reads 32 banks

struct FilterParams {
  const void* inputs[2];  // planes of length x columns: x; or u and v
  void* outputs[2];       // planes of columns x length: u and v; or L and D
  const void* taps;
  const int32_t* reaches;
  int64_t height, width;
  int64_t channels, image;  // elements from an image to the next, 0 where all are one
  int length, columns;      // below 2^29, so that positions of the reflected line fit
  unsigned line_tiles, column_tiles;
  int axis;
  bool reflect;
};

// Which inputs, outputs and kernels a filter has.
enum class Pass { level, first, second };
template <Pass kPass>
struct Traits {
  static constexpr int kInputs = kPass == Pass::second ? 2 : 1;
  static constexpr int kOutputs = kPass == Pass::level ? 1 : 2;
};

// The place on the line of position k of the extended line, at most one reflection away; negative: none, a zero.
__device__ __forceinline__ int place_of(int k, int length, bool reflect) {
  if (k >= 0 && k < length) return k;
  if (!reflect) return -1;
  const int mirrored = k < 0 ? -1 - k : 2 * length - 1 - k;
  return mirrored < length ? mirrored : -1;
}

// Taps t of the 16 that 8 lines x 8 positions need: line r and position q meet in tap 8 + r - q.
template <class A>
struct Window {
  Eight<A> low, high;
  __device__ __forceinline__ A at(int t) const { return t < 8 ? low.values[t & 7] : high.values[t & 7]; }
};

// Registers: for 4 blocks on a multiprocessor, 2 of the passes with two sums per line, 1 in double: more would spill.
template <Pass kPass, class Source, class Target>
__global__ void __launch_bounds__(kBlock, sizeof(arithmetic_t<Source>) == 8 ? 1
                                          : kPass == Pass::level ? 4
                                                                 : 2) filter_kernel(const FilterParams params) {
  using A = arithmetic_t<Source>;
  constexpr int kInputs = Traits<kPass>::kInputs, kOutputs = Traits<kPass>::kOutputs;
  constexpr int kTableKinds = kPass == Pass::level ? 1 : int(kKinds);
  PYSAL_SHARED(A, tile, [kOutputs][kTile][kPitch]);  // the chunk of the inputs, at the end the outputs
  PYSAL_SHARED(Eight<A>, taps, [kTableKinds][2 * kTile / 8]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int length = params.length, columns = params.columns;
  const unsigned lines_first = blockIdx.x / params.line_tiles;
  const int line = static_cast<int>(blockIdx.x % params.line_tiles) * kTile;
  const int column = static_cast<int>(lines_first % params.column_tiles) * kLanes;
  const int64_t plane = lines_first / params.column_tiles, n = plane / params.channels;
  const int64_t input = n * params.image + (plane - n * params.channels) * length * int64_t(columns);
  const int reach = params.reaches[2 * n + params.axis];
  const A* __restrict__ const table =
      static_cast<const A*>(params.taps) + taps_offset(n, params.axis, params.height, params.width, kTableKinds);

  // the positions that reach these lines; chunks start a multiple of 8 before the tile
  const int last = line + kTile < length ? line + kTile : length;
  const int lowest = params.reflect ? -length : 0, highest = params.reflect ? 2 * length : length;
  const int begin = (line - reach > lowest ? line - reach : lowest) & ~7;
  const int end = last + reach < highest ? last + reach : highest;

  A sums[kOutputs][kRun] = {};
  for (int chunk = begin; chunk < end; chunk += kTile) {
    // the chunk, and the taps for differences of line - chunk - 64 .. line - chunk + 63
#pragma unroll
    for (int k = warp; k < kTile; k += kWarps) {
      const int position = chunk + k, place = position < end ? place_of(position, length, params.reflect) : -1;
      const bool inside = place >= 0 && column + lane < columns;
      const int64_t from = input + place * int64_t(columns) + column + lane;
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
        tile[i][k][lane] = inside ? static_cast<A>(static_cast<const Source*>(params.inputs[i])[from]) : A(0);
    }
    for (int t = thread; t < kTableKinds * 2 * kTile; t += kBlock) {
      const int kind = t / (2 * kTile), x = t % (2 * kTile);
      const int difference = line - chunk + x - kTile, j = difference < 0 ? -difference : difference;
      taps[kind][x / 8].values[x % 8] = j <= reach ? table[kind * int64_t(length + 1) + j] : A(0);
    }
    __syncthreads();

    // groups of 8 positions within reach of the warp's lines
    const int lines = line + warp * kRun - chunk;  // the first one, counted from the chunk
    const int from = lines - reach, to = lines + kRun + reach;
    const int first = (from < 0 ? 0 : from < kTile ? from : kTile) / 8;
    const int stop = (to < 0 ? 0 : to < kTile ? to + 7 : kTile + 7) / 8;
    if (first < stop && line + warp * kRun < length) {
      Window<A> windows[kTableKinds];
#pragma unroll
      for (int kind = 0; kind < kTableKinds; ++kind) windows[kind].low = taps[kind][warp - first + 8];
#pragma unroll 2
      for (int group = first; group < stop; ++group) {
#pragma unroll
        for (int kind = 0; kind < kTableKinds; ++kind) {
          windows[kind].high = windows[kind].low;
          windows[kind].low = taps[kind][warp - group + 7];
        }
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          const A u = tile[0][8 * group + q][lane];
          const A v = tile[kInputs - 1][8 * group + q][lane];
#pragma unroll
          for (int r = 0; r < kRun; ++r) {
            sums[0][r] += windows[kLevel].at(8 + r - q) * u;
            if constexpr (kPass == Pass::first) sums[1][r] += windows[kSlope].at(8 + r - q) * u;
            if constexpr (kPass == Pass::second)
              sums[1][r] += windows[kNext].at(8 + r - q) * v + windows[kSlope].at(8 + r - q) * u;
          }
        }
      }
    }
    __syncthreads();
  }

  // transposed through shared memory: neighbouring threads store neighbouring lines of a column
#pragma unroll
  for (int o = 0; o < kOutputs; ++o)
#pragma unroll
    for (int r = 0; r < kRun; ++r) tile[o][warp * kRun + r][lane] = sums[o][r];
  __syncthreads();
  for (int i = thread; i < kTile * kLanes; i += kBlock) {
    const int row = i % kTile, other = i / kTile;
    if (line + row >= length || column + other >= columns) continue;
    const int64_t to = (plane * columns + column + other) * length + line + row;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
      static_cast<Target*>(params.outputs[o])[to] = static_cast<Target>(tile[o][row][other]);
  }
}

// ---- launches
template <class A>
void launch_taps(const GaussianScaleSpaceParams& params, void* stream) {
  TapsParams taps{};
  taps.step = params.step;
  taps.sides[0] = params.height;
  taps.sides[1] = params.width;
  taps.derivative = params.derivatives != nullptr;
  taps.reflect = params.reflect;
  taps.taps = params.taps;
  taps.reaches = params.reaches;
  for (taps.first = 0; taps.first < params.count; taps.first += kSigmas) {
    const int64_t left = params.count - taps.first, count = left < kSigmas ? left : kSigmas;
    for (int64_t n = 0; n < count; ++n) taps.sigmas[n] = params.sigmas[taps.first + n];
    launch("gaussian_scale_space_taps", taps_kernel<A>, dim3(static_cast<unsigned>(count), 2), kTapsBlock, 0, stream,
           taps);
  }
}

template <Pass kPass, class Source, class Target>
void launch_filter(const FilterParams& params, int64_t planes, void* stream) {
  const int64_t blocks = planes * params.line_tiles * params.column_tiles;
  if (blocks > 0x7fffffff) throw std::runtime_error("pysal: gaussian_scale_space: more blocks than a grid holds");
  launch("gaussian_scale_space", filter_kernel<kPass, Source, Target>, dim3(static_cast<unsigned>(blocks)), kBlock, 0,
         stream, params);
}

template <class T>
void launch_in(const GaussianScaleSpaceParams& params, void* stream) {
  using A = arithmetic_t<T>;
  launch_taps<A>(params, stream);
  const int64_t planes = params.count * params.channels, pixels = params.height * params.width;
  A* const columns = static_cast<A*>(params.columns);
  FilterParams filter{};
  filter.taps = params.taps;
  filter.reaches = params.reaches;
  filter.height = params.height;
  filter.width = params.width;
  filter.channels = params.channels;
  filter.reflect = params.reflect;
  const auto along = [&](int axis, int64_t image) {
    filter.axis = axis;
    filter.image = image;
    filter.length = static_cast<int>(axis == 0 ? params.height : params.width);
    filter.columns = static_cast<int>(axis == 0 ? params.width : params.height);
    filter.line_tiles = static_cast<unsigned>(ceil_div(filter.length, kTile));
    filter.column_tiles = static_cast<unsigned>(ceil_div(filter.columns, kLanes));
  };

  along(0, params.repeated ? 0 : params.channels * pixels);
  filter.inputs[0] = params.images;
  filter.outputs[0] = columns;
  filter.outputs[1] = columns + planes * pixels;
  if (params.derivatives == nullptr)
    launch_filter<Pass::level, T, A>(filter, planes, stream);
  else
    launch_filter<Pass::first, T, A>(filter, planes, stream);

  along(1, params.channels * pixels);
  filter.inputs[0] = columns;
  filter.inputs[1] = columns + planes * pixels;
  filter.outputs[0] = params.levels;
  filter.outputs[1] = params.derivatives;
  if (params.derivatives == nullptr)
    launch_filter<Pass::level, A, T>(filter, planes, stream);
  else
    launch_filter<Pass::second, A, T>(filter, planes, stream);
}
}  // namespace

void launch_gaussian_scale_space(DType dtype, const GaussianScaleSpaceParams& params, void* stream) {
  if (params.count * params.channels * params.height * params.width == 0) return;
  dispatch(dtype, [&](auto zero) { launch_in<decltype(zero)>(params, stream); });
}
}  // namespace pysal::cuda
