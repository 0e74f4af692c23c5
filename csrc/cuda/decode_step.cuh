// A decoding step of a dense model for one to eight sequences: five kernels a layer, and one for the logits.
//
//   qkv       = W_qkv norm(x)                       matvec.cuh; of the first layer it reads the embedding as well
//   attended  = attention(rotate(norm(q)), ...)     decode_attention.cuh; keys and values go into the cache
//   x        += W_o attended
//   hidden    = silu(W_gate norm(x)) W_up norm(x)
//   x        += W_down hidden
//   logits    = W_head norm(x)
//
// Activations are float32 throughout; so is all arithmetic, but that queries are rounded to the 16-bit dtype of the model
// where tensor cores multiply them with keys of the same dtype or of float8. All kernels but the first may overlap the
// one ahead: whatever was enqueued before the step is done when the first one starts.
#pragma once

#include "decode_attention.cuh"
#include "matvec.cuh"

namespace minimind {

struct Matrix {
  const void* weight;
  const float* scales;  // of each row, of weights of 8 bits (matvec.cuh), or null
};

struct StepLayer {
  const void* input_norm;
  Matrix qkv;
  const void *q_norm, *k_norm;
  Matrix o;
  const void* post_norm;
  Matrix gate_up, down;
};

struct DecodeStep {
  const int64_t* tokens;
  const StepLayer* layers;
  const void *embedding, *final_norm;
  Matrix head;
  float *x, *qkv, *attended, *hidden, *logits;  // [B, C], [B, (H + 2 G) D], [B, H D], [B, I], [B, V]
  int64_t vocabulary, layer_stride;             // layer_stride: of the caches, in numbers
  int num_layers, width, inner;
  Number norm_dtype;
  DecodeAttention attention;  // of the first layer, without what the step fills in; its q is null
  bool aligned;               // as decode_attention wants it
};

inline void decode_step(const DecodeStep& s, void* stream) {
  if (s.attention.batch == 0) return;
  DecodeAttention attention = s.attention;
  const int inside = attention.heads * attention.head_dim, projected = inside + 2 * attention.groups * attention.head_dim;
  MatVec of_all = {};
  of_all.batch = attention.batch, of_all.dtype = attention.dtype, of_all.norm_dtype = s.norm_dtype;
  of_all.eps = attention.fresh.eps, of_all.overlap = true;
  const auto product = [&](const Matrix& matrix, const float* x, int k, const void* norm, float* out, int n) {
    MatVec p = of_all;
    p.weight = matrix.weight, p.scales = matrix.scales, p.x = x, p.k = k, p.norm = norm, p.out = out, p.n = n;
    return p;
  };
  for (int i = 0; i < s.num_layers; ++i) {
    const StepLayer& layer = s.layers[i];
    MatVec qkv = product(layer.qkv, s.x, s.width, layer.input_norm, s.qkv, projected);
    if (i == 0) {
      qkv.x = nullptr, qkv.embedding = s.embedding, qkv.tokens = s.tokens, qkv.embedded = s.x;
      qkv.vocabulary = s.vocabulary, qkv.overlap = false;
      qkv.zeros = attention.arrivals, qkv.num_zeros = static_cast<int>(decode_attention_arrivals(attention));
    }
    multiply(qkv, stream);

    attention.fresh.q_weight = layer.q_norm, attention.fresh.k_weight = layer.k_norm;
    decode_attention(attention, s.aligned, stream);
    const int64_t bytes = s.layer_stride * bytes_of(attention.cache_dtype);
    attention.fresh.key_cache = static_cast<char*>(attention.fresh.key_cache) + bytes;
    attention.fresh.value_cache = static_cast<char*>(attention.fresh.value_cache) + bytes;
    attention.key_cache = attention.fresh.key_cache, attention.value_cache = attention.fresh.value_cache;
    for (const float** scale : {&attention.k_scale, &attention.v_scale, &attention.fresh.k_scale, &attention.fresh.v_scale})
      if (*scale != nullptr) *scale += attention.groups;

    MatVec o = product(layer.o, s.attended, inside, nullptr, s.x, s.width);
    MatVec gate_up = product(layer.gate_up, s.x, s.width, layer.post_norm, s.hidden, s.inner);
    MatVec down = product(layer.down, s.hidden, s.inner, nullptr, s.x, s.width);
    o.accumulate = down.accumulate = gate_up.swiglu = true;
    for (const MatVec* p : {&o, &gate_up, &down}) multiply(*p, stream);
  }
  MatVec head = product(s.head, s.x, s.width, s.final_norm, s.logits, static_cast<int>(s.vocabulary));
  head.lengths = attention.lengths;
  multiply(head, stream);
}

}  // namespace minimind
