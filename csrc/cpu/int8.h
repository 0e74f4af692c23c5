// Products of 8-bit integers: a block of sixteen weight rows, each with one scale, times activations with one scale for
// each group of kGroup numbers. For each group, the integer products are summed and multiplied by the scale of the
// group; the groups are added in float32, and the sum is multiplied by the scale of the row. The integer sums are
// exact, so all instruction sets give the same result.
//
//   block   [K / 4, 16, 4] integers of -127..127, then 16 scales, float32
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kWords = kGroup / 4;  // one instruction multiplies a word of four integers of each row
constexpr float kLargest = 127;
constexpr float kNothing = 1e-30f;  // groups without a larger number become zeros; kLargest / kNothing is still finite

// One group of an activation row. offset: the initial value of the group's sum.
#if defined(__x86_64__) && (defined(__AVX2__) || defined(__AVX512BW__))
struct ActivationGroup {
  int8_t values[kGroup];
  float scale;
  int32_t offset;
};
#else
struct ActivationGroup {
  float values[kGroup];  // integers, stored as float32
  float scale;
};
#endif

template <>
struct ActivationOf<q8> {
  using Type = ActivationGroup;
};

// `IntegerProduct::add(sum, w, x)` adds to every lane the products of its four weights with four activations.
#if defined(__AVX512VNNI__)
struct IntegerProduct {
  using Sum = __m512i;
  using Weight = __m512i;
  using Activation = __m512i;
  // One factor must be unsigned, so the weights are shifted by 128; an offset of -128 * sum(activations) undoes that.
  static MINIMIND_INLINE Sum start(const ActivationGroup& x) { return _mm512_set1_epi32(x.offset); }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    return _mm512_xor_si512(load_as<__m512i>(from), _mm512_set1_epi8(-128));
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    return _mm512_set1_epi32(load_as<int>(x.values + 4 * word));
  }
  static MINIMIND_INLINE Sum add(Sum sum, Weight w, Activation x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static MINIMIND_INLINE Floats floats(Sum sum) { return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(sum)); }
};
#elif defined(__AVX512BW__)
struct IntegerProduct {
  using Sum = __m512i;
  struct Weight {
    __m512i magnitude;
    __mmask64 negative;
  };
  using Activation = __m512i;
  static MINIMIND_INLINE Sum start(const ActivationGroup&) { return _mm512_setzero_si512(); }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    const auto w = load_as<__m512i>(from);
    return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    return _mm512_set1_epi32(load_as<int>(x.values + 4 * word));
  }
  static MINIMIND_INLINE Sum add(Sum sum, Weight w, Activation x) {  // a pair's sum is below 2^15: nothing saturates
    const __m512i with_sign = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
    const __m512i pairs = _mm512_maddubs_epi16(w.magnitude, with_sign);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static MINIMIND_INLINE Floats floats(Sum sum) { return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(sum)); }
};
#elif defined(__AVXVNNI__)
struct IntegerProduct {  // as for AVX512VNNI
  using Sum = __m256i;
  using Weight = __m256i;
  using Activation = __m256i;
  static MINIMIND_INLINE Sum start(const ActivationGroup& x) { return _mm256_set1_epi32(x.offset); }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    return _mm256_xor_si256(load_as<__m256i>(from), _mm256_set1_epi8(-128));
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    return _mm256_set1_epi32(load_as<int>(x.values + 4 * word));
  }
  static MINIMIND_INLINE Sum add(Sum sum, Weight w, Activation x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static MINIMIND_INLINE Floats floats(Sum sum) { return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(sum)); }
};
#elif defined(__AVX2__)
struct IntegerProduct {
  using Sum = __m256i;
  struct Weight {
    __m256i magnitude, signs;
  };
  using Activation = __m256i;
  static MINIMIND_INLINE Sum start(const ActivationGroup&) { return _mm256_setzero_si256(); }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    const auto w = load_as<__m256i>(from);
    return {_mm256_abs_epi8(w), w};
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    return _mm256_set1_epi32(load_as<int>(x.values + 4 * word));
  }
  static MINIMIND_INLINE Sum add(Sum sum, Weight w, Activation x) {  // a pair's sum is below 2^15: nothing saturates
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.signs));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static MINIMIND_INLINE Floats floats(Sum sum) { return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(sum)); }
};
#else
struct IntegerProduct {  // a group's sum is below 2^24, so float32 holds it exactly
  using Sum = Floats;
  struct Weight {
    Floats parts[4];
  };
  using Activation = const float*;
  static MINIMIND_INLINE Sum start(const ActivationGroup&) { return Floats{}; }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    const Bits words = load_as<Bits>(from);
    Weight w;
    for (int i = 0; i < 4; ++i)
      w.parts[i] = __builtin_convertvector(reinterpret_cast<Ints>(words << (24 - 8 * i)) >> 24, Floats);
    return w;
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) { return x.values + 4 * word; }
  static MINIMIND_INLINE Sum add(Sum sum, const Weight& w, Activation x) {
    for (int i = 0; i < 4; ++i) sum += w.parts[i] * x[i];
    return sum;
  }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return a + b; }
  static MINIMIND_INLINE Floats floats(Sum sum) { return sum; }
};
#endif

// Round to the nearest integer, halves to even; |x| must be below 2^22. Not by adding and subtracting a large constant:
// a compiler may fuse the product that gave x into that addition, which leaves out one rounding.
MINIMIND_INLINE Ints nearest(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
#elif defined(__x86_64__)
  return reinterpret_cast<Ints>(_mm_cvtps_epi32(reinterpret_cast<__m128>(x)));
#else
  Ints out;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int32_t>(__builtin_rintf(x[i]));
  return out;
#endif
}

// The larger of `largest` and |x| in each lane. A NaN is kept, so that the scale of its group becomes NaN.
MINIMIND_INLINE Floats larger_magnitude(Floats largest, Floats x) {
  const Floats magnitude = as_floats(as_bits(x) & 0x7fffffffu);
  return select((magnitude > largest) | (magnitude != magnitude), magnitude, largest);
}

// Round the first n numbers of x, at most kGroup, to integers -127..127 with the scale max |x| / 127; zeros follow.
inline void quantize(const float* x, int64_t n, ActivationGroup& to) {
  alignas(64) float numbers[kGroup] = {};
  const float* from = x;
  if (n < kGroup) {
    if (n > 0) __builtin_memcpy(numbers, x, static_cast<size_t>(n) * sizeof(float));
    from = numbers;
  }
  Floats lanes = {};
  for (int i = 0; i < kGroup; i += kWidth) lanes = larger_magnitude(lanes, load(from + i));
  float largest = 0;
  for (int i = 0; i < kWidth; ++i)
    largest = lanes[i] > largest || lanes[i] != lanes[i] ? lanes[i] : largest;
  to.scale = largest / kLargest;  // NaN if any number is NaN, which makes all products with the group NaN
  const float inverse = largest > kNothing ? kLargest / largest : 0.0f;
  [[maybe_unused]] Bits total = {};
  for (int i = 0; i < kGroup; i += kWidth) {
    const Ints integers = nearest(load(from + i) * inverse);
    total += reinterpret_cast<Bits>(integers);
    if constexpr (sizeof(to.values[0]) == 1) {
      const Bytes bytes = __builtin_convertvector(reinterpret_cast<Bits>(integers) & 0xffu, Bytes);
      __builtin_memcpy(to.values + i, &bytes, sizeof(bytes));
    } else {
      const Floats floats = __builtin_convertvector(integers, Floats);
      __builtin_memcpy(to.values + i, &floats, sizeof(floats));
    }
  }
#if defined(__x86_64__) && (defined(__AVX2__) || defined(__AVX512BW__))
  uint32_t sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += total[i];
  to.offset = -128 * static_cast<int32_t>(sum);
#endif
}

// Multiply one block by B rows of k_size integers each; out[b] holds the sixteen outputs of row b. kStream: prefetch
// the block, which is in no cache.
template <int B, bool kStream>
MINIMIND_INLINE void multiply_integers(const q8* block, int64_t k_size, const ActivationGroup* const (&rows)[B],
                                       Floats (&out)[B][kVectors]) {
  using P = IntegerProduct;
  // Independent sums, enough to hide the latency of an instruction.
  constexpr int kChains = B * kVectors >= 8 ? 1 : B * kVectors >= 4 ? 2 : 4;
  const auto* words = reinterpret_cast<const int32_t*>(block);
  Floats sums[B][kVectors] = {};
  for (int64_t g = 0; g < k_size / kGroup; ++g) {
    typename P::Sum chains[kChains][kVectors][B];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) chains[c][v][b] = c == 0 ? P::start(rows[b][g]) : typename P::Sum{};
#pragma GCC unroll 4
    for (int word = 0; word < kWords; word += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const int32_t* at = words + (g * kWords + word + c) * kBlock;
        if constexpr (kStream) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const typename P::Weight weight = P::weight(at + v * kWidth);
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b)
            chains[c][v][b] = P::add(chains[c][v][b], weight, P::activation(rows[b][g], word + c));
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        typename P::Sum sum = chains[0][v][b];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sum = P::plus(sum, chains[c][v][b]);
        sums[b][v] += P::floats(sum) * rows[b][g].scale;
      }
  }
  const auto* scales = reinterpret_cast<const float*>(words + k_size / 4 * kBlock);
  for (int b = 0; b < B; ++b)
    for (int v = 0; v < kVectors; ++v) out[b][v] = sums[b][v] * load(scales + v * kWidth);
}

}  // namespace minimind::cpu::MINIMIND_ISA
