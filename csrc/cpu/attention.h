// Attention of one query token over the paged cache. A task is one chunk of kChunk tokens of one key/value head of one
// sequence, with all query heads that share it: keys and values are read once. Results of several chunks are merged in
// their order (the rescaled sums of online softmax; Milakov & Gimelshein 2018, arXiv 1805.02867).
#pragma once

#include "dots.h"
#include "rope.h"
#include "team.h"

namespace minimind::cpu::MINIMIND_ISA {

constexpr int kValueVectors = kRegisters / 8;  // of a row at once, for 4 query heads: sums fill half the registers

struct Attention {
  Cache cache;
  Tables tables;
  const float* q;  // [B, H, D]
  int64_t q_stride, batch;
  int heads;
  float scale;
  float* partial;  // for each chunk of a sequence of several, head by head: maximum, sum, D numbers
};

struct Task {
  int64_t b, chunk, chunks, first_partial;
};

inline float* partial_of(const Attention& a, int64_t chunk, int64_t head) {
  return a.partial + (chunk * a.heads + head) * (a.cache.head_dim + 2);
}

// Where tokens first .. first + tokens of sequence b, key/value head g, lie.
template <class T>
inline void find_rows(const Attention& a, const void* cache, int64_t b, int64_t first, int tokens, int64_t g,
                      const T** rows) {
  const Cache& c = a.cache;
  const int32_t* page = a.tables.block_table + b * a.tables.table_stride + first / c.page_size;
  const int64_t step = static_cast<int64_t>(c.groups) * c.head_dim;
  for (int64_t t = 0, offset = first % c.page_size; t < tokens; ++page, offset = 0) {
    const T* row = static_cast<const T*>(cache) + *page * c.page_stride + offset * step + g * c.head_dim;
    for (; t < tokens && offset < c.page_size; ++t, ++offset, row += step) rows[t] = row;
  }
}

// Rows of a cache lie scattered over its pages, where the hardware sees no pattern to run ahead of.
template <class T>
MINIMIND_INLINE void prefetch(const T* row, int64_t dim) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = dim * static_cast<int64_t>(sizeof(T));
  __builtin_prefetch(bytes, 0, 2);
  if (size > 64) __builtin_prefetch(bytes + 64, 0, 2);
  for (int64_t at = 128; at < size; at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

constexpr int kRowsAhead = 32;  // keys that are on their way while one is multiplied

// scores[h][t] = scale * q_h . k_t; values are brought nearer meanwhile.
template <class T, int H>
inline void score(const Attention& a, const T* const* keys, const T* const* values, int tokens, const float* const* q,
                  float scale, float (*scores)[kChunk]) {
  const int64_t dim = a.cache.head_dim;
  for (int t = 0; t < kRowsAhead && t < tokens; ++t) prefetch(keys[t], dim);
  int t = 0;
  float out[H][kRows];
  for (; t + kRows <= tokens; t += kRows) {
    for (int r = 0; r < kRows; ++r) {
      if (t + r + kRowsAhead < tokens) prefetch(keys[t + r + kRowsAhead], dim);
      prefetch(values[t + r], dim);
    }
    tile<kRows, H>(keys + t, q, dim, out);
    for (int h = 0; h < H; ++h) {
      const Four four = load_as<Four>(out[h]) * scale;
      __builtin_memcpy(scores[h] + t, &four, sizeof(four));
    }
  }
  for (; t < tokens; ++t) {
    tile<1, H>(keys + t, q, dim, out);
    for (int h = 0; h < H; ++h) scores[h][t] = out[h][0] * scale;
  }
}

template <class T>
struct Soon {  // the first keys of the likely next task
  const T* keys[kRowsAhead];
  int count = 0;
};

// A NaN is the maximum, and stays it.
inline float larger(float a, float b) { return b > a || b != b ? b : a; }
inline Floats larger(Floats a, Floats b) { return select((b > a) | (b != b), b, a); }

// p[t] = exp(s[t] - maximum) in place; returns their sum. Lanes beyond `tokens` are zeros.
inline float softmax_numerators(float* s, int tokens, float* maximum_out) {
  float maximum = s[0];
  int whole = 0;
  if (tokens >= kWidth) {
    Floats largest = load(s);
    for (whole = kWidth; whole + kWidth <= tokens; whole += kWidth) largest = larger(largest, load(s + whole));
    for (int i = 0; i < kWidth; ++i) maximum = larger(maximum, largest[i]);
  }
  for (int t = whole; t < tokens; ++t) maximum = larger(maximum, s[t]);
  Floats total = {};
  for (int t = 0; t < tokens; t += kWidth) {
    if (t + kWidth <= tokens) {
      const Floats p = exponential(load(s + t) - maximum);
      total += p;
      store(s + t, p);
    } else {
      const int left = tokens - t;
      store_some(s + t, exponential(load_some(s + t, left) - maximum), left);
      total += load_some(s + t, left);
    }
  }
  *maximum_out = maximum;
  return sum(total);
}

// out[h][d] = sum over t of p[h][t] v[t][d] for kN vectors of d from `d` on; `left`: numbers of the last vector. Meanwhile
// the keys `soon` [soon_count], of `dim` numbers, are brought nearer.
template <class T, int H, int kN>
MINIMIND_INLINE void weigh(const T* const* values, int tokens, const float (*p)[kChunk], int64_t d, int64_t left,
                           float* const* out, const T* const* soon, int soon_count, int64_t dim) {
  Floats acc[H][kN] = {};
  for (int t = 0; t < tokens; ++t) {
    if (t < soon_count) prefetch(soon[t], dim);
    Floats v[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i)
      v[i] = left == kWidth ? load(values[t] + d + i * kWidth) : load_some(values[t] + d + i * kWidth, left);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) acc[h][i] += p[h][t] * v[i];
  }
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < kN; ++i)
      if (left == kWidth)
        store(out[h] + d + i * kWidth, acc[h][i]);
      else
        store_some(out[h] + d + i * kWidth, acc[h][i], left);
}

// H query heads from `head` on, which share key/value head g, over one chunk. finish(b, head, row [D]) takes a result.
template <class T, int H, class Finish>
inline void attend_heads(const Attention& a, const Task& task, const T* const* keys, const T* const* values, int tokens,
                         int64_t g, int64_t head, const Soon<T>& soon, Finish finish) {
  const Cache& c = a.cache;
  alignas(64) float p[H][kChunk], numbers[H][kMaxHeadDim];
  float maximum[H], total[H], *out[H];
  const float* q[H];
  for (int h = 0; h < H; ++h) {
    q[h] = a.q + task.b * a.q_stride + (head + h) * c.head_dim;
    out[h] = numbers[h];
  }
  score<T, H>(a, keys, values, tokens, q, a.scale * (c.k_scale == nullptr ? 1.0f : c.k_scale[g]), p);
  for (int h = 0; h < H; ++h) total[h] = softmax_numerators(p[h], tokens, &maximum[h]);
  int64_t d = 0;
  const auto soon_count = [&] { return d == 0 ? soon.count : 0; };
  for (; d + kValueVectors * kWidth <= c.head_dim; d += kValueVectors * kWidth)
    weigh<T, H, kValueVectors>(values, tokens, p, d, kWidth, out, soon.keys, soon_count(), c.head_dim);
  for (; d + kWidth <= c.head_dim; d += kWidth)
    weigh<T, H, 1>(values, tokens, p, d, kWidth, out, soon.keys, soon_count(), c.head_dim);
  if (d < c.head_dim)
    weigh<T, H, 1>(values, tokens, p, d, c.head_dim - d, out, soon.keys, soon_count(), c.head_dim);

  const float v_scale = c.v_scale == nullptr ? 1.0f : c.v_scale[g];
  for (int h = 0; h < H; ++h) {
    const bool whole = task.chunks == 1;
    float* to = whole ? numbers[h] : partial_of(a, task.first_partial + task.chunk, head + h) + 2;
    if (!whole) to[-2] = maximum[h], to[-1] = total[h];
    const float factor = whole ? v_scale / total[h] : v_scale;
    for (int i = 0; i < c.head_dim; ++i) to[i] = numbers[h][i] * factor;
    if (whole) finish(task.b, head + h, to);
  }
}

// Tokens of a task, at most `most`.
inline int tokens_of(const Attention& a, const Task& task, int64_t most) {
  const int64_t left = a.tables.lengths[task.b] - task.chunk * kChunk;
  return static_cast<int>(left < most ? left : most);
}

// next: the likely task after this one, of head next_g; null if there is none.
template <class T, class Finish>
inline void attend_chunk(const Attention& a, const Task& task, int64_t g, const Task* next, int64_t next_g,
                         Finish finish) {
  const int64_t first = task.chunk * kChunk;
  const int tokens = tokens_of(a, task, kChunk);
  Soon<T> soon;
  if (next != nullptr) {
    soon.count = tokens_of(a, *next, kRowsAhead);
    find_rows<T>(a, a.cache.keys, next->b, next->chunk * kChunk, soon.count, next_g, soon.keys);
  }
  const T *keys[kChunk], *values[kChunk];
  find_rows<T>(a, a.cache.keys, task.b, first, tokens, g, keys);
  find_rows<T>(a, a.cache.values, task.b, first, tokens, g, values);
  const int64_t shared = a.heads / a.cache.groups, end = (g + 1) * shared;
  int64_t head = g * shared;
  for (; head + 4 <= end; head += 4) attend_heads<T, 4>(a, task, keys, values, tokens, g, head, soon, finish);
  for (; head + 2 <= end; head += 2) attend_heads<T, 2>(a, task, keys, values, tokens, g, head, soon, finish);
  for (; head < end; ++head) attend_heads<T, 1>(a, task, keys, values, tokens, g, head, soon, finish);
}

template <class Finish>
inline void merge(const Attention& a, const Task& task, int64_t head, Finish finish) {
  const int dim = a.cache.head_dim;
  float row[kMaxHeadDim] = {}, maximum = partial_of(a, task.first_partial, head)[0], total = 0;
  for (int64_t i = 1; i < task.chunks; ++i) {
    const float other = partial_of(a, task.first_partial + i, head)[0];
    maximum = larger(maximum, other);
  }
  for (int64_t i = 0; i < task.chunks; ++i) {
    const float* part = partial_of(a, task.first_partial + i, head);
    const float factor = exponential(broadcast(part[0] - maximum))[0];
    total += factor * part[1];
    for (int d = 0; d < dim; ++d) row[d] += factor * part[2 + d];
  }
  for (int d = 0; d < dim; ++d) row[d] /= total;
  finish(task.b, head, row);
}

// Where the chunks of the whole batch lie, looked up task by task: tasks come in ascending order.
struct Tasks {
  const Attention& a;
  int64_t b = 0, before = 0;

  Task find(int64_t index) {
    for (;; ++b) {
      const int64_t chunks = chunks_of(a.tables.lengths[b]);
      if (index < before + chunks) return {b, index - before, chunks, before};
      before += chunks;
    }
  }
};

// The whole team computes the attention of the batch: finish(b, head, row [D]) is called once for each head, with zeros
// where a length is 0. counter: 0 on entry, shared. The team meets at the end.
template <class Finish>
inline void attend(const Attention& a, const Team& team, int64_t* counter, Finish finish) {
  int64_t all = 0;
  bool several = false;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t chunks = chunks_of(a.tables.lengths[b]);
    all += chunks;
    several |= chunks > 1;
    if (chunks > 0 || b % team.size != team.rank) continue;
    float zeros[kMaxHeadDim] = {};
    for (int64_t head = 0; head < a.heads; ++head) finish(b, head, zeros);
  }
  const int64_t groups = a.cache.groups;
  Tasks tasks{a}, coming{a};
  for (int64_t i = Team::next(counter); i < all * groups; i = Team::next(counter)) {
    const Task task = tasks.find(i / groups);
    const int64_t then = i + team.size;  // likely the next one of this thread
    const bool more = then < all * groups;
    const Task next = more ? coming.find(then / groups) : Task{};
    with_type(a.cache.type, a.cache.keys, [&](const auto* p) {
      attend_chunk<Bare<decltype(*p)>>(a, task, i % groups, more ? &next : nullptr, then % groups, finish);
    });
  }
  team.sync();
  if (!several) return;
  const Range mine = team.share(a.batch * a.heads);
  Tasks sequences{a};
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t b = i / a.heads;
    while (sequences.b < b) sequences.before += chunks_of(a.tables.lengths[sequences.b++]);
    const int64_t chunks = chunks_of(a.tables.lengths[b]);
    if (chunks > 1) merge(a, {b, 0, chunks, sequences.before}, i % a.heads, finish);
  }
  team.sync();
}

}  // namespace minimind::cpu::MINIMIND_ISA
