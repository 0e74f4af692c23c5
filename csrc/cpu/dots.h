// Dot products of a few rows with a few others, each row as it lies in memory: the scores of attention, the router. Every
// output has its own accumulator, filled along K in one order, so it does not depend on the tile that computes it.
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kRows = 4;  // rows of a tile

// Rows w[0..R) times rows x[0..B): sums[b][r].
template <int R, int B, class T, class A>
MINIMIND_INLINE void tile(const T* const* w, const A* const* x, int64_t k_size, float (&sums_out)[B][kRows]) {
  using P = Product<T, A>;
  Floats acc[R][B] = {};
  const auto step = [&](const T* const* from_w, const A* const* from_x, int64_t k) {
    typename P::Weight weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = P::weight(from_w[r] + k);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const typename P::Activation row = P::activation(from_x[b] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][b] = P::add(acc[r][b], weights[r], row);
    }
  };
  int64_t k = 0;
  for (; k + P::kStep <= k_size; k += P::kStep) step(w, x, k);
  if (const auto left = static_cast<size_t>(k_size - k)) {  // the rest, padded with zeros
    T w_rest[R][P::kStep] = {};
    A x_rest[B][P::kStep] = {};
    const T* w_rows[R];
    const A* x_rows[B];
    for (int r = 0; r < R; ++r) w_rows[r] = w_rest[r], __builtin_memcpy(w_rest[r], w[r] + k, left * sizeof(T));
    for (int b = 0; b < B; ++b) x_rows[b] = x_rest[b], __builtin_memcpy(x_rest[b], x[b] + k, left * sizeof(A));
    step(w_rows, x_rows, 0);
  }
#if defined(__AVX512F__)
  if constexpr (R == 4 && B == 4) return store(sums_out[0], sums(acc));
#endif
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    if constexpr (R == 4) {
      const Four four = sums(acc[0][b], acc[1][b], acc[2][b], acc[3][b]);
      __builtin_memcpy(sums_out[b], &four, sizeof(four));
    } else {
      for (int r = 0; r < R; ++r) sums_out[b][r] = sum(acc[r][b]);
    }
  }
}

// out[n] = w[n] . x for the `rows` rows of w [rows, K].
inline void dots(const float* w, int64_t k_size, int64_t rows, const float* x, float* out) {
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows) {
    const float* w_rows[kRows];
    for (int r = 0; r < kRows; ++r) w_rows[r] = w + (n + r) * k_size;
    float four[1][kRows];
    tile<kRows, 1>(w_rows, &x, k_size, four);
    __builtin_memcpy(out + n, four[0], sizeof(four[0]));
  }
  for (; n < rows; ++n) {
    const float* row = w + n * k_size;
    float one[1][kRows];
    tile<1, 1>(&row, &x, k_size, one);
    out[n] = one[0][0];
  }
}

}  // namespace minimind::cpu::MINIMIND_ISA
