// box_regions: regions of images that are one map but for a box each. Pixel (i, j) of region n is pixel
// (y, x) = corners[n] + (i row_step, j column_step) of image n: boxes[n] at (y, x) - origins[n] where that lies in the
// box, else the map, else, beyond the map's edge, a constant. box_regions_depthwise convolves such regions (each
// channel by itself, zeros beyond the edge) without writing them; box_regions_sums sums boxes[n] - map over box n.
// Layout: everything channels_last, weight (kh, kw, C).
// Work split: a thread owns an element of the result, channels next to each other, so that a warp reads and writes
// whole lines; of copies a 16-byte word where channels and addresses allow it; of the sums one (image, channel), whose
// pixels it adds in order. No shared memory: a warp's reads repeat only between the taps of a convolution, and then in
// the first-level cache. Bytes per element of size s: a copy reads and writes s; a convolution reads kh kw s, mostly
// cached, and writes s.
#include "box_regions.h"

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 256;

// Element (y, x, c) of image n, or null beyond the edge.
template <class T>
__device__ __forceinline__ const T* element(const BoxImages& images, int64_t n, int64_t y, int64_t x, int64_t c) {
  if (y < 0 || y >= images.height || x < 0 || x >= images.width) return nullptr;
  const int64_t i = y - images.origins[2 * n], j = x - images.origins[2 * n + 1];
  if (i >= 0 && i < images.box_height && j >= 0 && j < images.box_width)
    return static_cast<const T*>(images.boxes) +
           ((n * images.box_height + i) * images.box_width + j) * images.channels + c;
  return static_cast<const T*>(images.map) + (y * images.width + x) * images.channels + c;
}

// Which element of a region a place of the result is.
struct Place {
  int64_t n, i, j, c;
  __device__ __forceinline__ Place(int64_t place, int64_t height, int64_t width, int64_t channels, bool narrow) {
    const Divided pixel = divided(place, channels, narrow), line = divided(pixel.quotient, width, narrow);
    const Divided region = divided(line.quotient, height, narrow);
    c = pixel.remainder, j = line.remainder, i = region.remainder, n = region.quotient;
  }
};

template <class A>
struct Clamp {
  A lower, upper;
  __device__ __forceinline__ A operator()(A sum) const {
    const A floored = sum < lower ? lower : sum;  // comparisons with NaN are false, so it comes through
    return floored > upper ? upper : floored;
  }
};

template <class T, int kCount>
__global__ void __launch_bounds__(kBlock) box_regions_kernel(const BoxRegionsParams params) {
  const BoxImages& images = params.images;
  T* __restrict__ const out = static_cast<T*>(params.out);
  const T outside = static_cast<T>(static_cast<arithmetic_t<T>>(params.outside));
  const int64_t total = images.count * params.height * params.width * images.channels;
  const bool narrow = total <= INT32_MAX;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * kCount;
  for (int64_t place = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kCount; place < total; place += stride) {
    const Place at(place, params.height, params.width, images.channels, narrow);
    const int64_t y = params.corners[2 * at.n] + at.i * params.row_step;
    const int64_t x = params.corners[2 * at.n + 1] + at.j * params.column_step;
    const T* const source = element<T>(images, at.n, y, x, at.c);
    if constexpr (kCount == 1) {
      out[place] = source == nullptr ? outside : *source;
    } else {
      Several<T, kCount> several;
#pragma unroll
      for (int k = 0; k < kCount; ++k) several.values[k] = outside;
      if (source != nullptr) several = load_several<kCount>(source);
      store_several<kCount>(out + place, several);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) box_regions_depthwise_kernel(const BoxRegionsDepthwiseParams params) {
  using A = arithmetic_t<T>;
  const BoxImages& images = params.images;
  const T* __restrict__ const weight = static_cast<const T*>(params.weight);
  const T* __restrict__ const bias = static_cast<const T*>(params.bias);
  T* __restrict__ const out = static_cast<T*>(params.out);
  const Clamp<A> clamp{static_cast<A>(params.lower), static_cast<A>(params.upper)};
  const int64_t total = images.count * params.height * params.width * images.channels;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; place < total; place += stride) {
    const Place at(place, params.height, params.width, images.channels, false);  // with 32 bits beside it spills
    const int64_t top = params.corners[2 * at.n] + at.i * params.row_step;
    const int64_t left = params.corners[2 * at.n + 1] + at.j * params.column_step;
    A sum = static_cast<A>(bias[at.c]);
    for (int64_t p = 0; p < params.kernel_height; ++p) {
      const T* w = weight + p * params.kernel_width * images.channels + at.c;
#pragma unroll 1  // unrolled, the addresses of all taps at once spill
      for (int64_t q = 0; q < params.kernel_width; ++q, w += images.channels) {
        const T* const source =
            element<T>(images, at.n, top + p * params.row_dilation, left + q * params.column_dilation, at.c);
        sum += static_cast<A>(*w) * (source == nullptr ? A(0) : static_cast<A>(*source));
      }
    }
    out[place] = static_cast<T>(clamp(sum));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) box_regions_sums_kernel(const BoxRegionsSumsParams params) {
  const BoxImages& images = params.images;
  const int64_t total = images.count * images.channels, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; place < total; place += stride) {
    const int64_t n = place / images.channels, c = place % images.channels;
    const int64_t top = images.origins[2 * n], left = images.origins[2 * n + 1];
    double sum = 0.0;
    for (int64_t i = 0; i < images.box_height; ++i)
      for (int64_t j = 0; j < images.box_width; ++j) {
        const T* const changed = element<T>(images, n, top + i, left + j, c);
        if (changed == nullptr) continue;
        const T clean = static_cast<const T*>(images.map)[((top + i) * images.width + left + j) * images.channels + c];
        sum += static_cast<double>(*changed) - static_cast<double>(clean);
      }
    params.out[place] = sum;
  }
}
}  // namespace

void launch_box_regions(DType dtype, const BoxRegionsParams& params, void* stream) {
  const int64_t total = params.images.count * params.height * params.width * params.images.channels;
  if (total == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWord = kElements<T>;
    const bool words = params.images.channels % kWord == 0 && aligned_to_16(params.images.map, params.images.boxes) &&
                       aligned_to_16(params.out, nullptr);
    const auto kernel = words ? box_regions_kernel<T, kWord> : box_regions_kernel<T, 1>;
    launch("box_regions", kernel, blocks_for(total / (words ? kWord : 1), kBlock), kBlock, 0, stream, params);
  });
}

void launch_box_regions_depthwise(DType dtype, const BoxRegionsDepthwiseParams& params, void* stream) {
  const int64_t total = params.images.count * params.height * params.width * params.images.channels;
  if (total == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("box_regions_depthwise", box_regions_depthwise_kernel<T>, blocks_for(total, kBlock), kBlock, 0, stream,
           params);
  });
}

void launch_box_regions_sums(DType dtype, const BoxRegionsSumsParams& params, void* stream) {
  const int64_t total = params.images.count * params.images.channels;
  if (total == 0) return;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("box_regions_sums", box_regions_sums_kernel<T>, blocks_for(total, kBlock), kBlock, 0, stream, params);
  });
}
}  // namespace pysal::cuda
