// Causal attention of packed documents for training: forward and backward.
//
//     s = scale q k^T      p = softmax(s)      o = p v
//     dv = p^T do      dp = do v^T      ds = scale p (dp - sum(dp p))      dq = ds k      dk = ds^T q
//
// One task is one document and one key/value head, whose keys and values are packed once for all query heads that share
// them. A tile is some query rows with all their keys: a row's softmax is complete in it, and the scores stay in the
// cache. Scores, softmax and sums are float32; p and ds are rounded to bfloat16 where products take that. Nothing is
// kept for the backward. Every product runs through `multiply`. Letters: L tokens of the document, D head size.
#pragma once

#include "vec.h"

namespace minimind::cpu::MINIMIND_ISA {

// The operands of a product: numbers of one type. A unit is `kPair` neighbours along the summed dimension.
template <class E>
struct Factor {
  static constexpr int kPair = 1;
  using Unit = float;
  using Units = Floats;
  static MINIMIND_INLINE Floats add(Floats sum, float a, Units b) { return sum + a * b; }
  static MINIMIND_INLINE Units load_units(const float* from) { return load(from); }
};
#if defined(MINIMIND_HAS_PAIRS)
template <>
struct Factor<bf16> {
  static constexpr int kPair = 2;
  using Unit = uint32_t;
  using Units = Pairs;
  static MINIMIND_INLINE Floats add(Floats sum, uint32_t a, Units b) { return add_products(sum, broadcast_pair(a), b); }
  static MINIMIND_INLINE Units load_units(const uint32_t* from) { return load_as<Pairs>(from); }
};
#endif
template <class E>
using Unit = typename Factor<E>::Unit;

MINIMIND_INLINE int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
MINIMIND_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

MINIMIND_INLINE float number(float x) { return x; }
MINIMIND_INLINE float number(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return __builtin_bit_cast(float, bits);
}

// All ones in the first n lanes.
MINIMIND_INLINE Ints first_lanes(int64_t n) {
  Ints lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(smaller(n, kWidth));
}

constexpr int kPanel = 16;  // columns of a packed operand that lie together; D is a multiple of it
constexpr int kTileRows = kRegisters == 32 ? 6 : 4;  // 24 sums, 4 columns and a broadcast: 29 of 32 registers
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;  // 8 sums of 16
constexpr int kPanelVectors = kPanel / kWidth;

// c[ROWS, VECTORS * kWidth] = (add ? c : 0) + a b. Unit (m, s) of a is a[m * a_row + s * a_step]; vector n of b's step s
// is b[(n / kPanelVectors) * b_panel + s * kPanel + (n % kPanelVectors) * kWidth].
template <class E, int ROWS, int VECTORS>
MINIMIND_INLINE void multiply_tile(const Unit<E>* a, int64_t a_row, int64_t a_step, const Unit<E>* b, int64_t b_panel,
                                   int64_t steps, float* c, int64_t c_row, bool add) {
  Floats sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) sum[m][n] = add ? load(c + m * c_row + kWidth * n) : Floats{};
  for (int64_t s = 0; s < steps; ++s) {
    typename Factor<E>::Units columns[VECTORS];
    for (int n = 0; n < VECTORS; ++n)
      columns[n] = Factor<E>::load_units(b + n / kPanelVectors * b_panel + s * kPanel + n % kPanelVectors * kWidth);
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < VECTORS; ++n) sum[m][n] = Factor<E>::add(sum[m][n], a[m * a_row + s * a_step], columns[n]);
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) store(c + m * c_row + kWidth * n, sum[m][n]);
}

template <class E, int ROWS>
void multiply_rows(const Unit<E>* a, int64_t a_row, int64_t a_step, const Unit<E>* b, int64_t b_panel, int64_t panels,
                   int64_t steps, float* c, int64_t c_row, bool add) {
  constexpr int kPanels = kTileVectors >= kPanelVectors ? kTileVectors / kPanelVectors : 1;  // of a tile
  constexpr int kParts = kTileVectors >= kPanelVectors ? 1 : kPanelVectors / kTileVectors;   // of a panel, where registers are few
  for (; panels >= kPanels; panels -= kPanels, b += kPanels * b_panel, c += kPanels * kPanel)
    for (int part = 0; part < kParts; ++part)
      multiply_tile<E, ROWS, kPanels * kPanelVectors / kParts>(a, a_row, a_step, b + part * kTileVectors * kWidth, b_panel,
                                                         steps, c + part * kTileVectors * kWidth, c_row, add);
  if constexpr (kPanels > 1)
    for (; panels > 0; --panels, b += b_panel, c += kPanel)
      multiply_tile<E, ROWS, kPanelVectors>(a, a_row, a_step, b, b_panel, steps, c, c_row, add);
}

// c[rows, kPanel * panels] = (add ? c : 0) + a b
template <class E>
void multiply(const Unit<E>* a, int64_t a_row, int64_t a_step, int64_t rows, const Unit<E>* b, int64_t b_panel,
              int64_t panels, int64_t steps, float* c, int64_t c_row, bool add) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row)
    multiply_rows<E, kTileRows>(a, a_row, a_step, b, b_panel, panels, steps, c, c_row, add);
  for (; rows >= 2; rows -= 2, a += 2 * a_row, c += 2 * c_row)
    multiply_rows<E, 2>(a, a_row, a_step, b, b_panel, panels, steps, c, c_row, add);
  if (rows > 0) multiply_rows<E, 1>(a, a_row, a_step, b, b_panel, panels, steps, c, c_row, add);
}

// Numbers `at` and, in a pair, `at + step` as one unit; null rows are zeros.
template <class E>
MINIMIND_INLINE Unit<E> unit(const E* low, const E* high) {
  if constexpr (Factor<E>::kPair == 1)
    return low == nullptr ? 0.0f : number(*low);
  else
    return (low == nullptr ? 0u : low->bits) | (high == nullptr ? 0u : static_cast<uint32_t>(high->bits)) << 16;
}

// Rows of D numbers, `stride` apart.
template <class E>
struct Strided {
  E* data;
  int64_t stride;
  E* operator[](int64_t i) const { return data + i * stride; }
};
template <class E>
Strided(E*, int64_t) -> Strided<E>;

// x [rows, D] as a left operand: [rows, D / pair] units.
template <class E>
void pack_left(Strided<const E> x, int64_t rows, int64_t size, Unit<E>* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < size; d += Factor<E>::kPair) *to++ = unit<E>(x[i] + d, x[i] + d + 1);
}

// x [L, D] as the right operand x^T [D, L]: panels of kPanel tokens, each [D / pair, kPanel] units; zeros after the last.
template <class E>
void pack_transposed(Strided<const E> x, int64_t length, int64_t size, Unit<E>* to) {
  constexpr int kPair = Factor<E>::kPair;
  const int64_t steps = size / kPair;
  for (int64_t panel = 0; panel < length; panel += kPanel, to += kPanel * steps)
    for (int64_t i = 0; i < kPanel; ++i) {
      const E* row = panel + i < length ? x[panel + i] : nullptr;
      for (int64_t s = 0; s < steps; ++s)
        to[kPanel * s + i] = row == nullptr ? Unit<E>{} : unit<E>(row + kPair * s, row + kPair * s + 1);
    }
}

// x [L, D] as the right operand: panels of kPanel columns, each [ceil(L / pair), kPanel] units.
template <class E>
void pack_right(Strided<const E> x, int64_t length, int64_t size, Unit<E>* to) {
  for (int64_t column = 0; column < size; column += kPanel)
    for (int64_t i = 0; i < length; i += Factor<E>::kPair) {
      const E *low = x[i] + column, *high = i + 1 < length ? x[i + 1] + column : nullptr;
      for (int c = 0; c < kPanel; ++c) *to++ = unit<E>(low + c, high == nullptr ? nullptr : high + c);
    }
}

// A row of scores [padded] -> exp(scale (s - max)) of the first `keys`, 0 beyond; the result is their sum.
inline float exponentials_of(float* row, int64_t keys, int64_t padded, float scale) {
  Floats highest = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < keys; j += kWidth) {
    const Floats x = load(row + j);
    highest = select((x > highest) & first_lanes(keys - j), x, highest);
  }
  float top = highest[0];
  for (int i = 1; i < kWidth; ++i) top = highest[i] > top ? highest[i] : top;
  Floats total = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Floats y = select(first_lanes(keys - j), exponential((load(row + j) - top) * scale), Floats{});
    total += y;
    store(row + j, y);
  }
  return sum(total);
}

// p and dp of a row [padded], in place of its scores and dp: p normalised, dp becomes scale p (dp - sum(dp p)).
inline void softmax_backward(float* p, float* dp, int64_t keys, int64_t padded, float scale) {
  const float inverse = 1.0f / exponentials_of(p, keys, padded, scale);
  Floats dot = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Floats x = load(p + j) * inverse;
    store(p + j, x);
    dot += x * load(dp + j);  // p is 0, and dp finite, where nothing is seen
  }
  const float mean = sum(dot);
  for (int64_t j = 0; j < padded; j += kWidth) store(dp + j, (load(dp + j) - mean) * scale * load(p + j));
}

// float32 [rows, padded] as a left operand: the numbers themselves, or pairs along a row.
template <class E>
const Unit<E>* as_left(const float* values, int64_t rows, int64_t padded, Unit<E>* pairs) {
  if constexpr (Factor<E>::kPair == 1)
    return values;
  else {
    bf16* to = reinterpret_cast<bf16*>(pairs);
    for (int64_t i = 0; i < rows * padded; i += kWidth) store(to + i, load(values + i));
    return pairs;
  }
}

// The same for its transpose: unit (key, s) is at [s * padded + key], and pairs are of two rows. A last odd row is
// paired with zeros.
template <class E>
const Unit<E>* as_left_transposed(const float* values, int64_t rows, int64_t padded, Unit<E>* pairs) {
  if constexpr (Factor<E>::kPair == 1)
    return values;
  else {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < padded; j += kWidth) {
        const Bits low = rounded_bits(load(values + i * padded + j)) >> 16;
        const Bits high = i + 1 < rows ? rounded_bits(load(values + (i + 1) * padded + j)) : Bits{};
        const Bits both = low | high;
        __builtin_memcpy(pairs + i / 2 * padded + j, &both, sizeof(both));
      }
    return pairs;
  }
}

template <class E>
void store_scaled(const float* from, float factor, E* to, int64_t size) {
  for (int64_t d = 0; d < size; d += kWidth) store(to + d, load(from + d) * factor);
}

constexpr int64_t kQueryRows = 48;  // of a tile: whole register tiles, and an even number

// What one thread needs for the longest document, carved out of one piece of memory.
template <class E>
struct DocumentBuffers {
  int64_t keys;  // of the longest document, rounded up to whole panels
  size_t bytes = 0;
  float *scores, *dscores, *result, *dk, *dv;
  Unit<E> *left, *pairs, *k_transposed, *v_transposed, *k_right, *v_right, *q_right, *dout_right;

  DocumentBuffers(const DocumentCall& c, char* memory) : keys(rounded_up(c.documents[0].length, kPanel)) {
    const int64_t size = c.head_dim;
    const auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<Bare<decltype(to)>>(memory + bytes);
      bytes += static_cast<size_t>(rounded_up(count * static_cast<int64_t>(sizeof(*to)), 64));
    };
    take(scores, kQueryRows * keys);
    take(result, kQueryRows * size);
    take(left, kQueryRows * size);
    take(pairs, kQueryRows * keys);
    take(k_transposed, keys * size);
    if (c.dout == nullptr) {
      take(v_right, keys * size);
      return;
    }
    take(dscores, kQueryRows * keys);
    take(dk, keys * size);
    take(dv, keys * size);
    take(v_transposed, keys * size);
    take(k_right, keys * size);
    take(q_right, keys * size);
    take(dout_right, keys * size);
  }
};

template <class E>
struct DocumentTask {
  int64_t length, size, heads, q_head;  // heads: query heads of this key/value head; q_head: numbers from one to the next
  float scale;

  int64_t steps() const { return size / Factor<E>::kPair; }
  int64_t pairs(int64_t tokens) const { return rounded_up(tokens, Factor<E>::kPair) / Factor<E>::kPair; }

  void forward(Strided<const E> q, Strided<const E> k, Strided<const E> v, Strided<E> out, const DocumentBuffers<E>& b) const {
    pack_transposed<E>(k, length, size, b.k_transposed);
    pack_right<E>(v, length, size, b.v_right);
    for (int64_t head = 0; head < heads; ++head, q.data += q_head, out.data += q_head)
      for (int64_t start = 0; start < length; start += kQueryRows) {
        const int64_t stop = smaller(start + kQueryRows, length), rows = stop - start, keys = rounded_up(stop, kPanel);
        pack_left<E>({q[start], q.stride}, rows, size, b.left);
        multiply<E>(b.left, steps(), 1, rows, b.k_transposed, kPanel * steps(), keys / kPanel, steps(), b.scores, keys, false);
        float inverse[kQueryRows];
        for (int64_t i = 0; i < rows; ++i)
          inverse[i] = 1.0f / exponentials_of(b.scores + i * keys, start + i + 1, keys, scale);
        multiply<E>(as_left<E>(b.scores, rows, keys, b.pairs), keys / Factor<E>::kPair, 1, rows, b.v_right,
                    kPanel * pairs(length), size / kPanel, pairs(stop), b.result, size, false);
        for (int64_t i = 0; i < rows; ++i) store_scaled(b.result + i * size, inverse[i], out[start + i], size);
      }
  }

  void backward(Strided<const E> dout, Strided<const E> q, Strided<const E> k, Strided<const E> v, Strided<E> dq, Strided<E> dk, Strided<E> dv,
                const DocumentBuffers<E>& b) const {
    pack_transposed<E>(k, length, size, b.k_transposed);
    pack_transposed<E>(v, length, size, b.v_transposed);
    pack_right<E>(k, length, size, b.k_right);
    __builtin_memset(b.dk, 0, static_cast<size_t>(length * size) * sizeof(float));
    __builtin_memset(b.dv, 0, static_cast<size_t>(length * size) * sizeof(float));
    for (int64_t head = 0; head < heads; ++head, q.data += q_head, dout.data += q_head, dq.data += q_head) {
      pack_right<E>(q, length, size, b.q_right);
      pack_right<E>(dout, length, size, b.dout_right);
      for (int64_t start = 0; start < length; start += kQueryRows)
        backward_tile(dout, q, dq, start, smaller(start + kQueryRows, length), b);
    }
    for (int64_t i = 0; i < length; ++i) {
      store_scaled(b.dk + i * size, 1.0f, dk[i], size);
      store_scaled(b.dv + i * size, 1.0f, dv[i], size);
    }
  }

  void backward_tile(Strided<const E> dout, Strided<const E> q, Strided<E> dq, int64_t start, int64_t stop,
                     const DocumentBuffers<E>& b) const {
    const int64_t rows = stop - start, keys = rounded_up(stop, kPanel), panel = kPanel * steps();
    const int64_t right = kPanel * pairs(length), offset = kPanel * (start / Factor<E>::kPair);
    pack_left<E>({q[start], q.stride}, rows, size, b.left);
    multiply<E>(b.left, steps(), 1, rows, b.k_transposed, panel, keys / kPanel, steps(), b.scores, keys, false);
    pack_left<E>({dout[start], dout.stride}, rows, size, b.left);
    multiply<E>(b.left, steps(), 1, rows, b.v_transposed, panel, keys / kPanel, steps(), b.dscores, keys, false);
    for (int64_t i = 0; i < rows; ++i)
      softmax_backward(b.scores + i * keys, b.dscores + i * keys, start + i + 1, keys, scale);
    multiply<E>(as_left_transposed<E>(b.scores, rows, keys, b.pairs), 1, keys, stop, b.dout_right + offset, right,
                size / kPanel, pairs(rows), b.dv, size, true);
    multiply<E>(as_left_transposed<E>(b.dscores, rows, keys, b.pairs), 1, keys, stop, b.q_right + offset, right,
                size / kPanel, pairs(rows), b.dk, size, true);
    multiply<E>(as_left<E>(b.dscores, rows, keys, b.pairs), keys / Factor<E>::kPair, 1, rows, b.k_right, right,
                size / kPanel, pairs(stop), b.result, size, false);
    for (int64_t i = 0; i < rows; ++i) store_scaled(b.result + i * size, 1.0f, dq[start + i], size);
  }
};

}  // namespace minimind::cpu::MINIMIND_ISA
