// Rotary embedding of new queries and keys, with RMSNorm of each head before it where the model has QK-norm, and the
// keys and values written where the cache wants them.
//
//   u1, u2 = halves of a head [D] after the norm      y1 = u1 cos - u2 sin,   y2 = u2 cos + u1 sin
//
// A warp takes one head of one token. A lane holds the pairs (i, i + D / 2) for one or more runs of kVector neighbouring
// i.
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
      x.first[run][j] *= scale * load_number(weight, p.weight_dtype, i);
      x.second[run][j] *= scale * load_number(weight, p.weight_dtype, half + i);
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

// Load, norm and rotate a head of a token (queries, then keys, then values). False, with zeros, where its slot is empty.
template <class T, int kVector>
__device__ __forceinline__ bool load_head(Head<kVector>& x, const RopeAppend& p, int64_t token, int head, int lane) {
  x = {};
  const int half = p.head_dim / 2;
  const bool is_query = head < p.heads, is_key = !is_query && head < p.heads + p.groups;
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.cache_rows) return false;
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
  return true;
}

// x / divisor into the numbers from `start` on.
template <int kVector>
__device__ __forceinline__ void store_head(void* to, Number dtype, int64_t start, float divisor, Head<kVector>& x,
                                           int head_dim, int lane) {
  const int half = head_dim / 2;
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

// A key or value head into its cache.
template <int kVector>
__device__ __forceinline__ void append_head(Head<kVector>& x, const RopeAppend& p, int64_t token, int head, int lane) {
  const bool is_key = head < p.heads + p.groups;
  const int group = (head - p.heads) % p.groups;
  const int64_t slot = p.slots[token];
  const float* scale = is_key ? p.k_scale : p.v_scale;
  float divisor = 1;
  if (scale != nullptr) divisor = scale[group];
  const int64_t start = slot / p.page_size * p.page_stride + (slot % p.page_size * p.groups + group) * p.head_dim;
  store_head(is_key ? p.key_cache : p.value_cache, p.cache_dtype, start, divisor, x, p.head_dim, lane);
}

}  // namespace rope
}  // namespace minimind
