// The operators of the torch library `minimind`: their schema, once for every device. csrc/cpu and csrc/cuda implement
// them; minimind/inference/decode/reference.py has the plain-PyTorch references, whose docstrings are the full
// documentation, and minimind/ops/native.py the shapes for tracing.
//
// B sequences, N tokens, H query heads, G key/value heads, D head size, P pages of S tokens, L layers, V vocabulary.
#include "ops.h"

namespace minimind {
namespace {

const Library schema(nullptr, [](Library& m) {
  // qkv [N, (H + 2 G) D] -> q [N, H, D]; the new keys and values go to rows `slots` int64 [N] (page * S + offset; -1:
  // nowhere, and that q is zero) of key_cache, value_cache [P, S, G, D]; cos, sin float32 [M, D / 2], rows `positions`.
  m.def(
      "rope_append_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, int heads, Tensor? q_weight, Tensor? k_weight, float eps, Tensor? k_scale, "
      "Tensor? v_scale) -> Tensor");
  // q [B, H, D] over the first lengths[b] cached tokens of each sequence, page by page of block_table int32 [B, max_pages].
  // arrivals: int32, at least B H, zeros before and after; a CUDA kernel counts in it, and without it zeros are made first.
  m.def(
      "decode_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor lengths, float scale, "
      "Tensor? k_scale, Tensor? v_scale, Tensor(a!)? arrivals=None) -> Tensor");
  // logits float32 [B, V] -> tokens int64 [B], log_probs float32 [B].
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor repetition_penalty, "
      "Tensor presence_penalty, Tensor history, Tensor seeds, Tensor offsets) -> (Tensor tokens, Tensor log_probs)");
  // A whole step of the whole model: tokens int64 [B] -> logits float32 [B, V]; caches [L, P, S, G, D]. CUDA: of a dense
  // model, B up to 8. weights: embedding [V, C], final norm [C], head [V, C], then for each layer (on a CPU matrices but
  // the embedding packed, as minimind/inference/decode/step.py does it; on a GPU these may be int8, with rows padded to
  // multiples of 16 numbers, each matrix followed by a float32 scale for every row)
  //   input norm [C], qkv [(H + 2 G) D, C], q norm [D], k norm [D] (with qk_norm), o [C, H D], post-attention norm [C],
  //   gate_up [2 I, C], down [C, I]                                                        (experts == 0)
  //   router [E, C], gate_up [E, 2 J, C], down [E, C, J], (gate_up, down) per shared expert  (experts > 0)
  m.def(
      "decode_step(Tensor tokens, Tensor positions, Tensor slots, Tensor block_table, Tensor lengths, Tensor cos, "
      "Tensor sin, Tensor[] weights, Tensor(a!) key_cache, Tensor(b!) value_cache, int heads, bool qk_norm, int experts, "
      "int experts_per_token, int shared_experts, bool normalize_gates, float eps, Tensor? k_scale, Tensor? v_scale) "
      "-> Tensor");
  // The same for N successive tokens of prompts, on a CPU: a row of every argument for each token, of which lengths counts
  // the tokens up to itself. last: int32 [n], the tokens whose logits are wanted -> float32 [n, V].
  m.def(
      "prefill_step(Tensor tokens, Tensor last, Tensor positions, Tensor slots, Tensor block_table, Tensor lengths, "
      "Tensor cos, Tensor sin, Tensor[] weights, Tensor(a!) key_cache, Tensor(b!) value_cache, int heads, bool qk_norm, "
      "int experts, int experts_per_token, int shared_experts, bool normalize_gates, float eps, Tensor? k_scale, "
      "Tensor? v_scale) -> Tensor");
  // Training on a CPU, what minimind/ops/document_attention.py runs: q [N, H, D], k, v [N, G, D], cu_seqlens int32 [n + 1].
  m.def("native_document_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens) -> Tensor");
  m.def(
      "native_document_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
});

}  // namespace
}  // namespace minimind
