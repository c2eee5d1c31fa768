// occlusion_masks: out[n] = fills[rows[n]] inside segment n, images[rows[n]] outside; a segment is a label of a map or
// a box. And back: each pixel's map value is the score of its label, or the mean score of the boxes that cover it.
// With a mean and std per channel, what is written is (x - mean) / std.
// Layouts: images and fills contiguous or channels_last, out in the asked dtype and order, the rest contiguous.
// Work split: a thread owns eight neighbouring elements of out, or one where sizes or addresses forbid 16-byte words,
// for a run of rows n. It keeps image, fill and labels of that place in registers, as out wants them, and takes them
// anew where rows[n] changes: a row is then a selection and a store. Map: the same for eight pixels and a run of
// classes. Means: a block owns a tile of pixels, collects the boxes that touch it, in their order, and each thread adds
// up its pixel's. A row outside [0, batch) gives NaN; boxes are cut at the image's edge. Nothing is read or written
// outside. Bytes: each output is written once; image, fill and labels are read once for a run of rows.
#include "occlusion_masks.h"

#include "layout.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 128, kRun = 16, kClasses = 8;
constexpr int kTileWidth = 32, kTileHeight = 8, kTile = kTileWidth * kTileHeight, kWarp = 32;
constexpr int64_t kNoBox = 0x7fffffff;  // no int32 box covers this line or any after it
constexpr unsigned kAllLanes = 0xffffffffu;

// Walks an image in contiguous or channels_last order; divides only to find its start.
struct Cursor {
  const OcclusionParams& params;
  int64_t channel, y, x;

  __device__ __forceinline__ Cursor(const OcclusionParams& params_, int64_t place) : params(params_) {
    const int64_t pixels = params.height * params.width;
    channel = params.out_last ? place % params.channels : place / pixels;
    const int64_t pixel = params.out_last ? place / params.channels : place % pixels;
    y = pixel / params.width;
    x = pixel % params.width;
  }
  __device__ __forceinline__ int64_t pixel() const { return y * params.width + x; }
  __device__ __forceinline__ int64_t source() const {
    return params.source_last ? pixel() * params.channels + channel : channel * params.height * params.width + pixel();
  }
  __device__ __forceinline__ void advance() {
    if (params.out_last && ++channel < params.channels) return;
    if (params.out_last) channel = 0;
    if (++x < params.width) return;
    x = 0;
    if (++y < params.height) return;
    y = 0;
    ++channel;
  }
};

// Registers: for 4 blocks on a multiprocessor, 3 where double is written: more would spill.
template <class S, class T, bool kBoxes, int kCount>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 3 : 4)
    occlusion_kernel(const OcclusionParams params, bool words) {
  using A = arithmetic_t<S>;
  const Layout as_out{params.channels, params.height * params.width, params.out_last, params.out_last};
  T* __restrict__ const out = static_cast<T*>(params.out);
  const int64_t size = as_out.size(), pieces = size / kCount, runs = ceil_div(params.count, kRun);
  const int64_t stride = int64_t(gridDim.x) * kBlock;
  for (int64_t task = int64_t(blockIdx.x) * kBlock + threadIdx.x; task < runs * pieces; task += stride) {
    const int64_t place = task % pieces * kCount, begin = task / pieces * kRun;
    const int64_t end = min(begin + kRun, params.count);
    T image[kCount] = {}, fill[kCount] = {};
    int labels[kCount] = {};               // of the elements' pixels
    int ys[kCount] = {}, xs[kCount] = {};  // or where these are
    if constexpr (kBoxes) {
      Cursor cursor(params, place);
#pragma unroll
      for (int k = 0; k < kCount; ++k, cursor.advance()) {
        ys[k] = static_cast<int>(min(cursor.y, kNoBox));
        xs[k] = static_cast<int>(min(cursor.x, kNoBox));
      }
    }
    int64_t held = -1;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = params.rows[n];
      if (row < 0 || row >= params.batch) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          image[k] = fill[k] = static_cast<T>(NAN);
          labels[k] = 0;
        }
        held = -1;
      } else if (row != held) {
        const Cursor start(params, place);
        const auto read = [&](const void* images, T* values) {
          const S* __restrict__ const from = static_cast<const S*>(images) + row * size;
          A elements[kCount];
          if (kCount == 8 && words) load_elements<kCount>(from, as_out, place, true, elements);
          if (kCount != 8 || !words || params.mean != nullptr) {
            Cursor cursor = start;
#pragma unroll
            for (int k = 0; k < kCount; ++k, cursor.advance()) {
              if (kCount != 8 || !words) elements[k] = static_cast<A>(from[cursor.source()]);
              if (params.mean != nullptr)
                elements[k] = (elements[k] - static_cast<A>(params.mean[cursor.channel])) /
                              static_cast<A>(params.std[cursor.channel]);
            }
          }
#pragma unroll
          for (int k = 0; k < kCount; ++k) values[k] = static_cast<T>(static_cast<arithmetic_t<T>>(elements[k]));
        };
        read(params.images, image);
        read(params.fills, fill);
        if constexpr (!kBoxes) {
          Cursor cursor = start;
#pragma unroll
          for (int k = 0; k < kCount; ++k, cursor.advance())
            labels[k] = params.labels[row * as_out.pixels + cursor.pixel()];
        }
        held = row;
      }
      Eight<T> chosen;
      if constexpr (kBoxes) {
        const int top = params.boxes[4 * n], left = params.boxes[4 * n + 1];
        const int bottom = params.boxes[4 * n + 2], right = params.boxes[4 * n + 3];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const bool covered = top <= ys[k] && ys[k] < bottom && left <= xs[k] && xs[k] < right;
          chosen.values[k] = covered ? fill[k] : image[k];
        }
      } else {
        const int id = params.ids[n];
#pragma unroll
        for (int k = 0; k < kCount; ++k) chosen.values[k] = labels[k] == id ? fill[k] : image[k];
      }
      T* const target = out + n * size + place;
      if constexpr (kCount == 8)
        store_eight<true>(target, chosen);
      else
        *target = chosen.values[0];
    }
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kBlock) occlusion_map_kernel(const OcclusionMapParams params) {
  const int64_t pieces = params.pixels / kCount, runs = ceil_div(params.classes, kClasses);
  const int64_t stride = int64_t(gridDim.x) * kBlock;
  for (int64_t task = int64_t(blockIdx.x) * kBlock + threadIdx.x; task < params.batch * runs * pieces; task += stride) {
    const int64_t image = task / (runs * pieces), place = task % pieces * kCount;
    const int64_t begin = task / pieces % runs * kClasses, end = min(begin + kClasses, params.classes);
    int labels[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) labels[k] = params.labels[image * params.pixels + place + k];
    for (int64_t plane = image * params.classes + begin; plane < image * params.classes + end; ++plane) {
      const T* __restrict__ const scores = static_cast<const T*>(params.scores) + plane * params.segments;
      T* __restrict__ const target = static_cast<T*>(params.out) + plane * params.pixels + place;
      Eight<T> values;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const bool known = labels[k] >= 0 && labels[k] < params.segments;
        values.values[k] = known ? scores[labels[k]] : static_cast<T>(0.0f);
      }
      if constexpr (kCount == 8)
        store_eight<true>(target, values);
      else
        *target = values.values[0];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTile) occlusion_boxes_map_kernel(const OcclusionBoxesMapParams params) {
  using A = arithmetic_t<T>;
  PYSAL_SHARED(int4, boxes, [kTile]);  // those of the last kTile that touch the tile: left, top, right, bottom
  PYSAL_SHARED(A, scores, [kTile]);
  PYSAL_SHARED(int, found, [kTile / kWarp]);  // by each warp
  const int64_t down = ceil_div(params.height, kTileHeight);
  const int64_t across = ceil_div(params.width, kTileWidth);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  for (int64_t task = blockIdx.x; task < params.planes * down * across; task += gridDim.x) {
    const int64_t plane = task / (down * across);
    const int64_t y0 = task / across % down * kTileHeight, x0 = task % across * kTileWidth;
    const int64_t y = y0 + thread / kTileWidth, x = x0 + thread % kTileWidth;
    A sum = 0;
    int covering = 0;
    for (int64_t first = 0; first < params.segments; first += kTile) {
      const int64_t segment = first + thread;
      int4 box = make_int4(0, 0, 0, 0);
      bool touches = false;
      if (segment < params.segments) {
        const int32_t* const sides = params.boxes + 4 * segment;
        box = make_int4(sides[1], sides[0], sides[3], sides[2]);
        touches = box.x < x0 + kTileWidth && x0 < box.z && box.y < y0 + kTileHeight && y0 < box.w;
      }
      const unsigned votes = __ballot_sync(kAllLanes, touches);
      if (lane == 0) found[warp] = __popc(votes);
      __syncthreads();
      int before = 0, total = 0;
#pragma unroll
      for (int other = 0; other < kTile / kWarp; ++other) {
        before += other < warp ? found[other] : 0;
        total += found[other];
      }
      if (touches) {
        const int slot = before + __popc(votes & ((1u << lane) - 1));
        boxes[slot] = box;
        scores[slot] = static_cast<A>(static_cast<const T*>(params.scores)[plane * params.segments + segment]);
      }
      __syncthreads();
      for (int i = 0; i < total; ++i) {
        const int4 candidate = boxes[i];
        if (candidate.x <= x && x < candidate.z && candidate.y <= y && y < candidate.w) {
          sum += scores[i];
          ++covering;
        }
      }
      // no barrier: the next round counts in `found`, read before the one above, and stores boxes after its own first
    }
    if (y < params.height && x < params.width)
      static_cast<T*>(params.out)[(plane * params.height + y) * params.width + x] =
          static_cast<T>(covering == 0 ? A(0) : sum / static_cast<A>(covering));
  }
}
}  // namespace

void launch_occlusion(DType source, DType target, const OcclusionParams& params, void* stream) {
  const int64_t size = params.channels * params.height * params.width;
  if (params.count == 0 || size == 0) return;
  const bool eights = size % 8 == 0 && aligned_to_16(params.out);
  const bool words = params.source_last == params.out_last && aligned_to_16(params.images, params.fills);
  const int64_t runs = ceil_div(params.count, kRun), pieces = size / (eights ? 8 : 1);
  dispatch(source, [&](auto from) {
    using S = decltype(from);
    dispatch(target, [&](auto to) {
      using T = decltype(to);
      const auto kernel = params.boxes != nullptr
                              ? (eights ? occlusion_kernel<S, T, true, 8> : occlusion_kernel<S, T, true, 1>)
                              : (eights ? occlusion_kernel<S, T, false, 8> : occlusion_kernel<S, T, false, 1>);
      launch("occlusion_masks", kernel, blocks_for(runs * pieces, kBlock), kBlock, 0, stream, params, words);
    });
  });
}

void launch_occlusion_map(DType dtype, const OcclusionMapParams& params, void* stream) {
  if (params.batch == 0 || params.classes == 0 || params.pixels == 0) return;
  const bool eights = params.pixels % 8 == 0 && aligned_to_16(params.out);
  const int64_t runs = ceil_div(params.classes, kClasses), pieces = params.pixels / (eights ? 8 : 1);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = eights ? occlusion_map_kernel<T, 8> : occlusion_map_kernel<T, 1>;
    launch("occlusion_masks_map", kernel, blocks_for(params.batch * runs * pieces, kBlock), kBlock, 0, stream, params);
  });
}

void launch_occlusion_boxes_map(DType dtype, const OcclusionBoxesMapParams& params, void* stream) {
  if (params.planes == 0 || params.height == 0 || params.width == 0) return;
  const int64_t down = ceil_div(params.height, kTileHeight);
  const int64_t across = ceil_div(params.width, kTileWidth);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("occlusion_masks_boxes_map", occlusion_boxes_map_kernel<T>, blocks_for(params.planes * down * across, 1),
           kTile, 0, stream, params);
  });
}
}  // namespace pysal::cuda
