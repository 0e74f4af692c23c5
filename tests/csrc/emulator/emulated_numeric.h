// What csrc/cuda/numeric.cuh does with PTX and intrinsics, by torch's own conversions. Included by it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace minimind {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

namespace torch_types {
using torch::headeronly::BFloat16;
using torch::headeronly::Float8_e4m3fn;
using torch::headeronly::Half;
}  // namespace torch_types

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return torch_types::BFloat16(x.bits, torch_types::BFloat16::from_bits()); }
inline float to_float(fp16 x) { return torch_types::Half(x.bits, torch_types::Half::from_bits()); }
inline float to_float(fp8 x) { return torch_types::Float8_e4m3fn(x.bits, torch_types::Float8_e4m3fn::from_bits()); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return {torch_types::BFloat16(x).x};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {torch_types::Half(x).x};
}
template <>
inline fp8 from_float<fp8>(float x) {
  if (std::fabs(x) > kLargestFp8) x = std::copysign(kLargestFp8, x);  // as __NV_SATFINITE
  return {torch_types::Float8_e4m3fn(x).x};
}

inline Pair<float> load_past_l1(const Pair<float>* from) { return *from; }

inline Words load_words(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("16 bytes that are not aligned");
  return *static_cast<const Words*>(from);
}

inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

template <class T>
inline uint32_t multiply_pairs(uint32_t x, uint32_t y) {
  const auto half = [&](int shift) {
    const T a{static_cast<uint16_t>(x >> shift)}, b{static_cast<uint16_t>(y >> shift)};
    return static_cast<uint32_t>(from_float<T>(to_float(a) * to_float(b)).bits) << shift;
  };
  return half(0) | half(16);
}

}  // namespace minimind
