// attention: scaled dot product attention, with a bias or without, and the gradient of its inputs. float32. It is for
// prepared models on a CPU alone, so it is no op of the package: engine/graph/fused_attention.py asks for it. Work
// split: a task is a head of an image.
#include "../simd/attention_kernels.h"

#include <algorithm>

#include "../../common/checked.h"
#include "../../common/torch_stable.h"
#include "../ceil_div.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/level.h"

namespace pysal::cpu {
namespace {
void check(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
           const std::optional<Tensor>& bias, double scale) {
  for (const Tensor* t : {&query, &key, &value})
    PYSAL_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 4 && t->stride(3) == 1 &&
                    t->stride(0) >= 0 && t->stride(1) >= 0 && t->stride(2) >= 0 && t->size(3) >= 16 &&
                    t->size(3) % 16 == 0,
                op, ": query, key and value must be (N, heads, tokens, width) in float32 on the CPU, rows dense and ",
                "of a multiple of 16 numbers");
  PYSAL_CHECK(key.size(2) >= 16, op, ": there must be at least 16 keys, got ", key.size(2));
  for (int64_t d : {0, 1, 2, 3})
    PYSAL_CHECK((d == 3 || key.size(d) == value.size(d)) && (d == 2 || key.size(d) == query.size(d)), op,
                ": key and value must have one shape but for the width, and query the key's but for the tokens");
  if (!bias) {
    PYSAL_CHECK(scale > 0, op, ": scale must be above 0 where there is no bias, got ", scale);
    return;
  }
  PYSAL_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float && bias->dim() == 4 && bias->is_contiguous() &&
                  bias->size(0) >= 1 && query.size(0) % bias->size(0) == 0 &&
                  (bias->size(1) == 1 || bias->size(1) == query.size(1)) && bias->size(2) == query.size(2) &&
                  bias->size(3) == ceil_div(key.size(2), 16) * 16,
              op, ": bias must be (windows, 1 or heads, queries, keys up to a multiple of 16) in float32 on the CPU");
}

// (N, heads, tokens, width) with the heads of a token beside each other, as linear layers want them.
Tensor empty_tokens(const Tensor& like, int64_t images, int64_t heads, int64_t tokens, int64_t width) {
  product("pysal_attention", "tokens", {images, heads, tokens, width});
  return empty(like, {images, tokens, heads, width});
}

Attention described(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  Attention a{};
  a.queries = query.size(2), a.keys = key.size(2), a.width = query.size(3), a.value_width = value.size(3);
  a.scale = static_cast<float>(scale);
  a.query_step = query.stride(2), a.key_step = key.stride(2), a.value_step = value.stride(2);
  return a;
}

const float* of(const Tensor& t, int64_t image, int64_t head) {
  return t.const_data_ptr<float>() + image * t.stride(0) + head * t.stride(1);
}

// What is added to the scores of one head of one image: images take the windows in turns.
const float* bias_of(const std::optional<Tensor>& bias, int64_t image, int64_t head) {
  if (!bias) return nullptr;
  const int64_t heads = bias->size(1), window = image % bias->size(0);
  return bias->const_data_ptr<float>() + (window * heads + (heads == 1 ? 0 : head)) * bias->size(2) * bias->size(3);
}

// (N, tokens, heads, width of the values).
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                 double scale) {
  check("pysal_attention::attention", query, key, value, bias, scale);
  const int64_t images = query.size(0), heads = query.size(1), width = value.size(3);
  Tensor output = empty_tokens(query, images, heads, query.size(2), width);
  float* const out = output.mutable_data_ptr<float>();
  const AttentionKernels& kernels = PYSAL_PICK(attention);
  const Attention like = described(query, key, value, scale);
  const int64_t floats = kernels.scratch_floats(like, true);
  parallel_for(0, images * heads, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(floats * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      Attention a = like;
      a.query = of(query, image, head), a.key = of(key, image, head), a.value = of(value, image, head);
      a.bias = bias_of(bias, image, head);
      a.output = out + (image * a.queries * heads + head) * width, a.output_step = heads * width;
      kernels.forward(a, scratch);
    }
  });
  return output;
}

// The gradients of query, key and value, (T N, tokens, heads, width) each, from that of the output, (T N, heads,
// tokens, width of the values), whose row t N + n is one of image n.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const std::optional<Tensor>& bias,
                                                      double scale) {
  const char* op = "pysal_attention::attention_backward";
  check(op, query, key, value, bias, scale);
  const int64_t images = query.size(0), heads = query.size(1), rows = grad.size(0);
  PYSAL_CHECK(grad.is_cpu() && grad.scalar_type() == ScalarType::Float && grad.dim() == 4 && grad.stride(3) == 1 &&
                  grad.stride(0) >= 0 && grad.stride(1) >= 0 && grad.stride(2) >= 0 && grad.size(1) == heads &&
                  grad.size(2) == query.size(2) && grad.size(3) == value.size(3) && images >= 1 && rows % images == 0,
              op, ": grad must be (T N, heads, tokens, width) in float32 on the CPU, rows dense");
  Tensor grads[3];
  float* out[3];
  for (int i = 0; i < 3; ++i) {
    const Tensor& like = i == 0 ? query : i == 1 ? key : value;
    grads[i] = empty_tokens(query, rows, heads, like.size(2), like.size(3));
    out[i] = grads[i].mutable_data_ptr<float>();
  }
  const AttentionKernels& kernels = PYSAL_PICK(attention);
  const Attention like = described(query, key, value, scale);
  const int64_t floats = kernels.scratch_floats(like, false);
  parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = static_cast<float*>(scratch_of(floats * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / heads, head = task % heads, image = row % images;
      const int64_t step = heads * like.width, value_step = heads * like.value_width;
      Attention a = like;
      a.query = of(query, image, head), a.key = of(key, image, head), a.value = of(value, image, head);
      a.bias = bias_of(bias, image, head);
      a.grad = of(grad, row, head), a.grad_step = grad.stride(2);
      a.query_grad_step = a.key_grad_step = step, a.value_grad_step = value_step;
      a.query_grad = out[0] + (row * a.queries * heads + head) * a.width;
      a.key_grad = out[1] + (row * a.keys * heads + head) * a.width;
      a.value_grad = out[2] + (row * a.keys * heads + head) * a.value_width;
      for (int64_t token = 0; token < a.keys; ++token) {
        std::fill_n(a.key_grad + token * step, a.width, 0.0f);
        std::fill_n(a.value_grad + token * value_step, a.value_width, 0.0f);
      }
      kernels.backward(a, scratch);
    }
  });
  return {grads[0], grads[1], grads[2]};
}
}  // namespace
}  // namespace pysal::cpu

STABLE_TORCH_LIBRARY(pysal_attention, m) {
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> Tensor");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> (Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pysal_attention, CPU, m) {
  m.impl("attention", TORCH_BOX(&pysal::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&pysal::cpu::attention_backward));
}
