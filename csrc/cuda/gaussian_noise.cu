// gaussian_noise: output[n] = images[rows[n]] + scales[rows[n]] * normal(seed, ids[n], samples[n], element), and
// gaussian_noise_bits, the 32-bit words the normals are made of: Philox4x32-10 (Salmon et al. 2011,
// doi 10.1145/2063384.2063405), key = seed, counter = (element / 4, sample, id), and Box-Muller.
// Layout: images and output are contiguous or channels_last, each on its own; elements are counted in C, H, W order
// whatever the layout. Arithmetic is float, double where either is.
// Work split: both contiguous: a thread owns the four elements of one counter. Otherwise a thread owns 4 pixels x 4
// channels: neighbours in a contiguous tensor are 4 pixels, in a channels_last one all channels, so both are read and
// written in whole sectors; where pixels % 4 != 0 a channel starts inside a counter and each counter is made twice.
// Bytes per element of size s: s read (of cache where an image is drawn several times), s written; some 40
// instructions. The dtypes are branches that all threads take alike, next to nothing beside ten rounds; as template
// arguments they would be 32 kernels.
#include "gaussian_noise.h"

#include "cuda_lang.h"

namespace pysal::cuda {
namespace {
constexpr int kBlock = 256;
constexpr int64_t kOfImage = 1024;  // blocks of one image: they fill a GPU; larger images go on in strides

struct Quad {
  uint32_t word[4];
};

struct Stream {
  uint32_t key_low, key_high, sample, id_low, id_high;

  __device__ __forceinline__ Stream(int64_t seed, int64_t sample_, int64_t id)
      : key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        sample(static_cast<uint32_t>(sample_)),
        id_low(static_cast<uint32_t>(id)),
        id_high(static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32)) {}

  __device__ __forceinline__ Quad words(uint32_t quad) const {
    uint32_t c0 = quad, c1 = sample, c2 = id_low, c3 = id_high, key0 = key_low, key1 = key_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ key0;
      c1 = low1;
      c2 = high0 ^ c3 ^ key1;
      c3 = low0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

// sqrt(-2 ln u_0) (cos, sin)(2 pi u_1), u = (r + 0.5) 2^-32, accurate relative to each normal.
__device__ __forceinline__ void box_muller(uint32_t r0, uint32_t r1, float* normals) {
  // a float would round u near 1 to 1: there ln u is taken of 1 - u = (~r + 0.5) 2^-32
  const bool upper = r0 >> 31;
  const float rest = (static_cast<float>(upper ? ~r0 : r0) + 0.5f) * 0x1p-32f;
  const float radius = sqrtf(-2.0f * (upper ? log1pf(-rest) : logf(rest)));
  // the angle less its nearest whole quarters, in integers, so that no bit of r is lost; in half turns, |x| <= 1/4
  const uint32_t quarter = (r1 + 0x20000000u) >> 30;
  const float x = (static_cast<float>(static_cast<int32_t>(r1 - (quarter << 30))) + 0.5f) * 0x1p-31f;
  float sine, cosine;
  sincospif(x, &sine, &cosine);
  const float along = radius * (quarter & 1 ? sine : cosine), across = radius * (quarter & 1 ? cosine : sine);
  normals[0] = (quarter + 1) & 2 ? -along : along;
  normals[1] = quarter & 2 ? -across : across;
}

// u is exact in double
__device__ __forceinline__ void box_muller(uint32_t r0, uint32_t r1, double* normals) {
  const double radius = sqrt(-2.0 * log((r0 + 0.5) * 0x1p-32));
  double sine, cosine;
  sincospi((r1 + 0.5) * 0x1p-31, &sine, &cosine);
  normals[0] = radius * cosine;
  normals[1] = radius * sine;
}

template <class A>
struct Four {
  A values[4];
};

template <class A>
__device__ __forceinline__ Four<A> normals_of(const Stream& stream, uint32_t quad) {
  const Quad words = stream.words(quad);
  Four<A> normals;
  box_muller(words.word[0], words.word[1], normals.values);
  box_muller(words.word[2], words.word[3], normals.values + 2);
  return normals;
}

template <class A>
__device__ __forceinline__ A load(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64:
      return static_cast<A>(static_cast<const double*>(values)[i]);
    case DType::float16:
      return static_cast<A>(static_cast<float>(static_cast<const c10::Half*>(values)[i]));
    case DType::bfloat16:
      return static_cast<A>(static_cast<float>(static_cast<const c10::BFloat16*>(values)[i]));
    default:
      return static_cast<A>(static_cast<const float*>(values)[i]);
  }
}

template <class A>
__device__ __forceinline__ void store(void* values, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(values)[i] = static_cast<double>(value);
      break;
    case DType::float16:
      static_cast<c10::Half*>(values)[i] = static_cast<c10::Half>(static_cast<float>(value));
      break;
    case DType::bfloat16:
      static_cast<c10::BFloat16*>(values)[i] = static_cast<c10::BFloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

// Four elements as one word of 4 sizeof(T) bytes, where the address allows it.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Word {
  T values[4];
};
template <class T, class A>
__device__ __forceinline__ Four<A> load_word(const void* values, int64_t i) {
  const Word<T> word = *reinterpret_cast<const Word<T>*>(static_cast<const T*>(values) + i);
  Four<A> four;
#pragma unroll
  for (int k = 0; k < 4; ++k) four.values[k] = static_cast<A>(word.values[k]);
  return four;
}
template <class T, class A>
__device__ __forceinline__ void store_word(void* values, int64_t i, const Four<A>& four) {
  Word<T> word;
#pragma unroll
  for (int k = 0; k < 4; ++k) word.values[k] = static_cast<T>(four.values[k]);
  *reinterpret_cast<Word<T>*>(static_cast<T*>(values) + i) = word;
}

template <class A>
__device__ __forceinline__ Four<A> load_word(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64:
      return load_word<double, A>(values, i);
    case DType::float16:
      return load_word<c10::Half, A>(values, i);
    case DType::bfloat16:
      return load_word<c10::BFloat16, A>(values, i);
    default:
      return load_word<float, A>(values, i);
  }
}
template <class A>
__device__ __forceinline__ void store_word(void* values, DType dtype, int64_t i, const Four<A>& four) {
  switch (dtype) {
    case DType::float64:
      return store_word<double>(values, i, four);
    case DType::float16:
      return store_word<c10::Half>(values, i, four);
    case DType::bfloat16:
      return store_word<c10::BFloat16>(values, i, four);
    default:
      return store_word<float>(values, i, four);
  }
}

// What row n of the output is made of.
template <class A>
struct Draw {
  Stream stream;
  int64_t row;
  A scale;

  __device__ __forceinline__ Draw(const GaussianNoiseParams& params, int64_t n)
      : stream(params.seed, params.samples[n], params.ids[n]), row(params.rows[n]) {
    const bool known = row >= 0 && row < params.batch;
    scale = known ? static_cast<A>(params.scales[row]) : static_cast<A>(NAN);
    row = known ? row : 0;
  }
};

// Both contiguous. kWords: the pointers allow words of four, and an image holds a multiple of them.
template <class A, bool kWords>
__global__ void __launch_bounds__(kBlock) noise_contiguous_kernel(const GaussianNoiseParams params) {
  const int64_t size = params.channels * params.pixels, quads = ceil_div(size, 4);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = blockIdx.y; n < params.count; n += gridDim.y) {
    const Draw<A> draw(params, n);
    for (int64_t quad = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; quad < quads; quad += stride) {
      const Four<A> normals = normals_of<A>(draw.stream, static_cast<uint32_t>(quad));
      const int64_t from = draw.row * size + 4 * quad, to = n * size + 4 * quad;
      if constexpr (kWords) {
        Four<A> four = load_word<A>(params.images, params.images_dtype, from);
#pragma unroll
        for (int k = 0; k < 4; ++k) four.values[k] += draw.scale * normals.values[k];
        store_word(params.output, params.output_dtype, to, four);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (4 * quad + k < size) {
            const A x = load<A>(params.images, params.images_dtype, from + k);
            store(params.output, params.output_dtype, to + k, x + draw.scale * normals.values[k]);
          }
      }
    }
  }
}

// Any layouts.
template <class A>
__global__ void __launch_bounds__(kBlock) noise_channels_last_kernel(const GaussianNoiseParams params) {
  const int64_t channels = params.channels, pixels = params.pixels, size = channels * pixels;
  const uint32_t channel_groups = static_cast<uint32_t>(ceil_div(channels, 4));
  const int64_t groups = ceil_div(pixels, 4) * channel_groups;  // < 2^32, as size < 2^34
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = blockIdx.y; n < params.count; n += gridDim.y) {
    const Draw<A> draw(params, n);
    for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group < groups; group += stride) {
      const uint32_t pixel_group = static_cast<uint32_t>(group) / channel_groups;
      const int64_t first = 4 * int64_t(pixel_group), begin = 4 * (group - int64_t(pixel_group) * channel_groups);
      const int64_t end = begin + 4 < channels ? begin + 4 : channels;
#pragma unroll 1
      for (int64_t c = begin; c < end; ++c) {
        const int64_t element = c * pixels + first;
        const int skipped = static_cast<int>(element % 4);
        Four<A> normals = normals_of<A>(draw.stream, static_cast<uint32_t>(element / 4)), next = normals;
        if (skipped != 0) next = normals_of<A>(draw.stream, static_cast<uint32_t>(element / 4 + 1));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // element k of the eight, once skipped: chosen by comparisons, as registers have no index
          A normal = normals.values[k];
#pragma unroll
          for (int s = 1; s < 4; ++s)
            if (skipped == s) normal = k + s < 4 ? normals.values[(k + s) % 4] : next.values[(k + s) % 4];
          const int64_t pixel = first + k;
          if (pixel >= pixels) continue;
          const int64_t planar = c * pixels + pixel, interleaved = pixel * channels + c;
          const A x = load<A>(params.images, params.images_dtype,
                              draw.row * size + (params.images_last ? interleaved : planar));
          store(params.output, params.output_dtype, n * size + (params.output_last ? interleaved : planar),
                x + draw.scale * normal);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kBlock) noise_bits_kernel(const GaussianNoiseBitsParams params) {
  const int64_t quads = ceil_div(params.elements, 4), stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = blockIdx.y; n < params.count; n += gridDim.y) {
    const Stream stream(params.seed, params.samples[n], params.ids[n]);
    for (int64_t quad = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; quad < quads; quad += stride) {
      const Quad words = stream.words(static_cast<uint32_t>(quad));
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (4 * quad + k < params.elements) params.output[n * params.elements + 4 * quad + k] = words.word[k];
    }
  }
}

// Items of one image along x, images along y.
dim3 grid_for(int64_t items, int64_t count) {
  const dim3 blocks = blocks_for(min(items, kOfImage * kBlock), kBlock);
  return dim3(blocks.x, static_cast<unsigned>(min(count, kMaxBlocks)));
}

template <class A>
void launch_in(const GaussianNoiseParams& params, void* stream) {
  const int64_t size = params.channels * params.pixels;
  if (params.images_last || params.output_last) {
    const int64_t groups = ceil_div(params.pixels, 4) * ceil_div(params.channels, 4);
    launch("gaussian_noise", noise_channels_last_kernel<A>, grid_for(groups, params.count), kBlock, 0, stream, params);
  } else {
    const bool words = size % 4 == 0 && aligned_to_16(params.images, params.output);
    const auto kernel = words ? noise_contiguous_kernel<A, true> : noise_contiguous_kernel<A, false>;
    launch("gaussian_noise", kernel, grid_for(ceil_div(size, 4), params.count), kBlock, 0, stream, params);
  }
}
}  // namespace

void launch_gaussian_noise(const GaussianNoiseParams& params, void* stream) {
  if (params.count == 0 || params.channels * params.pixels == 0) return;
  if (params.images_dtype == DType::float64 || params.output_dtype == DType::float64)
    launch_in<double>(params, stream);
  else
    launch_in<float>(params, stream);
}

void launch_gaussian_noise_bits(const GaussianNoiseBitsParams& params, void* stream) {
  if (params.count == 0 || params.elements == 0) return;
  launch("gaussian_noise_bits", noise_bits_kernel, grid_for(ceil_div(params.elements, 4), params.count), kBlock, 0,
         stream, params);
}
}  // namespace pysal::cuda
