// Rotary embedding of new queries and keys, with RMSNorm of each head before it where the model has QK-norm, and the
// keys and values written where the cache wants them: one pass over the packed projection, one launch.
//
//   u1, u2 = halves of a head [D] after the norm      y1 = u1 cos - u2 sin,   y2 = u2 cos + u1 sin
//
// A warp takes one head of one token: query, key and value heads follow one another, so what a warp does is one
// uniform branch. A lane holds the pairs (i, i + D / 2) for one or more runs of kVector neighbouring i. Decoding 64
// sequences moves a few hundred KB, so this is bound by the launch; a prefill is bound by memory.
#pragma once

#include "warp.cuh"

namespace minimind {

struct RopeAppend {
  const void* qkv;         // [N, (H + 2 G) D]
  const float *cos, *sin;  // [M, D / 2]
  const int32_t* positions;
  const int64_t* slots;
  const void *q_weight, *k_weight;  // [D] of weight_dtype, or null: no norm
  const float *k_scale, *v_scale;   // [G], or null
  void *q, *key_cache, *value_cache;
  int64_t tokens, qkv_stride, page_stride, cache_rows;  // strides in numbers, not bytes
  int heads, groups, head_dim, angles, page_size;
  Number dtype, cache_dtype, weight_dtype;
  float eps;
  bool pairs;  // D / 2 is even and every row begins at a multiple of two numbers
};

namespace rope {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;
template <int kVector>
constexpr int kRuns = kMaxHeadDim / 2 / kWarp / kVector;  // of a lane

__device__ __forceinline__ float load(const void* from, Number dtype, int64_t i) {
  if (dtype == Number::bf16) return to_float(static_cast<const bf16*>(from)[i]);
  if (dtype == Number::fp16) return to_float(static_cast<const fp16*>(from)[i]);
  return static_cast<const float*>(from)[i];
}

template <class T, int kVector>
__device__ __forceinline__ void load_run(float (&x)[kVector], const T* from) {
  if constexpr (kVector == 2) {
    const auto pair = *reinterpret_cast<const Pair<T>*>(from);
    x[0] = to_float(pair.first), x[1] = to_float(pair.second);
  } else {
    x[0] = to_float(*from);
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store_run(T* to, const float (&x)[kVector]) {
  if constexpr (kVector == 2)
    *reinterpret_cast<Pair<T>*>(to) = {from_float<T>(x[0]), from_float<T>(x[1])};
  else
    *to = from_float<T>(x[0]);
}

template <int kVector>
__device__ __forceinline__ void store_run(void* to, Number dtype, int64_t i, const float (&x)[kVector]) {
  if (dtype == Number::bf16) return store_run(static_cast<bf16*>(to) + i, x);
  if (dtype == Number::fp16) return store_run(static_cast<fp16*>(to) + i, x);
  if (dtype == Number::fp8) return store_run(static_cast<fp8*>(to) + i, x);
  store_run(static_cast<float*>(to) + i, x);
}

// Both halves of a head, as far as this lane holds them; zeros beyond.
template <int kVector>
struct Head {
  float first[kRuns<kVector>][kVector], second[kRuns<kVector>][kVector];
};

template <int kVector>
__device__ __forceinline__ void normalise(Head<kVector>& x, const void* weight, const RopeAppend& p, int lane) {
  float squares = 0;
#pragma unroll
  for (int run = 0; run < kRuns<kVector>; ++run)
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      squares += x.first[run][j] * x.first[run][j] + x.second[run][j] * x.second[run][j];
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(p.head_dim) + p.eps);
  const int half = p.head_dim / 2;
#pragma unroll
  for (int run = 0; run < kRuns<kVector>; ++run)
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int i = (run * kWarp + lane) * kVector + j;
      if (i >= half) continue;
      x.first[run][j] *= scale * load(weight, p.weight_dtype, i);
      x.second[run][j] *= scale * load(weight, p.weight_dtype, half + i);
    }
}

// A position outside the tables takes their first or last row: nothing beyond them is read.
template <int kVector>
__device__ __forceinline__ void rotate(Head<kVector>& x, const RopeAppend& p, int64_t token, int lane) {
  const int half = p.head_dim / 2;
  const int position = min(max(p.positions[token], 0), p.angles - 1);
#pragma unroll
  for (int run = 0; run < kRuns<kVector>; ++run) {
    const int i = (run * kWarp + lane) * kVector;
    if (i >= half) continue;
    float cos[kVector], sin[kVector];
    load_run(cos, p.cos + static_cast<int64_t>(position) * half + i);
    load_run(sin, p.sin + static_cast<int64_t>(position) * half + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float first = x.first[run][j], second = x.second[run][j];
      x.first[run][j] = first * cos[j] - second * sin[j];
      x.second[run][j] = second * cos[j] + first * sin[j];
    }
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarp) rope_append_kv_kernel(RopeAppend p) {
  const int lane = threadIdx.x % kWarp, half = p.head_dim / 2;
  const int all_heads = p.heads + 2 * p.groups;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.tokens * all_heads) return;  // whole warps: the norm's reduction has all its lanes
  const int64_t token = row / all_heads;
  const int head = static_cast<int>(row % all_heads);
  const bool is_query = head < p.heads, is_key = !is_query && head < p.heads + p.groups;
  const int64_t slot = p.slots[token];
  const bool wanted = slot >= 0 && slot < p.cache_rows;
  if (!wanted && !is_query) return;

  Head<kVector> x = {};
  if (wanted) {
    const T* from = static_cast<const T*>(p.qkv) + token * p.qkv_stride + static_cast<int64_t>(head) * p.head_dim;
#pragma unroll
    for (int run = 0; run < kRuns<kVector>; ++run) {
      const int i = (run * kWarp + lane) * kVector;
      if (i >= half) continue;
      load_run(x.first[run], from + i);
      load_run(x.second[run], from + half + i);
    }
    const void* weight = is_query ? p.q_weight : is_key ? p.k_weight : nullptr;
    if (weight != nullptr) normalise(x, weight, p, lane);
    if (is_query || is_key) rotate(x, p, token, lane);
  }

  void* to = p.q;
  Number dtype = p.dtype;
  int64_t start = (token * p.heads + head) * p.head_dim;
  float divisor = 1;
  if (!is_query) {
    const int group = (head - p.heads) % p.groups;
    const float* scale = is_key ? p.k_scale : p.v_scale;
    to = is_key ? p.key_cache : p.value_cache;
    dtype = p.cache_dtype;
    if (scale != nullptr) divisor = scale[group];
    start = slot / p.page_size * p.page_stride + (slot % p.page_size * p.groups + group) * p.head_dim;
  }
#pragma unroll
  for (int run = 0; run < kRuns<kVector>; ++run) {
    const int i = (run * kWarp + lane) * kVector;
    if (i >= half) continue;
    if (divisor != 1) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) x.first[run][j] /= divisor, x.second[run][j] /= divisor;
    }
    store_run(to, dtype, start + i, x.first[run]);
    store_run(to, dtype, start + half + i, x.second[run]);
  }
}

template <int kVector>
void launch_rope(const RopeAppend& p, void* stream) {
  const int64_t rows = p.tokens * (p.heads + 2 * p.groups);
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  const auto kernel = p.dtype == Number::bf16   ? rope_append_kv_kernel<bf16, kVector>
                      : p.dtype == Number::fp16 ? rope_append_kv_kernel<fp16, kVector>
                                               : rope_append_kv_kernel<float, kVector>;
  launch(kernel, grid, kWarps * kWarp, 0, stream, p);
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
