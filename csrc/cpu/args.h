// What the operators pass to their CPU kernels: plain structs, and the table of functions that is compiled once for each
// instruction set. No standard library here: an inline function of it, compiled for AVX-512, could be the one copy that
// the linker keeps for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minimind::cpu {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn: no infinity, largest number 448
  uint8_t bits;
};
struct q8 {  // an integer of -127..127, which its row's scale makes a weight
  int8_t value;
};

enum class Type : int { float32, bfloat16, float16, float8 };  // in the order of ops.h

struct Cache {  // one layer's [P, S, G, D]
  void *keys, *values;
  const float *k_scale, *v_scale;  // [G], or null
  int64_t page_stride, rows;       // numbers from page to page; P * S
  int page_size, groups, head_dim;
  Type type;
};

struct Rope {
  const float *cos, *sin;  // [M, D / 2]
  int64_t angles;          // M
  const int32_t* positions;
  const int64_t* slots;
  const void *q_weight, *k_weight;  // [D] of weight_type, or null: no norm
  Type weight_type;
  float eps;
  int heads;
};

struct RopeCall {
  Rope rope;
  Cache cache;
  const void* qkv;  // [N, (H + 2 G) D], rows qkv_stride apart
  void* q;          // [N, H, D], of qkv's type
  Type type;
  int64_t tokens, qkv_stride;
  int threads;
};

struct Tables {
  const int32_t* block_table;  // [B, max_pages], rows table_stride apart
  const int32_t* lengths;
  int64_t table_stride;
};

struct AttentionCall {
  Cache cache;
  Tables tables;
  const void* q;  // [B, H, D], sequences q_stride apart
  void* out;      // [B, H, D]
  Type type;
  int64_t batch, q_stride;
  int heads, threads;
  float scale;
  float* scratch;  // attention_scratch() floats
};

// Packed weights (matmul.h): rows of a block, and what N and K are padded to.
constexpr int64_t kBlock = 16, kPackedK = 4;
constexpr int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }
constexpr int64_t packed_k(int64_t k) { return (k + kPackedK - 1) / kPackedK * kPackedK; }
// For 8-bit weights, K is padded to whole groups of activations (int8.h).
constexpr int kGroup = 64;
constexpr int64_t packed_k8(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

struct Layer {  // matrices packed
  const float *input_norm, *post_norm, *q_norm, *k_norm, *router;
  const void *qkv, *o, *gate_up, *down;
  const void* const* shared;  // gate_up, down of each shared expert
};

struct Step {
  const int64_t* tokens;
  Rope rope;  // norms are the layers'
  Tables tables;
  Cache cache;           // of layer 0; the next ones lie layer_stride numbers apart, their scales `groups` apart
  int64_t layer_stride;
  const void *embedding, *head;  // [V, C] of `type`, the head packed
  const float* final_norm;
  const Layer* layers;
  Type type;      // of the matrices
  bool quantized;  // but the embedding: 8 bits
  int64_t batch, vocab, hidden, expert_inner, shared_inner;  // the last two with their padding
  int num_layers, experts, experts_per_token, shared_experts, threads;
  bool normalize_gates;
  float eps, attention_scale;
  float* logits;  // [B, V], or a row for each of `last`
  const int32_t* last;  // null, or the num_last rows whose logits are wanted
  int64_t num_last;
  char* scratch;  // step_scratch() bytes, at 64
};

struct Document {  // tokens [start, start + length)
  int64_t start, length;
};

// Attention of packed documents, for training: q, dout, out, dq [N, H, D]; k, v, dk, dv [N, G, D]. Backward if dout.
struct DocumentCall {
  const void *q, *k, *v, *dout;
  void *out, *dq, *dk, *dv;
  const Document* documents;  // the longest first, none empty
  int64_t num_documents, heads, groups, head_dim;
  Type type;  // float32 or bfloat16
  int threads;
  float scale;
  char* scratch;  // document_scratch() bytes for each thread, at 64
};

constexpr int64_t kSumOver = 256;  // masses that are added up in one sum, of float64

struct Kernels {
  const char* name;
  void (*rope_append_kv)(const RopeCall&);
  void (*decode_attention)(const AttentionCall&);
  void (*decode_step)(const Step&);
  size_t (*step_scratch)(const Step&);  // bytes
  float (*largest)(const float* x, int64_t n);
  // masses[i] = exp(x[i] - shift); sums[j] = that of masses kSumOver j and on
  void (*masses)(const float* x, float shift, float* masses, double* sums, int64_t n);
  // masses[i] = 0 where x[i] < least or masses[i] < min_mass; sums as above
  void (*keep)(const float* x, float least, float min_mass, float* masses, double* sums, int64_t n);
  void (*document_attention)(const DocumentCall&);
  size_t (*document_scratch)(const DocumentCall&);  // bytes of one thread
};

// Tokens of a sequence that one task of attention takes: a boundary depends on nothing but the position, so that
// a sequence's sums are added up in one order whatever its batch and the number of threads.
constexpr int kChunk = 256;
inline int64_t chunks_of(int64_t length) { return length <= 0 ? 0 : (length + kChunk - 1) / kChunk; }

// Floats for the partial results of sequences of more than one chunk.
inline int64_t attention_scratch(const int32_t* lengths, int64_t batch, int64_t heads, int64_t head_dim) {
  int64_t chunks = 0;
  for (int64_t b = 0; b < batch; ++b) chunks += chunks_of(lengths[b]);
  return chunks * heads * (head_dim + 2);
}

// The kernels that this processor runs, the best first, then a null; generic, the last of them, runs everywhere.
const Kernels* const* all_kernels();

}  // namespace minimind::cpu
