// One new query or key head: optional RMSNorm, rotation; and rows of numbers from and to their storage types.
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kMaxHeadDim = 256;

// Bits of |x| rounded to nearest even in a format of kMantissa bits and exponent bias kBias; `largest`: where it ends.
template <int kMantissa, int kBias>
inline uint32_t to_narrow(float x, uint32_t largest, uint32_t nan) {
  if (x != x) return nan;
  uint32_t bits;
  const float magnitude = __builtin_fabsf(x);
  if (magnitude < __builtin_ldexpf(1.0f, 1 - kBias)) {  // subnormal: an integer number of the smallest steps
    const float steps = magnitude * __builtin_ldexpf(1.0f, kBias - 1 + kMantissa) + 8388608.0f;
    __builtin_memcpy(&bits, &steps, 4);
    return bits - 0x4b000000u;
  }
  __builtin_memcpy(&bits, &magnitude, 4);
  bits += (1u << (22 - kMantissa)) - 1 + (bits >> (23 - kMantissa) & 1);
  bits = (bits >> (23 - kMantissa)) - ((127u - kBias) << kMantissa);
  return bits < largest ? bits : largest;
}

inline uint32_t sign_bit(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits >> 31;
}

inline void convert(const float* from, float* to, int n) { __builtin_memcpy(to, from, static_cast<size_t>(n) * 4); }
inline void convert(const float* from, bf16* to, int n) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i), n - i);
}
inline void convert(const float* from, fp16* to, int n) {
  for (int i = 0; i < n; ++i)
    to[i].bits = static_cast<uint16_t>(to_narrow<10, 15>(from[i], 0x7c00, 0x7e00) | sign_bit(from[i]) << 15);
}
inline void convert(const float* from, fp8* to, int n) {  // beyond 448: 448
  for (int i = 0; i < n; ++i)
    to[i].bits = static_cast<uint8_t>(to_narrow<3, 7>(from[i], 0x7e, 0x7f) | sign_bit(from[i]) << 7);
}

template <class T>
inline void widen_row(const T* from, float* to, int n) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i), n - i);
}

// Call f with a pointer of the type `type`.
template <class F>
inline void with_type(Type type, const void* from, F f) {
  switch (type) {
    case Type::float32: return f(static_cast<const float*>(from));
    case Type::bfloat16: return f(static_cast<const bf16*>(from));
    case Type::float16: return f(static_cast<const fp16*>(from));
    case Type::float8: return f(static_cast<const fp8*>(from));
  }
}
inline void load_row(Type type, const void* from, int64_t at, float* to, int n) {
  with_type(type, from, [&](const auto* p) { widen_row(p + at, to, n); });
}
inline void store_row(Type type, const float* from, void* to, int64_t at, int n) {
  switch (type) {
    case Type::float32: return convert(from, static_cast<float*>(to) + at, n);
    case Type::bfloat16: return convert(from, static_cast<bf16*>(to) + at, n);
    case Type::float16: return convert(from, static_cast<fp16*>(to) + at, n);
    case Type::float8: return convert(from, static_cast<fp8*>(to) + at, n);
  }
}

// 1 / sqrt(mean of squares + eps)
inline float inverse_rms(const float* x, int64_t n, float eps) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) squares += load(x + i) * load(x + i);
  if (i < n) {
    const Floats rest = load_some(x + i, n - i);
    squares += rest * rest;
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
}

// x [D] in place: normed if weight [D] is there, then the pairs (i, i + D / 2) turned by the angles of `position`.
inline void rotate_head(float* __restrict x, const Rope& rope, const float* weight, int64_t position, int head_dim) {
  if (weight != nullptr) {
    const float factor = inverse_rms(x, head_dim, rope.eps);
    for (int i = 0; i < head_dim; ++i) x[i] = x[i] * factor * weight[i];
  }
  const int half = head_dim / 2;
  const int64_t row = position < 0 ? 0 : position >= rope.angles ? rope.angles - 1 : position;
  const float *__restrict cos = rope.cos + row * half, *__restrict sin = rope.sin + row * half;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

// Head g's row of the cache at `slot`.
inline int64_t cache_row(const Cache& c, int64_t slot, int64_t g) {
  return slot / c.page_size * c.page_stride + (slot % c.page_size * c.groups + g) * c.head_dim;
}

// Head `index` of the H + 2 G of token n, x [D] in float32: queries are turned in place, keys turned and written, values
// written. Of a token without a slot nothing is written, and its queries are zeros.
inline void place_head(const Rope& rope, const Cache& c, const float* q_weight, const float* k_weight, int64_t n,
                       int64_t index, float* x) {
  const int64_t slot = rope.slots[n], key = index - rope.heads, value = key - c.groups;
  if (slot < 0) {
    for (int i = 0; i < c.head_dim; ++i) x[i] = 0;
    return;
  }
  if (value < 0) rotate_head(x, rope, key < 0 ? q_weight : k_weight, rope.positions[n], c.head_dim);
  if (key < 0) return;
  const int64_t g = value < 0 ? key : value;
  const float* scales = value < 0 ? c.k_scale : c.v_scale;
  if (scales != nullptr)
    for (int i = 0; i < c.head_dim; ++i) x[i] /= scales[g];
  store_row(c.type, x, value < 0 ? c.keys : c.values, cache_row(c, slot, g), c.head_dim);
}

}  // namespace minimind::cpu::MINIMIND_ISA
