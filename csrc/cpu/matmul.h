// Products of weight rows [N, K] with a few activation rows [B, K]. A block of weight rows is read from memory once and
// multiplied with all activation rows while it is in the cache. Every output has its own accumulator, filled along K in
// one order, so it does not depend on the tile that computes it: not on the batch, not on the number of threads.
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kRows = 4;  // weight rows of a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBatch = 4;  // activation rows of a tile: 16 accumulators of 32 registers
#else
constexpr int kBatch = 2;  // 8 of 16
#endif

// Rows of numbers in memory, `stride` apart; index: which of them, or null for all in order.
template <class A>
struct Rows {
  A* base;
  int64_t stride;
  const int32_t* index = nullptr;

  MINIMIND_INLINE A* operator[](int64_t i) const { return base + (index == nullptr ? i : index[i]) * stride; }
};

// A core has more misses under way when it is told what comes next: rows as short as a tile's end before the hardware has
// seen their pattern. The weights of a share are one stretch of memory, so what lies this far ahead is wanted soon. Into L2,
// which can wait for more lines than L1: 2.7 ms a step without, 2.3 into L1, 1.7 into L2 (Zen 4, 51 MB of weights).
constexpr int kAhead = 8192;  // bytes

// Rows w[0..R) times rows x[0..B): sums[b][r]. kStream: the rows of w are neighbours, and come from memory.
template <int R, int B, bool kStream = false, class T, class A>
MINIMIND_INLINE void tile(const T* const* w, const A* const* x, int64_t k_size, float (&sums_out)[B][kRows]) {
  using P = Product<T, A>;
  constexpr auto kBytes = static_cast<int>(P::kStep * sizeof(T));
  Floats acc[R][B] = {};
  const auto step = [&](const T* const* from_w, const A* const* from_x, int64_t k) {
    typename P::Weight weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      weights[r] = P::weight(from_w[r] + k);
      if constexpr (kStream)
        __builtin_prefetch(reinterpret_cast<const char*>(from_w[0] + k * R) + kAhead + r * kBytes, 0, 2);
    }
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

template <int R, int B, bool kStream, class T, class A, class Emit>
MINIMIND_INLINE void tile_at(const T* w, int64_t k_size, int64_t n, Rows<const A> x, int64_t b, Emit emit) {
  const T* w_rows[R];
  const A* x_rows[B];
  for (int r = 0; r < R; ++r) w_rows[r] = w + (n + r) * k_size;
  for (int i = 0; i < B; ++i) x_rows[i] = x[b + i];
  float out[B][kRows];
  tile<R, B, kStream>(w_rows, x_rows, k_size, out);
  for (int i = 0; i < B; ++i) emit(b + i, out[i]);
}

// Weight rows n .. n + R with all `batch` rows of x: emit(b, the R sums).
template <int R, class T, class A, class Emit>
MINIMIND_INLINE void row_block(const T* w, int64_t k_size, int64_t n, Rows<const A> x, int64_t batch, Emit emit) {
  if (batch >= kBatch) tile_at<R, kBatch, true>(w, k_size, n, x, 0, emit);
  int64_t b = batch >= kBatch ? kBatch : 0;
  for (; b + kBatch <= batch; b += kBatch) tile_at<R, kBatch, false>(w, k_size, n, x, b, emit);
  switch (batch - b) {
    case 1: return tile_at<R, 1, true>(w, k_size, n, x, b, emit);
    case 2: return tile_at<R, 2, true>(w, k_size, n, x, b, emit);
    case 3: return tile_at<R, 3, true>(w, k_size, n, x, b, emit);
    default: return;
  }
}

// out[b][n - first] = w[n] . x[b] for n in [begin, end).
template <class T, class A>
inline void matmul(const T* w, int64_t k_size, int64_t begin, int64_t end, Rows<const A> x, int64_t batch, Rows<float> out,
                   int64_t first = 0) {
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows)
    row_block<kRows>(w, k_size, n, x, batch,
                     [&](int64_t b, const float* v) { __builtin_memcpy(out[b] + n - first, v, sizeof(float[kRows])); });
  for (; n < end; ++n)
    row_block<1>(w, k_size, n, x, batch, [&](int64_t b, const float* v) { out[b][n - first] = *v; });
}

}  // namespace minimind::cpu::MINIMIND_ISA
