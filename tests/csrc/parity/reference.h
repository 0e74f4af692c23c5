// Plain double precision beside the kernels, numbers to feed them, and the count of what differed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "form.h"

namespace parity {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kEps = 0x1p-23;
inline double eps_of(Type type) {  // twice the rounding of a number
  return type == Type::float32 ? kEps : type == Type::bfloat16 ? 0x1p-7 : type == Type::float16 ? 0x1p-10 : 0x1p-3;
}
inline double least_of(Type type) {  // distance of the smallest numbers
  return type == Type::float16 ? 0x1p-24 : type == Type::float8 ? 0x1p-9 : 0x1p-126;
}
inline size_t size_of(Type type) { return type == Type::float32 ? 4 : type == Type::float8 ? 1 : 2; }

inline int& failures() {
  static int count = 0;
  return count;
}
inline long& checks() {
  static long count = 0;
  return count;
}

__attribute__((format(printf, 2, 3))) inline bool expect(bool right, const char* format, ...) {
  ++checks();
  if (right) return true;
  if (++failures() <= 40) {
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::puts("");
  }
  return false;
}

struct Random {  // xorshift
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {}
  double uniform() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()));
  }
  Floats normals(int64_t n, float scale = 1) {
    Floats x(static_cast<size_t>(n));
    for (float& each : x) each = normal() * scale;
    return x;
  }
};

// Storage types, one number at a time.
inline float bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double value_of(Type type, const void* from, int64_t i) {
  if (type == Type::float32) return static_cast<const float*>(from)[i];
  if (type == Type::bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const bool half = type == Type::float16;
  const int bits = half ? static_cast<const uint16_t*>(from)[i] : static_cast<const uint8_t*>(from)[i];
  const int mantissa = half ? 10 : 3, width = half ? 15 : 7, bias = half ? 15 : 7;
  const int exponent = (bits & ((1 << width) - 1)) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                         : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return bits >> width & 1 ? -magnitude : magnitude;
}
// Random numbers of a type: bfloat16 are rounded, float16 and float8 are random bits of moderate size.
inline std::vector<char> stored(Type type, int64_t n, Random& random) {
  std::vector<char> out(static_cast<size_t>(n) * size_of(type));
  for (int64_t i = 0; i < n; ++i) {
    const float x = random.normal();
    const auto bits = static_cast<uint32_t>(random.uniform() * 65536);
    uint32_t whole;
    const float rounded = bf16_of(x);
    std::memcpy(&whole, &rounded, 4);
    if (type == Type::float32) std::memcpy(&out[static_cast<size_t>(i) * 4], &x, 4);
    const auto half = static_cast<uint16_t>(type == Type::bfloat16 ? whole >> 16 : bits & 0xbfff);  // below 2
    if (size_of(type) == 2) std::memcpy(&out[static_cast<size_t>(i) * 2], &half, 2);
    if (type == Type::float8) out[static_cast<size_t>(i)] = static_cast<char>(bits & 0xbf);  // below 2
  }
  return out;
}

// Packing as minimind/inference/decode/step.py and int8.py do it. values: what the packed form stands for.
struct Packed {
  std::vector<char> bytes;
  Doubles values;  // [N, K]
  int64_t k_size;
};
inline Packed pack(Weights type, const Floats& w, int64_t n, int64_t k) {
  const int64_t k_size = type == kInt8 ? packed_k8(k) : packed_k(k), blocks = blocks_of(n);
  const int64_t block = kBlock * (type == kInt8 ? k_size + 4 : type == kBf16 ? 2 * k_size : 4 * k_size);
  Packed out{std::vector<char>(static_cast<size_t>(blocks * block)), Doubles(static_cast<size_t>(n * k)), k_size};
  for (int64_t row = 0; row < n; ++row) {
    char* to = out.bytes.data() + row / kBlock * block;
    const int64_t lane = row % kBlock;
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::fmax(largest, std::fabs(w[static_cast<size_t>(row * k + i)]));
    const float scale = largest / 127;
    if (type == kInt8) std::memcpy(to + kBlock * k_size + 4 * lane, &scale, 4);
    for (int64_t i = 0; i < k; ++i) {
      const float x = w[static_cast<size_t>(row * k + i)];
      double& value = out.values[static_cast<size_t>(row * k + i)];
      if (type == kFloat) {
        std::memcpy(to + 4 * (i * kBlock + lane), &x, 4), value = x;
      } else if (type == kBf16) {
        const float rounded = bf16_of(x);
        std::memcpy(to + 2 * ((i / 2 * kBlock + lane) * 2 + i % 2), reinterpret_cast<const char*>(&rounded) + 2, 2),
            value = rounded;
      } else {
        const float integer = largest > 0 ? std::nearbyint(x * (127 / largest)) : 0;
        to[(i / 4 * kBlock + lane) * 4 + i % 4] = static_cast<char>(static_cast<int8_t>(integer));
        value = static_cast<double>(integer) * scale;
      }
    }
  }
  return out;
}

inline size_t at(int64_t i) { return static_cast<size_t>(i); }

inline double largest(const Doubles& x) {
  double out = 0;
  for (double each : x) out = std::fmax(out, std::fabs(each));
  return out;
}
inline Doubles numbers(Type type, const void* from, int64_t n) {
  Doubles out(at(n));
  for (int64_t i = 0; i < n; ++i) out[at(i)] = value_of(type, from, i);
  return out;
}
inline double error(const Doubles& got, const Doubles& truth) {
  double out = 0;
  for (size_t i = 0; i < truth.size(); ++i)
    out = std::isfinite(got[i]) ? std::fmax(out, std::fabs(got[i] - truth[i])) : INFINITY;
  return out;
}

// Normed if weight is not empty, then turned, x [D].
inline Doubles turned(Doubles x, const float* weight, double eps, const float* cos, const float* sin) {
  const size_t half = x.size() / 2;
  if (weight != nullptr) {
    double squares = 0;
    for (double each : x) squares += each * each;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= factor * weight[i];
  }
  Doubles out(x.size());
  for (size_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
  return out;
}

struct Angles {
  int64_t rows, half;
  Floats cos, sin;
  Angles(int64_t rows, int64_t half) : rows(rows), half(half), cos(at(rows * half)), sin(at(rows * half)) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < half; ++i) {
        const double angle =
            static_cast<double>(m) * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
        cos[at(m * half + i)] = static_cast<float>(std::cos(angle)),
                          sin[at(m * half + i)] = static_cast<float>(std::sin(angle));
      }
  }
};

// One query [D] over rows k, v: softmax(scale q k) v; scores' and results' magnitudes come along for bounds.
struct Attended {
  Doubles out, magnitude;  // sum of p v and of p |v|
  double score = 0;        // largest sum of |q k|, scaled
};
inline Attended attend(const double* q, int64_t dim, double scale, int64_t tokens,
                       const std::function<const double*(int64_t)>& key,
                       const std::function<const double*(int64_t)>& value) {
  Attended a{Doubles(at(dim)), Doubles(at(dim))};
  Doubles p(at(tokens));
  double top = -INFINITY, total = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    double score = 0, magnitude = 0;
    for (int64_t d = 0; d < dim; ++d) score += q[d] * key(t)[d], magnitude += std::fabs(q[d] * key(t)[d]);
    p[at(t)] = scale * score;
    a.score = std::fmax(a.score, scale * magnitude), top = std::fmax(top, p[at(t)]);
  }
  for (double& each : p) total += each = std::exp(each - top);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = 0; d < dim; ++d) {
      const double term = p[at(t)] / total * value(t)[d];
      a.out[at(d)] += term, a.magnitude[at(d)] += std::fabs(term);
    }
  return a;
}

// The forms of this program that the processor runs, the best first, generic last.
inline const std::vector<Form>& usable() {
  static const std::vector<Form> found = [] {
    std::vector<Form> out;
    for (const Kernels* const* table = all_kernels(); *table != nullptr; ++table)
      for (const Form& form : forms())
        if (form.table == *table) out.push_back(form);
    return out;
  }();
  return found;
}

void products();
void integers();
void sampling();
void rotations();
void attention();
void steps();
void documents();

}  // namespace parity
