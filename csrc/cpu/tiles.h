// Intel AMX: products of tiles, two-dimensional registers of up to 16 rows of 64 bytes. A block of packed weights is a
// sequence of tiles as they are: 16 rows of 64 bytes hold 32 numbers of bfloat16, or 64 integers (one group), of each of
// the block's sixteen outputs. The other factor is a tile of up to 16 activation rows; fewer of them take fewer cycles.
//
// `tdpbf16ps` sums the sixteen even and the sixteen odd products of a tile separately in float32, adds the two sums, and
// then adds that to the accumulator (Intel's Software Developer's Manual has the pseudo-code). So an output has one
// accumulator, filled along K 32 numbers at a time: the same bits in any tile.
#pragma once

#include "int8.h"

namespace minimind::cpu::MINIMIND_ISA {

#if !defined(__AMX_TILE__)
struct Tiles {};
#else
constexpr int kAmxRows = 16, kAmxBytes = 64;

// In assembly, since GCC's intrinsics do not tell the compiler which memory they read. %tmm0 to 3: sums, of the upper and
// the lower rows with one block and the other; 4 and 5: upper and lower rows of activations; 6 and 7: weights of two blocks.
#define MINIMIND_LOAD_TILE(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define MINIMIND_STORE_TILE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define MINIMIND_ZERO_TILE(tile) asm volatile("tilezero %%tmm" #tile ::)
#define MINIMIND_ADD_TILES(instruction, sums, x, w) asm volatile(#instruction " %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::)

// The tiles of this thread, from the first use until the end of the object's life. Other libraries use them with shapes of
// their own, so nobody may find ours.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (upper_ > 0) asm volatile("tilerelease" ::);
  }

  // For this many upper and lower rows.
  MINIMIND_INLINE void shape(int upper, int lower) {
    if (upper != upper_ || lower != lower_) configure(upper, lower);
  }

 private:
  void configure(int upper, int lower) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kAmxRows, kAmxRows};
    for (int i = 0; i < 8; ++i)
      if (rows[i] > 0) config.rows[i] = static_cast<uint8_t>(rows[i]), config.row_bytes[i] = kAmxBytes;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
    upper_ = upper, lower_ = lower;
  }

  int upper_ = 0, lower_ = 0;
};

template <class T>
constexpr int kAmxMost = 2 * kAmxRows;  // of activations, which one pass over the weights multiplies
template <>
constexpr int kAmxMost<q8> = kAmxRows;
// Rows from which tiles are used. Sums of integers are the same bits without: for fewer rows the vectors' instructions, which
// need not bring the sums back from tiles (the number is an estimate, not measured).
template <class T>
constexpr int64_t kAmxFrom = 1 << 30;
template <>
constexpr int64_t kAmxFrom<bf16> = 1;
template <>
constexpr int64_t kAmxFrom<q8> = 8;

// N blocks, `size` numbers apart, times rows x[first..first + rows): out[row][block]. ahead: null, or memory, as much as the
// blocks take, that is brought nearer meanwhile.
template <int N>
inline void multiply_tiles(Tiles& tiles, const bf16* blocks, int64_t size, int64_t k_size, Rows<const bf16> x,
                           int64_t first, int rows, const char* ahead, Floats (*out)[N]) {
  constexpr int kStep = 2 * kAmxRows, kSpan = 4 * kStep;  // numbers along K: of a tile, and those gathered at once
  const int upper = rows > kAmxRows ? (rows + 1) / 2 : rows, lower = rows - upper;
  tiles.shape(upper, lower);
  alignas(64) bf16 gathered[2 * kAmxRows][kSpan], last_weights[N][kAmxRows * kStep];
  MINIMIND_ZERO_TILE(0);
  if (N > 1) MINIMIND_ZERO_TILE(1);
  if (lower > 0) MINIMIND_ZERO_TILE(2);
  if (lower > 0 && N > 1) MINIMIND_ZERO_TILE(3);
  for (int64_t k = 0; k < k_size; k += kSpan) {
    const int64_t span = k_size - k < kSpan ? k_size - k : kSpan;
    const bf16* from = x[first] + k;
    int64_t stride = x.stride * static_cast<int64_t>(sizeof(bf16));
    if (x.index != nullptr || span % kStep != 0) {  // zeros fill the last tile
      for (int b = 0; b < rows; ++b) {
        __builtin_memcpy(gathered[b], x[first + b] + k, static_cast<size_t>(span) * sizeof(bf16));
        __builtin_memset(gathered[b] + span, 0, static_cast<size_t>(kSpan - span) * sizeof(bf16));
      }
      from = gathered[0], stride = sizeof(gathered[0]);
    }
    const char *upper_rows = reinterpret_cast<const char*>(from), *lower_rows = upper_rows + upper * stride;
    for (int64_t j = 0; j < span; j += kStep, upper_rows += kAmxBytes, lower_rows += kAmxBytes) {
      const bf16* weights[N];
      for (int n = 0; n < N; ++n) {
        weights[n] = blocks + n * size + (k + j) * kBlock;
        if (span - j < kStep) {
          const auto bytes = static_cast<size_t>((span - j) * kBlock) * sizeof(bf16);
          __builtin_memset(last_weights[n], 0, sizeof(last_weights[n]));
          __builtin_memcpy(last_weights[n], weights[n], bytes);
          weights[n] = last_weights[n];
        }
      }
      if (ahead != nullptr)
        for (int line = 0; line < N * kAmxRows; ++line, ahead += kAmxBytes) __builtin_prefetch(ahead, 0, 2);
      MINIMIND_LOAD_TILE(6, weights[0], kAmxBytes);
      if (N > 1) MINIMIND_LOAD_TILE(7, weights[N - 1], kAmxBytes);
      MINIMIND_LOAD_TILE(4, upper_rows, stride);
      MINIMIND_ADD_TILES(tdpbf16ps, 0, 4, 6);
      if (N > 1) MINIMIND_ADD_TILES(tdpbf16ps, 1, 4, 7);
      if (lower == 0) continue;
      MINIMIND_LOAD_TILE(5, lower_rows, stride);
      MINIMIND_ADD_TILES(tdpbf16ps, 2, 5, 6);
      if (N > 1) MINIMIND_ADD_TILES(tdpbf16ps, 3, 5, 7);
    }
  }
  MINIMIND_STORE_TILE(0, &out[0][0], N * kAmxBytes);
  if (N > 1) MINIMIND_STORE_TILE(1, &out[0][N - 1], N * kAmxBytes);
  if (lower > 0) MINIMIND_STORE_TILE(2, &out[upper][0], N * kAmxBytes);
  if (lower > 0 && N > 1) MINIMIND_STORE_TILE(3, &out[upper][N - 1], N * kAmxBytes);
}

// The same for a block of integers and at most 16 rows; `out` has sixteen. A group is one tile; its sums become float32 as in
// int8.h.
template <int N>
inline void multiply_tiles(Tiles& tiles, const q8* block, int64_t, int64_t k_size, Rows<const ActivationGroup> x,
                           int64_t first, int rows, const char* ahead, Floats (*out)[N]) {
  static_assert(N == 1);
  tiles.shape(rows, 0);
  alignas(64) int8_t gathered[kAmxRows][kGroup];
  __m512i products[kAmxRows] = {};
  Floats sums[kAmxRows] = {};
  const ActivationGroup* groups[kAmxRows];  // sixteen, so that sums stay in registers; those beyond `rows` are not used
  for (int b = 0; b < kAmxRows; ++b) groups[b] = x[first + (b < rows ? b : rows - 1)];
  for (int64_t g = 0; g < k_size / kGroup; ++g) {
    const int8_t *weights = &block[g * kGroup * kBlock].value, *values = groups[0][g].values;
    int64_t stride = x.stride * static_cast<int64_t>(sizeof(ActivationGroup));
    if (x.index != nullptr) {
      for (int b = 0; b < rows; ++b) __builtin_memcpy(gathered[b], groups[b][g].values, kGroup);
      values = gathered[0], stride = kGroup;
    }
    if (ahead != nullptr)
      for (int line = 0; line < kAmxRows; ++line, ahead += kAmxBytes) __builtin_prefetch(ahead, 0, 2);
    MINIMIND_ZERO_TILE(0);
    MINIMIND_LOAD_TILE(6, weights, kAmxBytes);
    MINIMIND_LOAD_TILE(4, values, stride);
    MINIMIND_ADD_TILES(tdpbssd, 0, 4, 6);
    MINIMIND_STORE_TILE(0, products, kAmxBytes);
#pragma GCC unroll 16
    for (int b = 0; b < kAmxRows; ++b) sums[b] += IntegerProduct::floats(products[b]) * groups[b][g].scale;
  }
  const Floats scales = load(reinterpret_cast<const float*>(block + k_size * kBlock));
#pragma GCC unroll 16
  for (int b = 0; b < kAmxRows; ++b) out[b][0] = sums[b] * scales;
}
#endif

}  // namespace minimind::cpu::MINIMIND_ISA
