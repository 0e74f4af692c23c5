// Storage types and their conversions. Arithmetic is float32; a value is rounded once, to nearest even, when stored.
#pragma once

#include "platform.cuh"

#ifndef MINIMIND_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace minimind {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn: no infinity, largest number 448
  uint8_t bits;
};
constexpr float kLargestFp8 = 448.0f;
struct q8 {  // an integer of -127..127, which its row's scale makes a weight
  int8_t bits;
};

enum class Number : int { fp32, bf16, fp16, fp8 };  // of a type known only when it runs
template <class T>
constexpr Number kNumber = Number::fp32;
template <>
inline constexpr Number kNumber<bf16> = Number::bf16;
template <>
inline constexpr Number kNumber<fp16> = Number::fp16;
template <>
inline constexpr Number kNumber<fp8> = Number::fp8;

constexpr int64_t bytes_of(Number dtype) { return dtype == Number::fp32 ? 4 : dtype == Number::fp8 ? 1 : 2; }

// Two neighbours in memory, read or written at once.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

struct alignas(16) Words {
  uint32_t x[4];
};
struct alignas(16) Four {
  float x[4];
};

#ifdef MINIMIND_EMULATE
}  // namespace minimind
#include "emulated_numeric.h"
namespace minimind {
#else
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(fp8 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}

template <class T>
__device__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
template <>
__device__ __forceinline__ fp8 from_float<fp8>(float x) {
  return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}

__device__ __forceinline__ Pair<float> load_past_l1(const Pair<float>* from) {
  const float2 pair = __ldcg(reinterpret_cast<const float2*>(from));
  return {pair.x, pair.y};
}

// Read once and never written while a kernel runs: past L1.
__device__ __forceinline__ Words load_words(const void* from) {
  Words w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
               : "l"(from));
  return w;
}

__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  return __byte_perm(x, y, selector);
}

template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t x, uint32_t y);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<bf16>(uint32_t x, uint32_t y) {
  uint32_t result;  // x * y - 0: sm_80 has no bf16 product, and -0 keeps the sign of a zero
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(0x80008000u));
  return result;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<fp16>(uint32_t x, uint32_t y) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(y));
  return result;
}
#endif

__device__ __forceinline__ float load_number(const void* from, Number dtype, int64_t i) {
  if (dtype == Number::bf16) return to_float(static_cast<const bf16*>(from)[i]);
  if (dtype == Number::fp16) return to_float(static_cast<const fp16*>(from)[i]);
  return static_cast<const float*>(from)[i];
}

template <class T>
__device__ __forceinline__ Four load_four(const T* from) {
  struct alignas(4 * sizeof(T)) Numbers {
    T x[4];
  };
  const auto numbers = *reinterpret_cast<const Numbers*>(from);
  return {{to_float(numbers.x[0]), to_float(numbers.x[1]), to_float(numbers.x[2]), to_float(numbers.x[3])}};
}

// Two 16-bit numbers in a register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  return static_cast<uint32_t>(from_float<T>(second).bits) << 16 | from_float<T>(first).bits;
}

template <class T>
__device__ __forceinline__ float unpack(uint32_t pair, int half) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * half))});
}

// Four neighbours of 16 bytes of T: the first of them, or the `part`-th.
template <class T>
__device__ __forceinline__ Four unpack_four(const Words& words, int part) {
  const uint32_t low = words.x[2 * part], high = words.x[2 * part + 1];
  return {{unpack<T>(low, 0), unpack<T>(low, 1), unpack<T>(high, 0), unpack<T>(high, 1)}};
}
template <>
__device__ __forceinline__ Four unpack_four<float>(const Words& words, int) {
  return {{bits_to_float(words.x[0]), bits_to_float(words.x[1]), bits_to_float(words.x[2]), bits_to_float(words.x[3])}};
}

// An integer plus 128 as the low byte of 2^23's mantissa makes the float 2^23 + 128 + integer; a difference, which is exact,
// leaves the integer. Four numbers take 9 instructions, one LOP3, four PRMT and four FADD, of which the first five share a
// pipe with 16 lanes a clock: 10 clocks. Four I2F would take 32 where that instruction has a quarter of those lanes.
template <>
__device__ __forceinline__ Four unpack_four<q8>(const Words& words, int part) {
  const uint32_t raised = words.x[part] ^ 0x80808080u;
  Four four;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    four.x[i] = bits_to_float(permute_bytes(raised, 0x4b000000u, 0x7440u + i)) - 8388736.0f;  // 2^23 + 128
  return four;
}

// Bytes i and j of four e4m3 numbers as a pair of T; exact. Exponent and mantissa are moved to their place in T, and a
// product makes up for the exponents' biases, of subnormal numbers too: 2^(127 - 7) for bf16, 2^(15 - 7) for fp16. A
// NaN becomes 480: the caller looks for it with NanFinder.
template <class T>
__device__ __forceinline__ uint32_t widen(uint32_t four, uint32_t i, uint32_t j);
template <>
__device__ __forceinline__ uint32_t widen<bf16>(uint32_t four, uint32_t i, uint32_t j) {
  const uint32_t high = permute_bytes(four, 0, 0x0404u | i << 4 | j << 12);  // in the high byte of each half
  return multiply_pairs<bf16>((high & 0x80008000u) | (high >> 4 & 0x07f007f0u), 0x7b807b80u);
}
template <>
__device__ __forceinline__ uint32_t widen<fp16>(uint32_t four, uint32_t i, uint32_t j) {
  const uint32_t high = permute_bytes(four, 0, 0x0404u | i << 4 | j << 12);
  return multiply_pairs<fp16>((high & 0x80008000u) | (high >> 1 & 0x3f803f80u), 0x5c005c00u);
}

// Whether one of all the e4m3 numbers it was shown is a NaN, 0x7f or 0xff: adding 1 carries into the top bit.
struct NanFinder {
  uint32_t carries = 0;
  __device__ __forceinline__ void look(uint32_t four) { carries |= (four & 0x7f7f7f7fu) + 0x01010101u; }
  __device__ __forceinline__ bool found() const { return (carries & 0x80808080u) != 0; }
};

}  // namespace minimind
