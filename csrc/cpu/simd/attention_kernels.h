// The loops of attention and of its gradient, one table per instruction set.
#pragma once
#include <stdint.h>

namespace pysal::cpu {
// One head of one image: softmax(scale Q K^T + bias) V. Rows of the matrices lie apart as they do in memory; what is
// written lies together or apart likewise. There are at least 16 keys; `width`, the numbers of a query or key, and
// `value_width` are multiples of 16.
struct Attention {
  int64_t queries, keys, width, value_width;
  float scale;        // above 0 where there is no bias
  const float* bias;  // (queries, keys up to a multiple of 16), minus infinity beyond the keys; may be null
  const float *query, *key, *value;
  int64_t query_step, key_step, value_step;  // from one row to the next
  float* output;                             // forward
  int64_t output_step;
  const float* grad;  // backward: of the output
  int64_t grad_step;
  float *query_grad, *key_grad, *value_grad;  // backward: written; the last two are zero before
  int64_t query_grad_step, key_grad_step, value_grad_step;
};

struct AttentionKernels {
  int64_t (*scratch_floats)(const Attention& a, bool forward);
  // scratch is aligned to 64 bytes
  void (*forward)(const Attention& a, float* scratch);
  void (*backward)(const Attention& a, float* scratch);
};
extern const AttentionKernels attention_baseline, attention_avx2, attention_avx512;
}  // namespace pysal::cpu
