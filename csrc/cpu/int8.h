// Products of 8-bit integers: a block of sixteen weight rows, each with one scale, times activations with one scale for
// each group of kGroup numbers. For each group, the integer products are summed and multiplied by the scale of the
// group; the groups are added in float32, and the sum is multiplied by the scale of the row. The integer sums are
// exact, so all instruction sets give the same result.
//
//   block   [K / 4, 16, 4] integers of -127..127, then 16 scales, float32
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kWords = kGroup / 4;  // of four integers of a row
constexpr float kLargest = 127;
constexpr float kNothing = 1e-30f;  // groups without a larger number become zeros; kLargest / kNothing is still finite

// One group of an activation row. offset: the initial value of the group's sum.
#if defined(__x86_64__) && (defined(__AVX2__) || defined(__AVX512BW__))
struct ActivationGroup {
  int8_t values[kGroup];
  float scale;
  int32_t offset;
};
#elif defined(MINIMIND_USE_NEON)
struct ActivationGroup {
  int8_t values[kGroup];
  float scale;
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

// `IntegerProduct::add(sum, w, x)` adds to every lane the products of kStep words of its weights with as many activations.
#if defined(__AVX512VNNI__)
struct IntegerProduct {
  static constexpr int kStep = 1;
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
  static constexpr int kStep = 1;
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
  static constexpr int kStep = 1;
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
  static constexpr int kStep = 1;
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
#elif defined(MINIMIND_USE_NEON) && defined(__ARM_FEATURE_DOTPROD)
struct IntegerProduct {
  static constexpr int kStep = 1;
  using Sum = int32x4_t;
  using Weight = int8x16_t;
  using Activation = int8x16_t;
  static MINIMIND_INLINE Sum start(const ActivationGroup&) { return vdupq_n_s32(0); }
  static MINIMIND_INLINE Weight weight(const int32_t* from) { return load_as<int8x16_t>(from); }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    return vreinterpretq_s8_s32(vdupq_n_s32(load_as<int32_t>(x.values + 4 * word)));
  }
  static MINIMIND_INLINE Sum add(Sum sum, Weight w, Activation x) { return vdotq_s32(sum, w, x); }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return vaddq_s32(a, b); }
  static MINIMIND_INLINE Floats floats(Sum sum) { return reinterpret_cast<Floats>(vcvtq_f32_s32(sum)); }
};
#elif defined(MINIMIND_USE_NEON)
struct IntegerProduct {
  static constexpr int kStep = 2;
  struct Sum {  // two lanes for each row
    int32x4_t low, high;
  };
  struct Weight {
    int8x16_t first, second;
  };
  struct Activation {
    int8x8_t first, second;
  };
  static MINIMIND_INLINE Sum start(const ActivationGroup&) { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static MINIMIND_INLINE Weight weight(const int32_t* from) {
    return {load_as<int8x16_t>(from), load_as<int8x16_t>(from + kBlock)};
  }
  static MINIMIND_INLINE Activation activation(const ActivationGroup& x, int word) {
    const auto twice = [&](int of) { return vreinterpret_s8_s32(vdup_n_s32(load_as<int32_t>(x.values + 4 * of))); };
    return {twice(word), twice(word + 1)};
  }
  static MINIMIND_INLINE Sum add(Sum sum, const Weight& w, const Activation& x) {  // two products are below 2^15
    const int16x8_t low = vmull_s8(vget_low_s8(w.first), x.first), high = vmull_s8(vget_high_s8(w.first), x.first);
    return {vpadalq_s16(sum.low, vmlal_s8(low, vget_low_s8(w.second), x.second)),
            vpadalq_s16(sum.high, vmlal_s8(high, vget_high_s8(w.second), x.second))};
  }
  static MINIMIND_INLINE Sum plus(Sum a, Sum b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static MINIMIND_INLINE Floats floats(Sum sum) {
    return reinterpret_cast<Floats>(vcvtq_f32_s32(vpaddq_s32(sum.low, sum.high)));
  }
};
#else
struct IntegerProduct {  // a group's sum is below 2^24, so float32 holds it exactly
  static constexpr int kStep = 1;
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
#elif defined(MINIMIND_USE_NEON)
  return reinterpret_cast<Ints>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
#else
  Ints out;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int32_t>(__builtin_rintf(x[i]));
  return out;
#endif
}

MINIMIND_INLINE Bytes narrow(Ints x) {  // the lowest byte of each
#if defined(MINIMIND_USE_NEON)  // g++ takes four bytes one by one
  const int16x4_t halves = vmovn_s32(reinterpret_cast<int32x4_t>(x));
  const uint64_t bytes = vget_lane_u64(vreinterpret_u64_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  return load_as<Bytes>(&bytes);
#else
  return __builtin_convertvector(reinterpret_cast<Bits>(x) & 0xffu, Bytes);
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
      const Bytes bytes = narrow(integers);
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

// The exact sums of the products of one group, `words` of the block's weights and activations x[0..B), times the
// activations' scales are added to `sums`. kStream: prefetch the block, which is in no cache.
template <int B, bool kStream>
MINIMIND_INLINE void add_group(const int32_t* words, const ActivationGroup* const (&x)[B], Floats (&sums)[B][kVectors]) {
  using P = IntegerProduct;
  // Independent sums, enough to hide the latency of an instruction.
  constexpr int kChains = B * kVectors >= 8 ? 1 : B * kVectors >= 4 ? 2 : 4;
  typename P::Sum chains[kChains][kVectors][B];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) chains[c][v][b] = c == 0 ? P::start(*x[b]) : typename P::Sum{};
#pragma GCC unroll 4
  for (int word = 0; word < kWords; word += kChains * P::kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int32_t* at = words + (word + c * P::kStep) * kBlock;
      if constexpr (kStream)
        for (int step = 0; step < P::kStep; ++step)
          __builtin_prefetch(reinterpret_cast<const char*>(at + step * kBlock) + kAhead, 0, 2);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const typename P::Weight weight = P::weight(at + v * kWidth);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          chains[c][v][b] = P::add(chains[c][v][b], weight, P::activation(*x[b], word + c * P::kStep));
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
      sums[b][v] += P::floats(sum) * x[b]->scale;
    }
}

#if defined(MINIMIND_USE_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
// The same with an instruction that multiplies two weight rows with two activation rows, eight integers of each.
template <int B, bool kStream>
MINIMIND_INLINE void add_group_in_pairs(const int32_t* words, const ActivationGroup* const (&x)[B],
                                        Floats (&sums)[B][kVectors]) {
  constexpr int kPairs = (B + 1) / 2;  // a last row that is alone is multiplied twice
  int32x4_t tiles[kVectors][2][kPairs] = {};  // of a vector's rows 0, 1 and 2, 3
#pragma GCC unroll 8
  for (int word = 0; word < kWords; word += 2) {
    const int32_t* at = words + word * kBlock;
    if constexpr (kStream)
      for (int step = 0; step < 2; ++step)
        __builtin_prefetch(reinterpret_cast<const char*>(at + step * kBlock) + kAhead, 0, 2);
    int8x16_t pairs[kPairs];
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const ActivationGroup &one = *x[2 * p], &other = *x[2 * p + 1 < B ? 2 * p + 1 : 2 * p];
      pairs[p] = vcombine_s8(vld1_s8(one.values + 4 * word), vld1_s8(other.values + 4 * word));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int32x4_t first = vld1q_s32(at + v * kWidth), second = vld1q_s32(at + kBlock + v * kWidth);
      const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
      const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
#pragma GCC unroll 2
      for (int p = 0; p < kPairs; ++p) {
        tiles[v][0][p] = vmmlaq_s32(tiles[v][0][p], low, pairs[p]);
        tiles[v][1][p] = vmmlaq_s32(tiles[v][1][p], high, pairs[p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int32x4_t low = tiles[v][0][b / 2], high = tiles[v][1][b / 2];
      const int32x4_t sum = b % 2 == 0 ? vuzp1q_s32(low, high) : vuzp2q_s32(low, high);
      sums[b][v] += IntegerProduct::floats(sum) * x[b]->scale;
    }
}
#endif

// Multiply one block by B rows of k_size integers each; out[b] holds the sixteen outputs of row b.
template <int B, bool kStream>
MINIMIND_INLINE void multiply_integers(const q8* block, int64_t k_size, const ActivationGroup* const (&rows)[B],
                                       Floats (&out)[B][kVectors]) {
  const auto* words = reinterpret_cast<const int32_t*>(block);
  Floats sums[B][kVectors] = {};
  for (int64_t g = 0; g < k_size / kGroup; ++g) {
    const ActivationGroup* x[B];
    for (int b = 0; b < B; ++b) x[b] = rows[b] + g;
#if defined(MINIMIND_USE_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (B > 1) {
      add_group_in_pairs<B, kStream>(words + g * kWords * kBlock, x, sums);
      continue;
    }
#endif
    add_group<B, kStream>(words + g * kWords * kBlock, x, sums);
  }
  const auto* scales = reinterpret_cast<const float*>(words + k_size / 4 * kBlock);
  for (int b = 0; b < B; ++b)
    for (int v = 0; v < kVectors; ++v) out[b][v] = sums[b][v] * load(scales + v * kWidth);
}

}  // namespace minimind::cpu::MINIMIND_ISA
