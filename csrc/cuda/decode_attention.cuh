// Attention of one new query token per sequence over a paged cache, by split-KV ("flash-decoding": Dao et al. 2023).
//
//   o[b, h] = sum_t softmax_t(scale q[b, h] . k[t, g]) v[t, g],   t < lengths[b], g = h / (H / G)
//
// k[t, g] is row (block_table[b, t / S], t % S, g) of the cache. Two kernels: one block for each split of a sequence
// and group of query heads (attention_split.cuh), then one for each head that puts the splits together; where no
// sequence can have a second split there is only the first. Rows beyond a length, and entries of the block table
// beyond it, are never read. No atomics: equal inputs give equal bits.
#pragma once

#include "attention_cuda_core.cuh"
#include "attention_merge.cuh"
#include "attention_tensor_core.cuh"

namespace minimind {

// float32 numbers of scratch, p.partial; 0: none.
inline int64_t decode_attention_scratch(const DecodeAttention& p) {
  return p.splits == 1 ? 0 : static_cast<int64_t>(p.batch) * p.heads * p.splits * (p.head_dim + 2);
}

// aligned: every row of q and of the caches begins at a multiple of 16 bytes.
inline void decode_attention(const DecodeAttention& p, bool aligned, void* stream) {
  using namespace attention;
  if (p.batch == 0) return;
  const int tiles = ceil_div(p.heads / p.groups, kHeads);
  const dim3 grid(p.splits, p.groups * tiles, p.batch);
  const bool narrow = p.cache_dtype == p.dtype || p.cache_dtype == Number::fp8;
  const bool done = aligned && narrow &&
                    (p.dtype == Number::bf16   ? tensor_core_bf16(p, grid, stream)
                     : p.dtype == Number::fp16 ? tensor_core_fp16(p, grid, stream)
                                              : false);
  if (!done) {
    switch (p.cache_dtype) {
      case Number::bf16: launch_cuda_core<bf16>(p, grid, stream); break;
      case Number::fp16: launch_cuda_core<fp16>(p, grid, stream); break;
      case Number::fp8: launch_cuda_core<fp8>(p, grid, stream); break;
      case Number::fp32: launch_cuda_core<float>(p, grid, stream); break;
    }
  }
  if (p.splits > 1) launch(merge_splits_kernel, dim3(p.heads, p.batch), kMergeThreads, 0, stream, p);
}

}  // namespace minimind
