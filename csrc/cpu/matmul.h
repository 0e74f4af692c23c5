// Products of packed weights [N, K] with a few activation rows [B, K] (minimind/inference/decode/step.py packs). Sixteen
// weight rows are a block; in it, what one instruction takes of them lies side by side, so the lanes of a register are outputs:
// no sums across lanes, and a thread's share of the weights is one stretch of memory, read once, in order.
//
//   float32   [N / 16, K, 16]          bfloat16   [N / 16, K / 2, 16, 2]          8 bits   int8.h
//
// N and K are padded with zeros, to 16 and to 4, K of 8 bits to 64. An output is the sum of two accumulators (of one with
// AMX, tiles.h), each filled along K in one order, so it does not depend on the tile that computes it: not on the batch, not
// on the number of threads.
#pragma once

#include "tiles.h"

namespace minimind::cpu::MINIMIND_ISA {

template <class T>
constexpr bool kIs8Bit = sizeof(T) == 1;

// A tile is a block times as many activation rows as the registers hold accumulators for; with many rows, which no longer
// wait for memory, two adjacent blocks times fewer rows, since that takes fewer loads.
constexpr int kMany = 1 << 30;
#if defined(__AVX512F__)
template <class T>
constexpr int kBatch = 8;  // 16 accumulators of 32 registers
template <class T>
constexpr int kPairBatch = 6;  // 24
template <class T>
constexpr int kPairsFrom = kIs8Bit<T> ? kMany : 32;  // rows; sums of 8-bit products take too many registers
#if defined(__AMX_TILE__)
template <>
constexpr int kPairsFrom<bf16> = 1;
#endif
#elif defined(__AVX2__)
template <class T>
constexpr int kBatch = kIs8Bit<T> ? 4 : 3;  // 8 or 12 of 16
#elif defined(__aarch64__)
template <class T>
constexpr int kBatch = kIs8Bit<T> && sizeof(IntegerProduct::Sum) == sizeof(Floats) ? 4 : 2;  // 16 of 32
#else
template <class T>
constexpr int kBatch = 1;
#endif
#if !defined(__AVX512F__)
template <class T>
constexpr int kPairBatch = 1;
template <class T>
constexpr int kPairsFrom = kMany;
#endif

// What accumulator `chain` of two takes, from number k of the rows on: weights of vector v of the block, an activation in
// every lane, and their product.
template <class T, class A>
struct Packed {  // numbers k and k + 1
  static constexpr int kStep = 2;
  static MINIMIND_INLINE Floats weight(const T* block, int64_t k, int chain, int v) {
    return load(block + (k + chain) * kBlock + v * kWidth);
  }
  static MINIMIND_INLINE Floats activation(const A* x, int64_t k, int chain) { return broadcast(x[k + chain]); }
  static MINIMIND_INLINE Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};
template <class A>
struct Packed<bf16, A> : Packed<float, A> {  // k in the lower halves of 32 bits, k + 1 in the upper ones
  static MINIMIND_INLINE Floats weight(const bf16* block, int64_t k, int chain, int v) {
    const Bits pairs = load_as<Bits>(block + k * kBlock + 2 * v * kWidth);
    return as_floats(chain == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
};
#if defined(MINIMIND_HAS_PAIRS)
template <>
struct Packed<bf16, bf16> {  // pairs k, k + 1 and k + 2, k + 3
  static constexpr int kStep = 4;
  static MINIMIND_INLINE Pairs weight(const bf16* block, int64_t k, int chain, int v) {
    return load_as<Pairs>(block + (k + 2 * chain) * kBlock + 2 * v * kWidth);
  }
  static MINIMIND_INLINE Pairs activation(const bf16* x, int64_t k, int chain) {
    return broadcast_pair(load_as<uint32_t>(x + k + 2 * chain));
  }
  static MINIMIND_INLINE Floats add(Floats sum, Pairs w, Pairs x) { return add_products(sum, w, x); }
};
#endif

// For a matrix [N, K] of type T: the padded K; the numbers of a block; the number of Activation<T> in a row of activations.
template <class T>
constexpr int64_t padded(int64_t k) {
  return kIs8Bit<T> ? packed_k8(k) : packed_k(k);
}
template <class T>
constexpr int64_t block_size(int64_t k_size) {
  return kBlock * (kIs8Bit<T> ? k_size + static_cast<int64_t>(sizeof(float)) : k_size);
}
template <class T>
constexpr int64_t row_size(int64_t k_size) {
  return kIs8Bit<T> ? k_size / kGroup : k_size;
}

// The type in which results are kept until the next product: float32 for 8-bit weights, whose activations are rounded
// in whole groups.
template <class T>
struct WaitingOf {
  using Type = Activation<T>;
};
template <>
struct WaitingOf<q8> {
  using Type = float;
};
template <class T>
using Waiting = typename WaitingOf<T>::Type;

template <int N>
struct Number {
  static constexpr int kValue = N;
};

constexpr int kPairStreams = 4;  // tiles of a pair that prefetch the next pair, a part of it each

// The sums of N adjacent blocks times B rows: emit(b, the kVectors vectors of each block). kStream: memory from `ahead` on
// is brought nearer meanwhile.
template <int N, int B, bool kStream, class T, class A, class Emit>
MINIMIND_INLINE void multiply_floats(const T* blocks, int64_t k_size, const A* const (&rows)[B], const char* ahead,
                                     Emit emit) {
  using P = Packed<T, A>;
  constexpr int kLines = N * P::kStep * kBlock * static_cast<int>(sizeof(T)) / 64 / (N == 1 ? 1 : kPairStreams);
  const int64_t size = block_size<T>(k_size);
  Floats sums[2][N][kVectors][B] = {};
  for (int64_t k = 0; k < k_size; k += P::kStep) {
    if constexpr (kStream)
      for (int line = 0; line < kLines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
    for (int chain = 0; chain < 2; ++chain)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const auto weight = P::weight(blocks + n * size, k, chain, v);
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b)
            sums[chain][n][v][b] = P::add(sums[chain][n][v][b], weight, P::activation(rows[b], k, chain));
        }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    Floats out[N * kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) out[n * kVectors + v] = sums[0][n][v][b] + sums[1][n][v][b];
    emit(b, out);
  }
}

// N adjacent blocks times rows x[first..first + rows), at most B: emit(row, sums, Number<N>). kStream, ahead: as above.
template <int N, int B, bool kStream, class T, class A, class Emit>
MINIMIND_INLINE void tile_of_blocks(const T* blocks, int64_t k_size, Rows<const A> x, int64_t first, int64_t rows,
                                    const char* ahead, Emit emit) {
  if constexpr (B > 1)
    if (rows < B) return tile_of_blocks<N, B - 1, kStream>(blocks, k_size, x, first, rows, ahead, emit);
  const A* from[B];
  for (int b = 0; b < B; ++b) from[b] = x[first + b];
  if constexpr (kIs8Bit<T>) {
    static_assert(N == 1);
    Floats out[B][kVectors];
    multiply_integers<B, kStream>(blocks, k_size, from, out);
    for (int b = 0; b < B; ++b) emit(first + b, out[b], Number<1>{});
  } else {
    multiply_floats<N, B, kStream>(blocks, k_size, from, ahead,
                                   [&](int b, const Floats* sums) { emit(first + b, sums, Number<N>{}); });
  }
}

#if defined(__AMX_TILE__)
// multiply_blocks with AMX.
template <int N, class T, class A, class Emit>
MINIMIND_INLINE void multiply_with_amx(const T* blocks, int64_t k_size, Rows<const A> x, int64_t batch, Tiles& tiles,
                                       Emit emit) {
  Floats sums[kAmxMost<T>][N];
  const int64_t parts = (batch + kAmxMost<T> - 1) / kAmxMost<T>, size = block_size<T>(k_size);
  const char* ahead = reinterpret_cast<const char*>(blocks) + (kIs8Bit<T> ? kAhead : N * size * int64_t{sizeof(T)});
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t first = batch * t / parts, rows = batch * (t + 1) / parts - first;
    multiply_tiles<N>(tiles, blocks, size, k_size, x, first, static_cast<int>(rows), t == 0 ? ahead : nullptr, sums);
    for (int64_t b = 0; b < rows; ++b) emit(first + b, sums[b], Number<N>{});
  }
}
#endif

// One block, or N = 2 adjacent ones, times all `batch` rows of x, in tiles of nearly equal size.
template <int N, class T, class A, class Emit>
MINIMIND_INLINE void multiply_blocks(const T* blocks, int64_t k_size, Rows<const A> x, int64_t batch,
                                     [[maybe_unused]] Tiles& amx, Emit emit) {
#if defined(__AMX_TILE__)
  if constexpr (kAmxFrom<T> < kMany)
    if (batch >= kAmxFrom<T>) return multiply_with_amx<N>(blocks, k_size, x, batch, amx, emit);
#endif
  constexpr int kMost = N == 1 ? kBatch<T> : kPairBatch<T>, kStreams = N == 1 ? 1 : kPairStreams;
  const int64_t tiles = (batch + kMost - 1) / kMost, size = block_size<T>(k_size) * static_cast<int64_t>(sizeof(T));
  const auto* bytes = reinterpret_cast<const char*>(blocks);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = batch * t / tiles, rows = batch * (t + 1) / tiles - first;
    if (t < kStreams) {  // one block is read behind its own prefetches; a pair finds what the one before fetched
      const char* ahead = N == 1 ? bytes + kAhead : bytes + N * size + t * (N * size / kStreams);
      tile_of_blocks<N, kMost, true>(blocks, k_size, x, first, rows, ahead, emit);
    } else {
      tile_of_blocks<N, kMost, false>(blocks, k_size, x, first, rows, nullptr, emit);
    }
  }
}

// out[b][n] = w[n] . x[b] for the blocks of rows in [begin, end) of w, which has n_size rows.
template <class T, class A>
inline void matmul(const T* w, int64_t k_size, int64_t n_size, int64_t begin, int64_t end, Rows<const A> x, int64_t batch,
                   Rows<float> out) {
  Tiles amx;
  for (int64_t i = begin; i < end;) {
    const int64_t n = i * kBlock, count = n_size - n;
    const T* blocks = w + i * block_size<T>(k_size);
    const auto emit = [&](int64_t b, const Floats* sums, auto number) {
      constexpr int kN = decltype(number)::kValue;
      float* to = out[b] + n;
      if (count >= kN * kBlock)
        for (int v = 0; v < kN * kVectors; ++v) store(to + v * kWidth, sums[v]);
      else
        __builtin_memcpy(to, sums, static_cast<size_t>(count) * sizeof(float));
    };
    if constexpr (kPairsFrom<T> != kMany)
      if (batch >= kPairsFrom<T> && i + 1 < end) {
        multiply_blocks<2>(blocks, k_size, x, batch, amx, emit);
        i += 2;
        continue;
      }
    multiply_blocks<1>(blocks, k_size, x, batch, amx, emit);
    ++i;
  }
}

}  // namespace minimind::cpu::MINIMIND_ISA
