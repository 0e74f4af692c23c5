// Attention of one new query token per sequence over a paged cache, by split-KV ("flash-decoding": Dao et al. 2023).
//
//   o[b, h] = sum_t softmax_t(scale q[b, h] . k[t, g]) v[t, g],   t < lengths[b], g = h / (H / G)
//
// k[t, g] is row (block_table[b, t / S], t % S, g) of the cache. One kernel (attention_split.cuh), whose blocks put
// their parts together themselves. It can norm and rotate the queries and append the new keys and values as well
// (DecodeAttention::fresh). Rows beyond a length, and entries of the block table beyond it, are never read. Equal inputs
// give equal bits: the only atomics count arrivals.
#pragma once

#include "attention_cuda_core.cuh"
#include "attention_tensor_core.cuh"

namespace minimind {

// float32 numbers of scratch, p.partial; 0: none.
inline int64_t decode_attention_scratch(const DecodeAttention& p) {
  return p.splits == 1 ? 0 : static_cast<int64_t>(p.batch) * p.heads * p.splits * (p.head_dim + 2);
}

// Numbers of p.arrivals.
inline int64_t decode_attention_arrivals(const DecodeAttention& p) {
  return static_cast<int64_t>(p.batch) * p.groups * attention::tiles_of_group(p);
}

// aligned: every row of q and of the caches begins at a multiple of 16 bytes.
inline void decode_attention(const DecodeAttention& p, bool aligned, void* stream) {
  using namespace attention;
  if (p.batch == 0) return;
  const bool narrow = p.cache_dtype == p.dtype || p.cache_dtype == Number::fp8;
  const bool done = aligned && narrow &&
                    (p.dtype == Number::bf16   ? tensor_core_bf16(p, stream)
                     : p.dtype == Number::fp16 ? tensor_core_fp16(p, stream)
                                               : false);
  if (!done) cuda_core(p, stream);
}

}  // namespace minimind
