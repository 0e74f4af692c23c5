// The new queries, keys and values of any number of tokens (rope.cuh): one pass over the packed projection, one launch.
// Query, key and value heads follow one another, so what a warp does is one uniform branch. Decoding 64 sequences moves
// a few hundred KB, so this is bound by the launch; a prefill is bound by memory.
#pragma once

#include "rope.cuh"

namespace minimind {
namespace rope {

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarp) rope_append_kv_kernel(RopeAppend p) {
  const int lane = threadIdx.x % kWarp, all_heads = p.heads + 2 * p.groups;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.tokens * all_heads) return;  // whole warps: the norm's reduction has all its lanes
  const int64_t token = row / all_heads;
  const int head = static_cast<int>(row % all_heads);
  Head<kVector> x;
  const bool wanted = load_head<T>(x, p, token, head, lane);
  if (head < p.heads)
    store_head(p.q, p.dtype, (token * p.heads + head) * p.head_dim, 1.0f, x, p.head_dim, lane);
  else if (wanted)
    append_head(x, p, token, head, lane);
}

template <int kVector>
void launch_rope(const RopeAppend& p, void* stream) {
  const int64_t rows = p.tokens * (p.heads + 2 * p.groups);
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto kernel = p.dtype == Number::bf16   ? rope_append_kv_kernel<bf16, kVector>
                      : p.dtype == Number::fp16 ? rope_append_kv_kernel<fp16, kVector>
                                               : rope_append_kv_kernel<float, kVector>;
  launch(kernel, {blocks, kWarps * kWarp, 0, stream}, p);
}

}  // namespace rope

// D even and at most 256.
inline void rope_append_kv(const RopeAppend& p, void* stream) {
  if (p.tokens == 0) return;
  if (p.pairs)
    rope::launch_rope<2>(p, stream);
  else
    rope::launch_rope<1>(p, stream);
}

}  // namespace minimind
