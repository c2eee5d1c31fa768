// occlusion_masks: out[n] = fills[rows[n]] inside segment n, images[rows[n]] outside; a segment is a label of a map or
// a box. And back: each pixel's map value is the score of its label, or the mean score of the boxes that cover it.
// Layouts: images, fills (B, C, H, W) contiguous or channels_last, out (N, C, H, W) in the asked dtype and format.
// Work split: a task is a band of image lines, small enough for the first-level cache, for a run of rows n. It brings
// the band of the image into the output's dtype and format once, and again only where rows[n] changes; each row n is
// then a copy of the band and, on top, the fill's pixels in the segment.
// With mean and std, images and fills are normalised first, once, into the output's dtype and format.
// Bytes: each output element is written once (twice inside the segment, in cache), each image read once per run.
#include <cstring>

#include "../common/torch_stable.h"
#include "ceil_div.h"
#include "images.h"
#include "indices.h"
#include "pages.h"
#include "parallel.h"

namespace pysal::cpu {
namespace {
constexpr int64_t kBandBytes = 16 << 10;   // image and fill bands and the labels stay in a 48 KiB cache
constexpr int64_t kRunRows = 32;           // rows per task: staging a band costs about one row's copy
constexpr int64_t kTaskBytes = 128 << 10;  // a thread's least work, some ten times the cost of waking it

// Calls span(y, x0, x1) for the parts of lines [y0, y1) that lie in segment n: one box per n.
struct BoxSegments {
  const int32_t* boxes;  // (N, 4)
  Shape shape;

  void enter(int64_t /*row*/, int64_t /*y0*/, int64_t /*y1*/) {}

  template <class Span>
  void spans(int64_t n, int64_t y0, int64_t y1, Span span) const {
    const int32_t* box = boxes + 4 * n;
    const int64_t left = std::max<int64_t>(box[1], 0), right = std::min<int64_t>(box[3], shape.width);
    if (left >= right) return;
    for (int64_t y = std::max<int64_t>(box[0], y0); y < std::min<int64_t>(box[2], y1); ++y) span(y, left, right);
  }
};

// The same for the pixels of label ids[n]; lines whose labels do not reach as far are skipped by their range.
struct LabelSegments {
  static constexpr int64_t kBlock = 32;

  const int32_t* labels;  // (B, H, W)
  const int32_t* ids;     // (N,)
  Shape shape;
  const int32_t* image_labels = nullptr;
  std::vector<std::pair<int32_t, int32_t>> ranges = {};  // of each line of the band

  void enter(int64_t row, int64_t y0, int64_t y1) {
    image_labels = labels + row * shape.pixels();
    ranges.clear();
    for (int64_t y = y0; y < y1; ++y) {
      const int32_t* line = image_labels + y * shape.width;
      int32_t low = line[0], high = line[0];
      for (int64_t x = 1; x < shape.width; ++x) {
        low = std::min(low, line[x]);
        high = std::max(high, line[x]);
      }
      ranges.emplace_back(low, high);
    }
  }

  template <class Span>
  void spans(int64_t n, int64_t y0, int64_t y1, Span span) const {
    const int32_t id = ids[n];
    for (int64_t y = y0; y < y1; ++y) {
      if (id < ranges[y - y0].first || id > ranges[y - y0].second) continue;
      const int32_t* line = image_labels + y * shape.width;
      int64_t x = 0;
      while (x < shape.width) {
        if (x + kBlock <= shape.width) {
          int32_t found = 0;
          for (int64_t i = 0; i < kBlock; ++i) found |= line[x + i] == id;
          if (!found) {
            x += kBlock;
            continue;
          }
        }
        const int64_t block_end = std::min(x + kBlock, shape.width);
        while (x < block_end && line[x] != id) ++x;
        if (x == block_end) continue;
        const int64_t start = x;
        while (x < shape.width && line[x] == id) ++x;
        span(y, start, x);
      }
    }
  }
};

template <class Source, class Target, class Segments>
void write_images(const Source* images, const Source* fills, bool source_last, const int32_t* rows, int64_t count,
                  Shape shape, Target* out, bool target_last, const Segments& all_segments) {
  const int64_t channels = shape.channels, width = shape.width, image_size = shape.size();
  const int64_t line_size = channels * width;
  const int64_t lines = std::clamp<int64_t>(kBandBytes / (line_size * sizeof(Target)), 1, shape.height);
  const int64_t bands = ceil_div(shape.height, lines), runs = ceil_div(count, kRunRows);
  const int64_t task_bytes = lines * line_size * sizeof(Target) * std::min(count, kRunRows);
  const bool as_it_is = std::is_same_v<Source, Target> && source_last == target_last;
  parallel_for(0, runs * bands, 1 + kTaskBytes / task_bytes, [&](int64_t begin, int64_t end) {
    std::vector<Target> staged(as_it_is ? 0 : lines * line_size);
    Segments segments = all_segments;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t y0 = task % bands * lines, y1 = std::min(y0 + lines, shape.height);
      const int64_t first = y0 * width, pixels = (y1 - y0) * width;
      const int64_t n0 = task / bands * kRunRows, n1 = std::min(n0 + kRunRows, count);
      const void* band = nullptr;  // the image's lines, as the output wants them; its channels are band_plane apart
      const int64_t band_plane = as_it_is ? shape.pixels() : pixels;
      for (int64_t n = n0; n < n1; ++n) {
        const Image<const Source> image{images + rows[n] * image_size, source_last};
        const Image<const Source> fill{fills + rows[n] * image_size, source_last};
        if (n == n0 || rows[n] != rows[n - 1]) {
          segments.enter(rows[n], y0, y1);
          band = staged.data();
          if (as_it_is)
            band = image.data + (source_last ? first * channels : first);
          else
            copy_pixels(image, shape, first, pixels, staged.data(), target_last, pixels);
        }
        Target* target = out + n * image_size;
        const auto place = [&](int64_t pixel) { return target + (target_last ? pixel * channels : pixel); };
        const int64_t pieces = target_last ? 1 : channels,
                      piece_bytes = pixels * (target_last ? channels : 1) * sizeof(Target);
        for (int64_t c = 0; c < pieces; ++c)
          std::memcpy(place(first) + c * shape.pixels(), static_cast<const Target*>(band) + c * band_plane,
                      piece_bytes);
        segments.spans(n, y0, y1, [&](int64_t y, int64_t x0, int64_t x1) {
          const int64_t pixel = y * width + x0;
          copy_pixels(fill, shape, pixel, x1 - x0, place(pixel), target_last, shape.pixels());
        });
      }
    }
  });
}

// (x - mean) / std per channel, in the images' arithmetic type.
Tensor normalised(const Tensor& images, const Tensor& mean, const Tensor& std, ScalarType dtype, bool channels_last) {
  const bool source_last = is_channels_last(images);
  const Tensor source = dense(images, source_last);
  const int64_t batch = images.size(0), channels = images.size(1), pixels = images.size(2) * images.size(3);
  Tensor out = empty(images, images.sizes(), dtype, channels_last);
  const double *means = mean.const_data_ptr<double>(), *stds = std.const_data_ptr<double>();
  PYSAL_DISPATCH_FLOATING(images.scalar_type(), "occlusion_masks", [&] {
    using A = arithmetic_t<scalar_t>;
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    PYSAL_DISPATCH_FLOATING(dtype, "occlusion_masks", [&] {
      scalar_t* to = out.mutable_data_ptr<scalar_t>();
      const auto work = 1 + kTaskBytes / (1 + pixels * static_cast<int64_t>(sizeof(scalar_t)));
      parallel_for(0, batch * channels, work, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t image = plane / channels * channels * pixels, c = plane % channels;
          const A centre = static_cast<A>(means[c]), scale = static_cast<A>(stds[c]);
          const int64_t first = source_last ? c : c * pixels, step = source_last ? channels : 1;
          const int64_t target = channels_last ? c : c * pixels, target_step = channels_last ? channels : 1;
          for (int64_t p = 0; p < pixels; ++p)
            to[image + target + p * target_step] =
                convert<scalar_t>((convert<A>(from[image + first + p * step]) - centre) / scale);
        }
      });
    });
  });
  return out;
}

template <class Segments>
Tensor occluded(const char* op, const Tensor& images, const Tensor& fills, const Tensor& rows, ScalarType dtype,
                bool channels_last, const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                const Segments& segments) {
  PYSAL_CHECK(mean.has_value() == std.has_value(), "pysal::", op, ": mean and std must be given together");
  if (mean) {
    for (const Tensor& values : {*mean, *std})
      PYSAL_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Double && values.numel() == images.size(1),
                  "pysal::", op, ": mean and std must be ", images.size(1), " float64 on the CPU, got ", values.numel(),
                  " elements of ", torch::headeronly::toString(values.scalar_type()));
    PYSAL_CHECK(fills.is_cpu() && fills.scalar_type() == images.scalar_type() && fills.sizes().equals(images.sizes()),
                "pysal::", op, ": fills must have the shape, dtype and device of images");
    const Tensor means = dense(*mean), stds = dense(*std);
    return occluded(op, normalised(images, means, stds, dtype, channels_last),
                    normalised(fills, means, stds, dtype, channels_last), rows, dtype, channels_last, std::nullopt,
                    std::nullopt, segments);
  }
  PYSAL_CHECK(fills.is_cpu() && fills.scalar_type() == images.scalar_type() && fills.sizes().equals(images.sizes()),
              "pysal::", op, ": fills must have the shape, dtype and device of images");
  const int64_t count = rows.numel();
  const Tensor checked_rows = image_rows(op, rows, count, images.size(0));
  const bool source_last = is_channels_last(images);
  const Tensor dense_images = dense(images, source_last), dense_fills = dense(fills, source_last);
  const Shape shape = segments.shape;
  Tensor out = empty(images, {count, shape.channels, shape.height, shape.width}, dtype, channels_last);
  if (out.numel() == 0) return out;
  prefer_large_pages(out);
  const int32_t* row = checked_rows.const_data_ptr<int32_t>();
  PYSAL_DISPATCH_FLOATING(images.scalar_type(), "occlusion_masks", [&] {
    const scalar_t* image = dense_images.const_data_ptr<scalar_t>();
    const scalar_t* fill = dense_fills.const_data_ptr<scalar_t>();
    PYSAL_DISPATCH_FLOATING(dtype, "occlusion_masks", [&] {
      scalar_t* target = out.mutable_data_ptr<scalar_t>();
      write_images(image, fill, source_last, row, count, shape, target, channels_last, segments);
    });
  });
  return out;
}

Shape image_shape(const char* op, const Tensor& images) {
  PYSAL_CHECK(images.dim() == 4, "pysal::", op, ": images must have 4 dimensions, got ", images.dim());
  return {images.size(1), images.size(2), images.size(3)};
}

Tensor occlusion_masks_cpu(const Tensor& images, const Tensor& fills, const Tensor& labels, const Tensor& rows,
                           const Tensor& ids, ScalarType dtype, bool channels_last, const std::optional<Tensor>& mean,
                           const std::optional<Tensor>& std) {
  const Shape shape = image_shape("occlusion_masks", images);
  const Tensor map = int32_values("occlusion_masks", "labels", labels, images.size(0) * shape.pixels());
  const Tensor segment = int32_values("occlusion_masks", "ids", ids, rows.numel());
  const LabelSegments segments{map.const_data_ptr<int32_t>(), segment.const_data_ptr<int32_t>(), shape};
  return occluded("occlusion_masks", images, fills, rows, dtype, channels_last, mean, std, segments);
}

Tensor occlusion_masks_boxes_cpu(const Tensor& images, const Tensor& fills, const Tensor& boxes, const Tensor& rows,
                                 ScalarType dtype, bool channels_last, const std::optional<Tensor>& mean,
                                 const std::optional<Tensor>& std) {
  const Shape shape = image_shape("occlusion_masks_boxes", images);
  const Tensor box = int32_values("occlusion_masks_boxes", "boxes", boxes, 4 * rows.numel());
  const BoxSegments segments{box.const_data_ptr<int32_t>(), shape};
  return occluded("occlusion_masks_boxes", images, fills, rows, dtype, channels_last, mean, std, segments);
}

Tensor occlusion_masks_map_cpu(const Tensor& scores, const Tensor& labels) {
  PYSAL_CHECK(scores.dim() == 3, "pysal::occlusion_masks_map: scores must have 3 dimensions, got ", scores.dim());
  PYSAL_CHECK(labels.dim() == 3 && labels.size(0) == scores.size(0),
              "pysal::occlusion_masks_map: labels must have 3 dimensions and the batch of scores, got ", labels.dim(),
              " dimensions");
  const int64_t batch = scores.size(0), classes = scores.size(1), segments = scores.size(2);
  const int64_t height = labels.size(1), width = labels.size(2), pixels = height * width;
  const Tensor map = int32_values("occlusion_masks_map", "labels", labels, batch * pixels), score = dense(scores);
  Tensor out = empty(scores, {batch, classes, height, width});
  if (out.numel() == 0) return out;
  prefer_large_pages(out);
  const int32_t* label = map.const_data_ptr<int32_t>();
  PYSAL_DISPATCH_FLOATING(scores.scalar_type(), "occlusion_masks_map", [&] {
    const scalar_t* value = score.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    // a task is one map of one class: its scores fit a cache, labels and map stream
    parallel_for(0, batch * classes, 1 + (1 << 14) / pixels, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int32_t* labels_of = label + task / classes * pixels;
        const scalar_t* scores_of = value + task * segments;
        scalar_t* map_of = target + task * pixels;
        for (int64_t i = 0; i < pixels; ++i) {
          const bool known = labels_of[i] >= 0 && labels_of[i] < segments;
          map_of[i] = known ? scores_of[labels_of[i]] : static_cast<scalar_t>(0.0f);
        }
      }
    });
  });
  return out;
}

// The lines between neighbouring edges of boxes are all covered by the same ones, and so are the columns: means are
// taken once per such cell, at most once per pixel, 784 instead of 50176 times for 28 x 28 sliding windows.
struct Cells {
  std::vector<int64_t> edges;  // ascending, from 0 to the image's size
  std::vector<int64_t> cell;   // of the pixel, where the pixel is an edge

  Cells(const int32_t* boxes, int64_t count, int low, int64_t size) : cell(size + 1, 0) {
    cell[0] = cell[size] = 1;
    for (int64_t s = 0; s < count; ++s)
      for (const int side : {low, low + 2}) cell[std::clamp<int64_t>(boxes[4 * s + side], 0, size)] = 1;
    for (int64_t i = 0; i <= size; ++i) {
      if (!cell[i]) continue;
      cell[i] = static_cast<int64_t>(edges.size());
      edges.push_back(i);
    }
  }
  int64_t count() const { return static_cast<int64_t>(edges.size()) - 1; }
  int64_t at(int64_t edge) const { return cell[std::clamp<int64_t>(edge, 0, static_cast<int64_t>(cell.size()) - 1)]; }
};

Tensor occlusion_masks_boxes_map_cpu(const Tensor& scores, const Tensor& boxes, int64_t height, int64_t width) {
  PYSAL_CHECK(scores.dim() == 3, "pysal::occlusion_masks_boxes_map: scores must have 3 dimensions, got ", scores.dim());
  PYSAL_CHECK(height >= 0 && width >= 0, "pysal::occlusion_masks_boxes_map: height and width must be at least 0, got ",
              height, " and ", width);
  const int64_t planes = scores.size(0) * scores.size(1), count = scores.size(2);
  const Tensor checked = int32_values("occlusion_masks_boxes_map", "boxes", boxes, 4 * count), score = dense(scores);
  Tensor out = empty(scores, {scores.size(0), scores.size(1), height, width});
  if (out.numel() == 0) return out;
  prefer_large_pages(out);

  const int32_t* box = checked.const_data_ptr<int32_t>();
  const Cells rows(box, count, 0, height), columns(box, count, 1, width);
  const int64_t across = columns.count();
  struct Stretch {
    int64_t box, first, last;  // cells [first, last) of a line of cells
  };
  std::vector<std::vector<Stretch>> crossing(rows.count());  // in order of the boxes
  std::vector<int32_t> covered(rows.count() * across, 0);
  int64_t additions = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = columns.at(box[4 * s + 1]), last = columns.at(box[4 * s + 3]);
    if (first >= last) continue;
    for (int64_t line = rows.at(box[4 * s]); line < rows.at(box[4 * s + 2]); ++line) {
      crossing[line].push_back({s, first, last});
      for (int64_t i = first; i < last; ++i) ++covered[line * across + i];
      additions += last - first;
    }
  }

  PYSAL_DISPATCH_FLOATING(scores.scalar_type(), "occlusion_masks_boxes_map", [&] {
    const scalar_t* values = score.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    const int64_t tasks = planes * rows.count(), work = 1 + (additions + height * width) / rows.count();
    parallel_for(0, tasks, 1 + (1 << 15) / work, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(across);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / rows.count(), line = task % rows.count();
        std::fill(sums.begin(), sums.end(), 0.0);
        for (const Stretch& stretch : crossing[line]) {
          const double value = static_cast<double>(values[plane * count + stretch.box]);
          for (int64_t i = stretch.first; i < stretch.last; ++i) sums[i] += value;
        }
        scalar_t* first_line = target + (plane * height + rows.edges[line]) * width;
        for (int64_t i = 0; i < across; ++i) {
          const int32_t boxes_here = covered[line * across + i];
          const double mean = boxes_here == 0 ? 0.0 : sums[i] / boxes_here;
          std::fill(first_line + columns.edges[i], first_line + columns.edges[i + 1], static_cast<scalar_t>(mean));
        }
        for (int64_t y = 1; y < rows.edges[line + 1] - rows.edges[line]; ++y)
          std::copy(first_line, first_line + width, first_line + y * width);
      }
    });
  });
  return out;
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY_IMPL(pysal, CPU, m) {
  m.impl("occlusion_masks", TORCH_BOX(&pysal::cpu::occlusion_masks_cpu));
  m.impl("occlusion_masks_boxes", TORCH_BOX(&pysal::cpu::occlusion_masks_boxes_cpu));
  m.impl("occlusion_masks_map", TORCH_BOX(&pysal::cpu::occlusion_masks_map_cpu));
  m.impl("occlusion_masks_boxes_map", TORCH_BOX(&pysal::cpu::occlusion_masks_boxes_map_cpu));
}
