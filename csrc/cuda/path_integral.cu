// path_integral: points b + alpha (x - b) on straight paths, sums of gradients along them (Sundararajan et al. 2017,
// equation 3), their running mean and squared deviations (Welford 1962), and the final product (x - b) times the sum.
// Layouts: each tensor contiguous or channels_last on its own; threads go in the order of what they write.
// Work split: a thread owns a 16-byte word of the widest of its tensors, four neighbouring elements of an image or
// eight of 16 bits, or one element where sizes or addresses forbid words. Points: for a run of rows n it keeps b and x
// - b in registers and takes them anew where rows[n] changes. Sums and moments: it owns these elements of one image's
// totals and takes the rows of that image from all n in order, so there are no atomics and the order of a sum does not
// depend on the launch; it asks for several rows before it adds the first, since the totals of few images are too few
// threads to hide one load after the other. Weights and counts are read on the device. A row outside [0, batch): points
// are NaN, sums and moments pass it over. Nothing is read or written outside. Bytes: each point is written, each
// gradient, factor and sample read once; totals are read and written once.
#include "path_integral.h"

#include "layout.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 128, kWarp = 32;
constexpr int kRun = 16;  // rows for which a thread keeps its part of a path
template <class A>
constexpr int kTogether = sizeof(A) == 8 ? 2 : 4;  // rows whose loads are under way at once; more would spill
constexpr unsigned kAllLanes = 0xffffffffu;

template <class S, class T, int kCount>
__global__ void __launch_bounds__(kBlock, 4)
    path_points_kernel(const PathPointsParams params, const Layout layout, bool words) {
  using A = arithmetic_t<S>;
  const S* __restrict__ const inputs = static_cast<const S*>(params.inputs);
  const S* __restrict__ const baselines = static_cast<const S*>(params.baselines);
  T* __restrict__ const out = static_cast<T*>(params.out);
  const int64_t size = layout.size(), pieces = size / kCount, runs = ceil_div(params.count, kRun);
  const int64_t stride = int64_t(gridDim.x) * kBlock;
  for (int64_t task = int64_t(blockIdx.x) * kBlock + threadIdx.x; task < runs * pieces; task += stride) {
    const int64_t place = task % pieces * kCount, begin = task / pieces * kRun;
    const int64_t end = min(begin + kRun, params.count);
    A origin[kCount], path[kCount];
    int64_t held = -1;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = params.rows[n];
      if (row < 0 || row >= params.batch) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) origin[k] = path[k] = static_cast<A>(NAN);
        held = -1;
      } else if (row != held) {
        load_elements<kCount>(baselines + row * size, layout, place, words, origin);
        load_elements<kCount>(inputs + row * size, layout, place, words, path);
#pragma unroll
        for (int k = 0; k < kCount; ++k) path[k] -= origin[k];
        held = row;
      }
      const A alpha = static_cast<A>(params.alphas[n]);
      A values[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = origin[k] + alpha * path[k];
      store_elements<kCount>(out + n * size + place, values);
    }
  }
}

// Calls body(ns, found) for the rows n of `image`, in order and at most kMost at once: ns[0] to ns[found - 1]. All
// lanes of a warp must come here together.
template <int kMost, class Body>
__device__ __forceinline__ void each_rows(const int32_t* __restrict__ rows, int64_t count, int64_t image,
                                          const Body& body) {
  for (int64_t first = 0; first < count; first += kWarp) {
    const int64_t mine = first + threadIdx.x % kWarp;
    unsigned votes = __ballot_sync(kAllLanes, mine < count && rows[mine] == image);
    while (votes != 0) {
      int64_t ns[kMost];
      int found = 0;
#pragma unroll
      for (int r = 0; r < kMost; ++r) {
        ns[r] = first + __ffs(static_cast<int>(votes)) - 1;
        found += votes != 0;
        votes &= votes - 1;
      }
      body(ns, found);
    }
  }
}

template <class A, class G, int kCount>
__global__ void __launch_bounds__(kBlock, 4)
    path_accumulate_kernel(const PathAccumulateParams params, const Layout of_gradients, const Layout of_factors) {
  A* __restrict__ const totals = static_cast<A*>(params.totals);
  const G* __restrict__ const gradients = static_cast<const G*>(params.gradients);
  const int64_t size = of_gradients.size(), pieces = size / kCount, tiles = ceil_div(pieces, kBlock);
  for (int64_t task = blockIdx.x; task < params.batch * tiles; task += gridDim.x) {
    const int64_t image = task / tiles, place = (task % tiles * kBlock + threadIdx.x) * kCount;
    const bool inside = place < size;
    A* const target = totals + image * size + place;
    A sums[kCount];
    bool taken = false;
    each_rows<kTogether<A>>(params.rows, params.count, image, [&](const int64_t* ns, int found) {
      if (!inside) return;
      A terms[kTogether<A>][kCount];
#pragma unroll
      for (int r = 0; r < kTogether<A>; ++r)
        if (r < found) load_elements<kCount>(gradients + ns[r] * size, of_gradients, place, (kCount > 1), terms[r]);
#pragma unroll
      for (int r = 0; r < kTogether<A>; ++r)
        if (r < found) {
          const A weight = static_cast<A>(params.weights[ns[r]]);
#pragma unroll
          for (int k = 0; k < kCount; ++k) terms[r][k] *= weight;
        }
      if (params.factors != nullptr) {
        const auto multiply = [&](auto zero) {
          using F = decltype(zero);
#pragma unroll
          for (int r = 0; r < kTogether<A>; ++r)
            if (r < found) {
              A values[kCount];
              load_elements<kCount>(static_cast<const F*>(params.factors) + ns[r] * size, of_factors, place,
                                    (kCount > 1), values);
#pragma unroll
              for (int k = 0; k < kCount; ++k) terms[r][k] *= values[k];
            }
        };
        switch (params.factors_dtype) {
          case DType::float32:
            multiply(float());
            break;
          case DType::float64:
            multiply(double());
            break;
          case DType::float16:
            multiply(c10::Half());
            break;
          case DType::bfloat16:
            multiply(c10::BFloat16());
            break;
        }
      }
      if (!taken) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) sums[k] = target[k];
        taken = true;
      }
#pragma unroll
      for (int r = 0; r < kTogether<A>; ++r)
        if (r < found) {
#pragma unroll
          for (int k = 0; k < kCount; ++k) sums[k] += terms[r][k];
        }
    });
    if (taken) store_elements<kCount>(target, sums);
  }
}

template <class A, class S, int kCount>
__global__ void __launch_bounds__(kBlock, 4) path_moments_kernel(const PathMomentsParams params, const Layout layout) {
  const S* __restrict__ const samples = static_cast<const S*>(params.samples);
  const int64_t size = layout.size(), pieces = size / kCount, tiles = ceil_div(pieces, kBlock);
  for (int64_t task = blockIdx.x; task < params.batch * tiles; task += gridDim.x) {
    const int64_t image = task / tiles, place = (task % tiles * kBlock + threadIdx.x) * kCount;
    const bool inside = place < size;
    A* __restrict__ const mean = static_cast<A*>(params.mean) + image * size + place;
    A* __restrict__ const square = static_cast<A*>(params.squares) + image * size + place;
    A means[kCount], squares[kCount];
    bool taken = false;
    int64_t seen = params.counts[image];
    each_rows<kTogether<A>>(params.rows, params.count, image, [&](const int64_t* ns, int found) {
      if (!inside) return;
      A values[kTogether<A>][kCount];
#pragma unroll
      for (int r = 0; r < kTogether<A>; ++r)
        if (r < found) load_elements<kCount>(samples + ns[r] * size, layout, place, (kCount > 1), values[r]);
      if (!taken) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          means[k] = mean[k];
          squares[k] = square[k];
        }
        taken = true;
      }
#pragma unroll
      for (int r = 0; r < kTogether<A>; ++r)
        if (r < found) {
          const A share = A(1) / static_cast<A>(++seen);  // one division for all elements
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            const A deviation = values[r][k] - means[k];
            means[k] += deviation * share;
            squares[k] += deviation * (values[r][k] - means[k]);
          }
        }
    });
    if (taken) {
      store_elements<kCount>(mean, means);
      store_elements<kCount>(square, squares);
    }
  }
}

// A launch after the moments', whose blocks all read the counts: a warp for each image.
__global__ void __launch_bounds__(kBlock, 4) path_counts_kernel(const PathMomentsParams params) {
  constexpr int kWarps = kBlock / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t image = int64_t(blockIdx.x) * kWarps + warp; image < params.batch;
       image += int64_t(gridDim.x) * kWarps) {
    int64_t seen = 0;
    each_rows<1>(params.rows, params.count, image, [&](const int64_t*, int found) { seen += found; });
    if (lane == 0) params.counts[image] += seen;
  }
}

template <class A, class T, int kCount>
__global__ void __launch_bounds__(kBlock, 4) path_product_kernel(const PathProductParams params) {
  const Layout flat{1, params.count, false, false};
  const int64_t pieces = params.count / kCount, stride = int64_t(gridDim.x) * kBlock;
  for (int64_t piece = int64_t(blockIdx.x) * kBlock + threadIdx.x; piece < pieces; piece += stride) {
    const int64_t place = piece * kCount;
    A x[kCount], b[kCount], total[kCount];
    load_elements<kCount>(static_cast<const T*>(params.inputs), flat, place, true, x);
    load_elements<kCount>(static_cast<const T*>(params.baselines), flat, place, true, b);
    load_elements<kCount>(static_cast<const A*>(params.totals), flat, place, true, total);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = (x[k] - b[k]) * total[k];
    store_elements<kCount>(static_cast<A*>(params.out) + place, x);
  }
}

// Calls body(A()) with the totals' type.
template <class Body>
void dispatch_totals(DType dtype, const Body& body) {
  if (dtype == DType::float64)
    body(double());
  else
    body(float());
}

dim3 tiles_for(int64_t batch, int64_t pieces) { return blocks_for(batch * ceil_div(pieces, kBlock), 1); }
}  // namespace

void launch_path_points(DType source, DType target, const PathPointsParams& params, void* stream) {
  const Layout layout{params.channels, params.pixels, params.source_last, params.out_last};
  if (params.count == 0 || layout.size() == 0) return;
  const bool eights = layout.size() % 8 == 0 && aligned_to_16(params.out);
  const bool words = params.source_last == params.out_last && aligned_to_16(params.inputs, params.baselines);
  const int64_t runs = ceil_div(params.count, kRun);
  dispatch(source, [&](auto from) {
    using S = decltype(from);
    dispatch(target, [&](auto to) {
      using T = decltype(to);
      constexpr int kWord = kElements<S, T>;
      const int64_t pieces = layout.size() / (eights ? kWord : 1);
      const auto kernel = eights ? path_points_kernel<S, T, kWord> : path_points_kernel<S, T, 1>;
      launch("path_integral_points", kernel, blocks_for(runs * pieces, kBlock), kBlock, 0, stream, params, layout,
             words);
    });
  });
}

void launch_path_accumulate(DType totals, DType gradients, const PathAccumulateParams& params, void* stream) {
  const Layout of_gradients{params.channels, params.pixels, params.gradients_last, params.totals_last};
  const Layout of_factors{params.channels, params.pixels, params.factors_last, params.totals_last};
  if (params.count == 0 || params.batch == 0 || of_gradients.size() == 0) return;
  const bool eights = of_gradients.size() % 8 == 0 && params.gradients_last == params.totals_last &&
                      (params.factors == nullptr || params.factors_last == params.totals_last) &&
                      aligned_to_16(params.totals, params.gradients) && aligned_to_16(params.factors);
  dispatch_totals(totals, [&](auto total) {
    using A = decltype(total);
    dispatch(gradients, [&](auto gradient) {
      using G = decltype(gradient);
      constexpr int kWord = kElements<A, G>;
      const auto kernel = eights ? path_accumulate_kernel<A, G, kWord> : path_accumulate_kernel<A, G, 1>;
      launch("path_integral_accumulate_", kernel, tiles_for(params.batch, of_gradients.size() / (eights ? kWord : 1)),
             kBlock, 0, stream, params, of_gradients, of_factors);
    });
  });
}

void launch_path_moments(DType totals, DType samples, const PathMomentsParams& params, void* stream) {
  const Layout layout{params.channels, params.pixels, params.samples_last, params.totals_last};
  if (params.count == 0 || params.batch == 0) return;
  const bool eights = layout.size() % 8 == 0 && params.samples_last == params.totals_last &&
                      aligned_to_16(params.mean, params.squares) && aligned_to_16(params.samples);
  if (layout.size() > 0)
    dispatch_totals(totals, [&](auto total) {
      using A = decltype(total);
      dispatch(samples, [&](auto sample) {
        using S = decltype(sample);
        constexpr int kWord = kElements<A, S>;
        const auto kernel = eights ? path_moments_kernel<A, S, kWord> : path_moments_kernel<A, S, 1>;
        launch("path_integral_moments_", kernel, tiles_for(params.batch, layout.size() / (eights ? kWord : 1)), kBlock,
               0, stream, params, layout);
      });
    });
  launch("path_integral_moments_ counts", path_counts_kernel, blocks_for(params.batch, kBlock / kWarp), kBlock, 0,
         stream, params);
}

void launch_path_product(DType totals, DType inputs, const PathProductParams& params, void* stream) {
  if (params.count == 0) return;
  const bool eights = params.count % 8 == 0 && aligned_to_16(params.inputs, params.baselines) &&
                      aligned_to_16(params.totals, params.out);
  dispatch_totals(totals, [&](auto total) {
    using A = decltype(total);
    dispatch(inputs, [&](auto input) {
      using T = decltype(input);
      constexpr int kWord = kElements<A, T>;
      const auto kernel = eights ? path_product_kernel<A, T, kWord> : path_product_kernel<A, T, 1>;
      launch("path_integral_product", kernel, blocks_for(params.count / (eights ? kWord : 1), kBlock), kBlock, 0,
             stream, params);
    });
  });
}
}  // namespace pysal::cuda
