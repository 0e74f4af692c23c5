// A vector of floats as wide as the instruction set of this compilation, with GCC's and Clang's vector extensions; the
// few intrinsics of the whole CPU half are here. Storage types are widened when they are loaded.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(MINIMIND_USE_NEON)
#include <arm_neon.h>
#endif

#include "args.h"

#define MINIMIND_INLINE inline __attribute__((always_inline))

namespace minimind::cpu::MINIMIND_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int kVectors = kBlock / kWidth;  // of a block of packed weights

using Floats = float __attribute__((vector_size(4 * kWidth)));
using Bits = uint32_t __attribute__((vector_size(4 * kWidth)));
using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * kWidth)));
using Bytes = uint8_t __attribute__((vector_size(kWidth)));
using Doubles = double __attribute__((vector_size(8 * kWidth)));
using Four = float __attribute__((vector_size(16)));

template <class T>
struct Plain {
  using Type = T;
};
template <class T>
struct Plain<T&> {
  using Type = T;
};
template <class T>
struct Plain<const T&> {
  using Type = T;
};
template <class T>
using Bare = typename Plain<T>::Type;  // std::decay_t, near enough

template <class V, class T>
MINIMIND_INLINE V load_as(const T* from) {
  V out;
  __builtin_memcpy(&out, from, sizeof(V));
  return out;
}

MINIMIND_INLINE Floats broadcast(float x) { return x - Floats{}; }
MINIMIND_INLINE Bits broadcast_bits(uint32_t x) { return x - Bits{}; }
MINIMIND_INLINE Floats as_floats(Bits x) { return reinterpret_cast<Floats>(x); }
MINIMIND_INLINE Bits as_bits(Floats x) { return reinterpret_cast<Bits>(x); }
template <class Mask>
MINIMIND_INLINE Floats select(Mask mask, Floats yes, Floats no) {  // mask: the result of a comparison
  return as_floats(((Bits)mask & as_bits(yes)) | (~(Bits)mask & as_bits(no)));
}

MINIMIND_INLINE Bits widen_halves(const void* from) {
  const auto halves = load_as<Halves>(from);
#if defined(__AVX512F__)  // g++ widens each half and puts them together
  return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Bits);
#endif
}
MINIMIND_INLINE Bits widen(const bf16* from) { return widen_halves(from); }
MINIMIND_INLINE Bits widen(const fp16* from) { return widen_halves(from); }
MINIMIND_INLINE Bits widen(const fp8* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(load_as<Bytes>(from))));
#elif defined(MINIMIND_USE_NEON)  // g++ takes four bytes one by one
  return reinterpret_cast<Bits>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load_as<uint32_t>(from))))));
#else
  return __builtin_convertvector(load_as<Bytes>(from), Bits);
#endif
}

MINIMIND_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
MINIMIND_INLINE Floats load(const bf16* from) { return as_floats(widen(from) << 16); }

// A narrow format's exponent and mantissa are moved to their place in a float32, and a product makes up for the bias, of
// subnormal numbers too: exact. special: the least magnitude that is not finite; bits: what those have besides.
template <int kMantissa, int kBias>
MINIMIND_INLINE Floats from_narrow(Bits magnitude, Bits sign, uint32_t special, uint32_t bits) {
  const Bits moved = magnitude << (23 - kMantissa);
  const Floats finite = as_floats(moved) * __builtin_ldexpf(1.0f, 127 - kBias);
  return as_floats(as_bits(select(magnitude >= special, as_floats(moved | bits), finite)) | sign);
}
MINIMIND_INLINE Floats load(const fp16* from) {
  const Bits x = widen(from);
  return from_narrow<10, 15>(x & 0x7fff, (x & 0x8000) << 16, 0x7c00, 0x7f800000);
}
MINIMIND_INLINE Floats load(const fp8* from) {
  const Bits x = widen(from);
  return from_narrow<3, 7>(x & 0x7f, (x & 0x80) << 24, 0x7f, 0x7fc00000);
}

// The first n < kWidth numbers, zeros beyond.
template <class T>
MINIMIND_INLINE Floats load_some(const T* from, int64_t n) {
  T some[kWidth] = {};
  __builtin_memcpy(some, from, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}

MINIMIND_INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof(x)); }
MINIMIND_INLINE void store_some(float* to, Floats x, int64_t n) { __builtin_memcpy(to, &x, static_cast<size_t>(n) * 4); }

// float32 to bfloat16, to nearest even, in the upper half of each number; a NaN stays one.
MINIMIND_INLINE Bits rounded_bits(Floats x) {
  const Bits bits = as_bits(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return as_bits(select(x == x, as_floats(rounded), as_floats(bits | 0x00400000))) & 0xffff0000u;
}
MINIMIND_INLINE Floats round_to_bf16(Floats x) { return as_floats(rounded_bits(x)); }
MINIMIND_INLINE void store(bf16* to, Floats x) {
  const Halves halves = __builtin_convertvector(rounded_bits(x) >> 16, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
MINIMIND_INLINE void store_some(bf16* to, Floats x, int64_t n) {
  bf16 some[kWidth];
  store(some, x);
  __builtin_memcpy(to, some, static_cast<size_t>(n) * 2);
}

// Sum of the lanes. The order of additions is that of `sums` below, so that an output does not depend on which of them
// computes it.
MINIMIND_INLINE Four quarter_sums(Floats x) {
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(x);
  const __m256 half = _mm512_castps512_ps256(v) + _mm512_castps512_ps256(_mm512_shuffle_f32x4(v, v, 0xee));
  return reinterpret_cast<Four>(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 v = reinterpret_cast<__m256>(x);
  return reinterpret_cast<Four>(_mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1));
#else
  return x;
#endif
}
MINIMIND_INLINE float sum(Floats x) {
  const Four q = quarter_sums(x);
#if defined(MINIMIND_USE_NEON)
  const auto v = reinterpret_cast<float32x4_t>(q);
  return vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v)));
#else
  return (q[0] + q[2]) + (q[1] + q[3]);
#endif
}
MINIMIND_INLINE Four sums(Floats a, Floats b, Floats c, Floats d) {  // of four vectors
  const Four qa = quarter_sums(a), qb = quarter_sums(b), qc = quarter_sums(c), qd = quarter_sums(d);
#if defined(__x86_64__)
  const __m128 ab = _mm_unpacklo_ps(qa, qb) + _mm_unpackhi_ps(qa, qb);  // a0+a2 b0+b2 a1+a3 b1+b3
  const __m128 cd = _mm_unpacklo_ps(qc, qd) + _mm_unpackhi_ps(qc, qd);
  return reinterpret_cast<Four>(_mm_movelh_ps(ab, cd) + _mm_movehl_ps(cd, ab));
#elif defined(MINIMIND_USE_NEON)
  const auto halves = [](Four x, Four y) {  // x0+x2 y0+y2 x1+x3 y1+y3
    const auto a = reinterpret_cast<float32x4_t>(x), b = reinterpret_cast<float32x4_t>(y);
    return vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b));
  };
  const float32x4_t ab = halves(qa, qb), cd = halves(qc, qd);
  return reinterpret_cast<Four>(vaddq_f32(vcombine_f32(vget_low_f32(ab), vget_low_f32(cd)),
                                          vcombine_f32(vget_high_f32(ab), vget_high_f32(cd))));
#else
  return Four{(qa[0] + qa[2]) + (qa[1] + qa[3]), (qb[0] + qb[2]) + (qb[1] + qb[3]),
              (qc[0] + qc[2]) + (qc[1] + qc[3]), (qd[0] + qd[2]) + (qd[1] + qd[3])};
#endif
}

#if defined(__AVX512F__)
// Sums of sixteen vectors, out[4 b + r] of x[r][b], each in the order of `sum`: a tree that halves all of them together
// takes half the instructions of four times `sums`.
MINIMIND_INLINE Floats sums(const Floats (&x)[4][4]) {
  __m512 rows[4];
  for (int r = 0; r < 4; ++r) {
    __m512 pairs[2];
    for (int i = 0; i < 2; ++i) {
      const auto a = reinterpret_cast<__m512>(x[r][2 * i]), b = reinterpret_cast<__m512>(x[r][2 * i + 1]);
      pairs[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
    rows[r] = _mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88) + _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd);
  }
  const __m512 even = _mm512_unpacklo_ps(rows[0], rows[2]) + _mm512_unpackhi_ps(rows[0], rows[2]);  // 0 2 0 2, b by b
  const __m512 odd = _mm512_unpacklo_ps(rows[1], rows[3]) + _mm512_unpackhi_ps(rows[1], rows[3]);
  return reinterpret_cast<Floats>(_mm512_unpacklo_ps(even, odd) + _mm512_unpackhi_ps(even, odd));
}
#endif

// e^x within 2 ulp; 0 below -87.3 and the largest float above 88.7. Cephes' reduction and polynomial (Moshier 1992).
MINIMIND_INLINE Floats exponential(Floats x) {
  const Floats low = broadcast(-87.33654f), high = broadcast(88.72283f);
  const Floats bounded = select(x > high, high, select(x < low, low, x));
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // twice half the exponent: 2^128 alone is no float
  const Bits whole = as_bits(shifted) - 0x4b400000u, half = reinterpret_cast<Bits>(reinterpret_cast<Ints>(whole) >> 1);
  const Floats scaled = y * as_floats((half + 127) << 23) * as_floats((whole - half + 127) << 23);
  return select(x < low, Floats{}, scaled);
}

// Sums of products: `Product<T, A>::add` takes kStep numbers of a weight row and as many of an activation row.
template <class T, class A>
struct Product {
  static constexpr int kStep = kWidth;
  using Weight = Floats;
  using Activation = Floats;
  static MINIMIND_INLINE Weight weight(const T* from) { return load(from); }
  static MINIMIND_INLINE Activation activation(const A* from) { return load(from); }
  static MINIMIND_INLINE Floats add(Floats sum, Weight w, Activation x) { return sum + w * x; }
};

// Pairs of bfloat16 that one instruction multiplies, adding both products to a float32.
#if defined(__AVX512BF16__)
#define MINIMIND_HAS_PAIRS
using Pairs = __m512bh;
MINIMIND_INLINE Pairs broadcast_pair(uint32_t x) { return reinterpret_cast<Pairs>(_mm512_set1_epi32(static_cast<int>(x))); }
MINIMIND_INLINE Floats add_products(Floats sum, Pairs a, Pairs b) {
  return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}
#elif defined(MINIMIND_USE_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MINIMIND_HAS_PAIRS
using Pairs = bfloat16x8_t;
MINIMIND_INLINE Pairs broadcast_pair(uint32_t x) { return vreinterpretq_bf16_u32(vdupq_n_u32(x)); }
MINIMIND_INLINE Floats add_products(Floats sum, Pairs a, Pairs b) {
  return reinterpret_cast<Floats>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum), a, b));
}
#endif

// Rows of numbers in memory, `stride` apart; index: which of them, or null for all in order.
template <class A>
struct Rows {
  A* base;
  int64_t stride;
  const int32_t* index = nullptr;

  MINIMIND_INLINE A* operator[](int64_t i) const { return base + (index == nullptr ? i : index[i]) * stride; }
};

// A core has more misses under way when it is told what comes next. Into L2, which can wait for more lines than L1.
constexpr int kAhead = 8192;  // bytes

// How activations are kept for products with weights of type T: rounded to bfloat16 if the weights are, in 16 bits where
// the processor multiplies those, else in float32; of 8-bit weights see int8.h.
template <class T>
struct ActivationOf {
  using Type = float;
};
template <>
struct ActivationOf<bf16> {
#if defined(MINIMIND_HAS_PAIRS)
  using Type = bf16;
#else
  using Type = float;
#endif
};
template <class T>
using Activation = typename ActivationOf<T>::Type;

template <class T>
MINIMIND_INLINE Floats as_factor(Floats x) {
  if constexpr (sizeof(T) == sizeof(bf16) && sizeof(Activation<T>) == sizeof(float)) return round_to_bf16(x);
  return x;
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace minimind::cpu::MINIMIND_ISA
