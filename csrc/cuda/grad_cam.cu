// grad_cam: out = resize(relu(sum over k of w_k A_k)), w_k the mean over space of G_k (Selvaraju et al. 2017, equations
// 1 and 2), bilinear with align_corners=False.
// Layout: activations and gradients contiguous or channels_last, each on its own; out contiguous.
// Work split, two launches: (1) means: contiguous, a warp owns a channel's plane; channels_last, a block owns a group
// of neighbouring channels and its warps share the pixels. (2) map: a block owns a tile of the output, takes the
// weighted sum of the few samples of the map under it, shared out over channels, and interpolates. Tiles are as large
// as still leaves every multiprocessor some. Partial sums are added in a fixed order, so results do not vary. Bytes:
// gradients are read once; activations once, and again where samples lie under two tiles (from L2); out written once.
// 16-byte words where sizes and addresses allow.
#include "grad_cam.h"

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 256, kWarp = 32, kWarps = kBlock / kWarp;
constexpr int kTileLines = 32, kTileColumns = 128;
constexpr int kSamples = 1024;          // of the map, under a tile of the output
constexpr int64_t kEnoughBlocks = 512;  // some for each multiprocessor
constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlock) mean_planes_kernel(const GradCamParams params) {
  using A = arithmetic_t<T>;
  const T* __restrict__ const gradients = static_cast<const T*>(params.gradients);
  A* __restrict__ const weights = static_cast<A*>(params.weights);
  const int64_t pixels = params.height * params.width, planes = params.batch * params.channels;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t plane = int64_t(blockIdx.x) * kWarps + warp; plane < planes; plane += int64_t(gridDim.x) * kWarps) {
    const T* __restrict__ const values = gradients + plane * pixels;
    A sum = 0;
    if constexpr (kAligned) {
      for (int64_t p = 8 * lane; p < pixels; p += 8 * kWarp) {
        const Eight<T> eight = load_eight<true>(values + p);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += static_cast<A>(eight.values[k]);
      }
    } else {
      for (int64_t p = lane; p < pixels; p += kWarp) sum += static_cast<A>(values[p]);
    }
    sum = warp_sum(sum);
    if (lane == 0) weights[plane] = sum / static_cast<A>(pixels);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlock) mean_channels_last_kernel(const GradCamParams params) {
  using A = arithmetic_t<T>;
  constexpr int kPerLane = kAligned ? 8 : 1, kGroup = kPerLane * kWarp;
  PYSAL_SHARED(A, parts, [kWarps][kGroup]);
  const T* __restrict__ const gradients = static_cast<const T*>(params.gradients);
  A* __restrict__ const weights = static_cast<A*>(params.weights);
  const int64_t pixels = params.height * params.width, channels = params.channels;
  const int64_t groups = ceil_div(channels, kGroup);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t task = blockIdx.x; task < params.batch * groups; task += gridDim.x) {
    const int64_t image = task / groups, first = task % groups * kGroup, channel = first + lane * kPerLane;
    const T* __restrict__ const values = gradients + image * pixels * channels + channel;
    A sums[kPerLane] = {};
    if (channel < channels) {
      for (int64_t p = warp; p < pixels; p += kWarps) {
        if constexpr (kAligned) {
          const Eight<T> eight = load_eight<true>(values + p * channels);
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[k] += static_cast<A>(eight.values[k]);
        } else {
          sums[0] += static_cast<A>(values[p * channels]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) parts[warp][lane * kPerLane + k] = sums[k];
    __syncthreads();
    const int mine = static_cast<int>(threadIdx.x);
    if (mine < kGroup && first + mine < channels) {
      A sum = 0;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += parts[part][mine];
      weights[image * channels + first + mine] = sum / static_cast<A>(pixels);
    }
    __syncthreads();
  }
}

// How the tile's outputs along one side lie between samples of the map. Samples under the tile are counted from 0;
// enlarging, they are neighbours, otherwise two for each output.
struct Side {
  int64_t from, to;  // sizes of map and output
  int tile;          // outputs per tile

  // Twice the output's place among the samples, in units of 1 / to, at least 0: whole, so that only shares are rounded.
  __host__ __device__ int64_t place(int64_t i) const {
    const int64_t numerator = (2 * i + 1) * from - to;
    return numerator < 0 ? 0 : numerator;
  }
  __host__ __device__ bool neighbours() const { return from <= to; }
  __host__ __device__ int64_t tiles() const { return ceil_div(to, tile); }
  int64_t most_samples() const { return neighbours() ? (tile - 1) * from / to + 3 : 2 * tile; }
};

template <class A>
struct Tap {
  int first, second;  // samples, counted in the tile
  A share;            // of the second
};

// Fills in the taps of outputs [begin, end) and the places of the samples in the map; returns how many samples.
template <class A>
__device__ __forceinline__ int find_taps(const Side& side, int64_t begin, int64_t end, Tap<A>* taps, int64_t* sources) {
  const int64_t low = side.place(begin) / (2 * side.to);
  const int64_t last = side.place(end - 1) / (2 * side.to) + 1;
  const int64_t high = last < side.from ? last : side.from - 1;
  const int count = static_cast<int>(side.neighbours() ? high - low + 1 : 2 * (end - begin));
  for (int i = static_cast<int>(threadIdx.x); i < end - begin; i += kBlock) {
    const int64_t place = side.place(begin + i), first = place / (2 * side.to), rest = place % (2 * side.to);
    // a sample without a share is not read, so that NaN or infinity there stays there
    const bool alone = rest == 0 || first + 1 == side.from;
    if (side.neighbours()) {
      taps[i].first = static_cast<int>(first - low);
    } else {
      taps[i].first = 2 * i;
      sources[2 * i] = first;
      sources[2 * i + 1] = alone ? first : first + 1;
    }
    taps[i].second = taps[i].first + (alone ? 0 : 1);
    taps[i].share = static_cast<A>(rest) / static_cast<A>(2 * side.to);
  }
  if (side.neighbours())
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlock) sources[i] = low + i;
  return count;
}

template <class T, bool kLast, bool kAligned>
__global__ void __launch_bounds__(kBlock, 2)
    map_kernel(const GradCamParams params, const Side vertical, const Side horizontal) {
  using A = arithmetic_t<T>;
  PYSAL_SHARED(Tap<A>, lines, [kTileLines]);
  PYSAL_SHARED(Tap<A>, columns, [kTileColumns]);
  PYSAL_SHARED(int64_t, line_sources, [2 * kTileLines]);
  PYSAL_SHARED(int64_t, column_sources, [2 * kTileColumns]);
  PYSAL_SHARED(A, samples, [kSamples]);
  PYSAL_SHARED(A, parts, [kBlock]);
  const int64_t pixels = params.height * params.width, channels = params.channels;
  const int64_t down = vertical.tiles(), across = horizontal.tiles();
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t task = blockIdx.x; task < params.batch * down * across; task += gridDim.x) {
    const int64_t image = task / (down * across);
    const int64_t y0 = task / across % down * vertical.tile, x0 = task % across * horizontal.tile;
    const int64_t y1 = min(y0 + vertical.tile, params.out_height), x1 = min(x0 + horizontal.tile, params.out_width);
    const T* __restrict__ const activations = static_cast<const T*>(params.activations) + image * channels * pixels;
    const A* __restrict__ const weights = static_cast<const A*>(params.weights) + image * channels;

    const int sample_lines = find_taps(vertical, y0, y1, lines, line_sources);
    const int sample_columns = find_taps(horizontal, x0, x1, columns, column_sources);
    const int count = sample_lines * sample_columns;
    __syncthreads();

    const auto pixel_of = [&](int sample) {
      return line_sources[sample / sample_columns] * params.width + column_sources[sample % sample_columns];
    };
    const auto rectified = [&](A sum) { return params.relu && sum < A(0) ? A(0) : sum; };  // NaN comes through
    if constexpr (kLast) {  // a warp owns a sample, its lanes the channels
      for (int sample = thread / kWarp; sample < count; sample += kWarps) {
        const T* __restrict__ const values = activations + pixel_of(sample) * channels;
        A sum = 0;
        if constexpr (kAligned) {
          for (int64_t k = 8 * (thread % kWarp); k < channels; k += 8 * kWarp) {
            const Eight<T> eight = load_eight<true>(values + k);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += weights[k + i] * static_cast<A>(eight.values[i]);
          }
        } else {
          for (int64_t k = thread % kWarp; k < channels; k += kWarp) sum += weights[k] * static_cast<A>(values[k]);
        }
        sum = warp_sum(sum);
        if (thread % kWarp == 0) samples[sample] = rectified(sum);
      }
    } else {  // neighbouring threads own neighbouring samples, and where threads are left share the channels
      const int width = min(count, kBlock), slices = kBlock / width, slice = thread / width;
      for (int first = 0; first < count; first += width) {
        const int sample = first + thread % width;
        A sum = 0;
        if (slice < slices && sample < count) {
          const T* __restrict__ const values = activations + pixel_of(sample);
#pragma unroll 4
          for (int64_t k = slice; k < channels; k += slices) sum += weights[k] * static_cast<A>(values[k * pixels]);
        }
        parts[thread] = sum;
        __syncthreads();
        if (thread < width && sample < count) {
          for (int part = 1; part < slices; ++part) sum += parts[part * width + thread];
          samples[sample] = rectified(sum);
        }
        __syncthreads();
      }
    }
    __syncthreads();

    T* __restrict__ const out = static_cast<T*>(params.out) + (image * params.out_height + y0) * params.out_width + x0;
    const auto output = [&](int y, int x) {
      const Tap<A> line = lines[y], column = columns[x];
      const A* const upper = samples + line.first * sample_columns;
      const A* const lower = samples + line.second * sample_columns;
      const A rest = A(1) - column.share;
      const A above = rest * upper[column.first] + column.share * upper[column.second];
      const A below = rest * lower[column.first] + column.share * lower[column.second];
      return static_cast<T>((A(1) - line.share) * above + line.share * below);
    };
    const int tile_width = static_cast<int>(x1 - x0), tile_height = static_cast<int>(y1 - y0);
    if (params.out_width % 8 == 0 && reinterpret_cast<uintptr_t>(params.out) % 16 == 0) {
      const int words = tile_width / 8;
      for (int i = thread; i < words * tile_height; i += kBlock) {
        const int y = i / words, x = i % words * 8;
        Eight<T> eight;
#pragma unroll
        for (int k = 0; k < 8; ++k) eight.values[k] = output(y, x + k);
        store_eight<true>(out + y * params.out_width + x, eight);
      }
    } else {
      for (int i = thread; i < tile_width * tile_height; i += kBlock)
        out[i / tile_width * params.out_width + i % tile_width] = output(i / tile_width, i % tile_width);
    }
    __syncthreads();
  }
}

template <class T>
void launch_means(const GradCamParams& params, void* stream) {
  const int64_t run = params.gradients_last ? params.channels : params.height * params.width;
  const bool aligned = run % 8 == 0 && aligned_to_16(params.gradients, params.gradients);
  if (params.gradients_last) {
    const int64_t group = aligned ? 8 * kWarp : kWarp, groups = ceil_div(params.channels, group);
    const auto kernel = aligned ? mean_channels_last_kernel<T, true> : mean_channels_last_kernel<T, false>;
    launch("grad_cam means", kernel, blocks_for(params.batch * groups, 1), kBlock, 0, stream, params);
  } else {
    const auto kernel = aligned ? mean_planes_kernel<T, true> : mean_planes_kernel<T, false>;
    launch("grad_cam means", kernel, blocks_for(params.batch * params.channels, kWarps), kBlock, 0, stream, params);
  }
}

template <class T>
void launch_map(const GradCamParams& params, void* stream) {
  Side vertical{params.height, params.out_height, kTileLines};
  Side horizontal{params.width, params.out_width, kTileColumns};
  while (horizontal.most_samples() > kSamples / 4) horizontal.tile /= 2;
  while (vertical.tile > 1 &&
         (vertical.most_samples() * horizontal.most_samples() > kSamples ||
          (vertical.tile > 4 && params.batch * vertical.tiles() * horizontal.tiles() < kEnoughBlocks)))
    vertical.tile /= 2;
  const bool aligned = params.channels % 8 == 0 && aligned_to_16(params.activations, params.activations);
  const auto kernel = !params.activations_last ? map_kernel<T, false, false>
                      : aligned                ? map_kernel<T, true, true>
                                               : map_kernel<T, true, false>;
  launch("grad_cam map", kernel, blocks_for(params.batch * vertical.tiles() * horizontal.tiles(), 1), kBlock, 0, stream,
         params, vertical, horizontal);
}
}  // namespace

void launch_grad_cam(DType dtype, const GradCamParams& params, void* stream) {
  if (params.batch == 0 || params.out_height == 0 || params.out_width == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (params.channels > 0) launch_means<T>(params, stream);
    launch_map<T>(params, stream);
  });
}
}  // namespace pysal::cuda
