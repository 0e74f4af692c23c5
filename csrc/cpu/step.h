// One step of the whole model, by one team of threads in one parallel region: rows are the newest tokens of different
// sequences, or successive tokens of prompts. All keys and values of a layer are written before any are read. A layer is
//
//   x += what the layer before made; norm | qkv | rotate, write to the cache | attend | o | x += o; norm; route |
//   gate and up, SwiGLU | down |
//
// with the team meeting at each |. x, the residual stream, is float32. A dense feed-forward is the case of no routed and
// one shared expert. The weights of an expert are read once for all the tokens it gets.
#pragma once

#include "attention.h"
#include "dots.h"
#include "feed_forward.h"

namespace minimind::cpu::MINIMIND_ISA {

// Weights that a thread takes at a time, divided by the number of tiles of rows: some 5 microseconds of work. 32 KB cost a
// step of a small model 4 %.
constexpr int64_t kPieceBytes = 128 << 10;

// Products that the whole team divides: of a layer qkv, o, gate and up, down; the logits.
inline int64_t products(const Step& s) { return 4 * static_cast<int64_t>(s.num_layers) + 1; }

template <class T>
struct Buffers {
  int64_t qkv_size, heads_size, copies;       // copies: rows of the feed-forward, B for each choice and shared expert
  int64_t normed_k, attended_k, hidden_k;     // as long as the padded weights' rows
  int64_t normed_row, attended_row, hidden_row;  // numbers of Activation<T>
  float *x, *qkv, *delta, *made, *gates, *partial, *work;
  Activation<T>*normed, *attended, *hidden;
  Waiting<T>*attended_wide, *hidden_wide;  // rows attended_k and hidden_k long; the same memory if it is the same type
  int32_t *chosen, *sorting;
  GivenOut* given;  // [products of a step, threads]
  int64_t *counters, work_size, sorting_size;  // of one thread
  size_t bytes;

  Buffers(const Step& s, char* memory) {
    heads_size = static_cast<int64_t>(s.rope.heads) * s.cache.head_dim;
    qkv_size = heads_size + 2 * static_cast<int64_t>(s.cache.groups) * s.cache.head_dim;
    const int64_t choices = s.batch * s.experts_per_token;
    copies = choices + s.batch * s.shared_experts;
    normed_k = padded<T>(s.hidden), attended_k = padded<T>(heads_size);
    hidden_k = padded<T>(kBlock * blocks_of(s.expert_inner > s.shared_inner ? s.expert_inner : s.shared_inner));
    normed_row = row_size<T>(normed_k), attended_row = row_size<T>(attended_k), hidden_row = row_size<T>(hidden_k);
    work_size = s.hidden + s.experts + kBlock * s.batch;
    sorting_size = s.experts + 1 + 2 * choices;
    char* at = memory;
    const auto take = [&](auto*& pointer, int64_t n) {
      pointer = reinterpret_cast<Bare<decltype(pointer)>>(at);
      at += (static_cast<size_t>(n) * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(x, s.batch * s.hidden);
    take(qkv, s.batch * qkv_size);
    take(delta, s.batch * s.hidden);
    take(made, copies * s.hidden);
    take(gates, choices);
    take(partial, attention_scratch(s.tables.lengths, s.batch, s.rope.heads, s.cache.head_dim));
    take(work, work_size * s.threads);
    take(normed, s.batch * normed_row);
    take(attended, s.batch * attended_row);
    take(hidden, copies * hidden_row);
    if constexpr (kIs8Bit<T>) {
      take(attended_wide, s.batch * attended_k);
      take(hidden_wide, copies * hidden_k);
    } else {
      attended_wide = attended, hidden_wide = hidden;
    }
    take(chosen, choices);
    take(sorting, sorting_size * s.threads);
    take(counters, s.num_layers);
    take(given, products(s) * s.threads);
    bytes = static_cast<size_t>(at - memory);
  }
};

template <class T>
struct StepRunner {
  const Step& s;
  const Buffers<T>& m;
  Team team;
  int64_t products_done = 0;

  float* work() const { return m.work + team.rank * m.work_size; }

  void run() {
    for (int64_t i = 0; i < products(s); ++i) m.given[i * s.threads + team.rank].items = 0;
    clear_padding();
    for (int l = 0; l < s.num_layers; ++l) {
      const Layer& layer = s.layers[l];
      add_and_norm(layer.input_norm, [&](int64_t b, float* x) { l == 0 ? embed(b, x) : add_made(b, x); });
      team.sync();
      project(layer.qkv, m.normed, m.normed_k, m.qkv_size, m.qkv);
      team.sync();
      attention(l);
      project(layer.o, m.attended, m.attended_k, s.hidden, m.delta);
      team.sync();
      add_and_norm(layer.post_norm, [&](int64_t b, float* x) { add(x, m.delta + b * s.hidden, 1); }, layer.router);
      team.sync();
      feed_forward(layer);
    }
    add_and_norm(s.final_norm, [&](int64_t b, float* x) { add_made(b, x); });
    team.sync();
    const int64_t rows = s.last == nullptr ? s.batch : s.num_last;
    project(s.head, m.normed, m.normed_k, s.vocab, s.logits, rows, s.last, [&](Range numbers) {
      for (int64_t i = 0; i < rows; ++i)
        if (s.tables.lengths[s.last == nullptr ? i : s.last[i]] <= 0) zero(s.logits + i * s.vocab, numbers);
    });
  }

  template <class N>
  static void zero(N* row, Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) row[i] = N{};
  }
  void clear_padding() const {
    if constexpr (kIs8Bit<T>) return;  // its groups are always written whole
    const Range mine = team.share(s.batch);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      zero(m.normed + b * m.normed_row, {s.hidden, m.normed_row});
      zero(m.attended + b * m.attended_row, {m.heads_size, m.attended_row});
    }
  }

  void embed(int64_t b, float* x) const {
    load_row(s.type, s.embedding, s.tokens[b] * s.hidden, x, static_cast<int>(s.hidden));
  }
  void add(float* __restrict x, const float* __restrict delta, float factor) const {
    for (int64_t i = 0; i < s.hidden; ++i) x[i] += factor * delta[i];
  }
  void add_made(int64_t b, float* x) const {
    float* sum = work();
    for (int64_t i = 0; i < s.hidden; ++i) sum[i] = 0;
    for (int64_t k = 0; k < s.experts_per_token; ++k) {
      const int64_t copy = b * s.experts_per_token + k;
      add(sum, m.made + copy * s.hidden, m.gates[copy]);
    }
    for (int64_t e = 0; e < s.shared_experts; ++e)
      add(sum, m.made + (s.batch * (s.experts_per_token + e) + b) * s.hidden, 1);
    add(x, sum, 1);
  }

  template <class Add>
  void add_and_norm(const float* weight, Add add_to, const float* router = nullptr) const {
    const Range mine = team.share(s.batch);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      float *x = m.x + b * s.hidden, *normed = work();
      add_to(b, x);
      const float factor = inverse_rms(x, s.hidden, s.eps);
      for (int64_t i = 0; i < s.hidden; ++i) normed[i] = x[i] * factor * weight[i];
      if (router != nullptr) route(b, normed, router, work() + s.hidden);
      to_activations(normed, m.normed + b * m.normed_row, s.hidden);
    }
  }

  static void to_activations(const float* from, Activation<T>* to, int64_t n) {
    if constexpr (kIs8Bit<T>) {
      for (int64_t i = 0; i * kGroup < n; ++i) quantize(from + i * kGroup, n - i * kGroup, to[i]);
    } else {
      round_row(from, to, n);
    }
  }
  template <class A>
  static void round_row(const float* from, A* to, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, as_factor<T>(load(from + i)));
    if (i < n) store_some(to + i, as_factor<T>(load_some(from + i, n - i)), n - i);
  }

  void route(int64_t b, const float* normed, const float* router, float* logits) const {
    dots(router, s.hidden, s.experts, normed, logits);
    const int64_t at = b * s.experts_per_token;
    choose_experts(logits, s.experts, s.experts_per_token, s.normalize_gates, m.gates + at, m.chosen + at);
  }

  // Rows `from` [rows, from_row] that the team has computed, n numbers in each, become operands of the next product.
  void finish_rows(const Waiting<T>* from, int64_t from_row, int64_t rows, int64_t n, Activation<T>* to,
                   int64_t to_row) const {
    if constexpr (kIs8Bit<T>) {
      const int64_t groups = packed_k8(n) / kGroup;
      const Range mine = team.share(rows * groups);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / groups, group = i % groups, first = group * kGroup;
        quantize(from + row * from_row + first, n - first, to[row * to_row + group]);
      }
    }
  }

  // The blocks of one product, of `size` numbers each, by the whole team.
  template <class F>
  void divide(int64_t blocks, int64_t size, F f) {
    const int64_t tiles = (s.batch + kBatch<T> - 1) / kBatch<T>;
    const int64_t pairs = kPieceBytes / (2 * size * static_cast<int64_t>(sizeof(T)) * tiles);
    team.divide(blocks, pairs < 1 ? 2 : 2 * pairs, m.given + products_done++ * s.threads, f);
  }

  // out [B, N] = x [B, K] . w [N, K], by the whole team; done(range of N) follows each part. index: which rows of x.
  void project(const void* w, const Activation<T>* x, int64_t k_size, int64_t n, float* out) {
    project(w, x, k_size, n, out, s.batch, nullptr, [](Range) {});
  }
  template <class Done>
  void project(const void* w, const Activation<T>* x, int64_t k_size, int64_t n, float* out, int64_t count,
               const int32_t* index, Done done) {
    const Rows<const Activation<T>> rows{x, row_size<T>(k_size), index};
    divide(blocks_of(n), block_size<T>(k_size), [&](Range blocks) {
      matmul(static_cast<const T*>(w), k_size, n, blocks.begin, blocks.end, rows, count, Rows<float>{out, n});
      done({blocks.begin * kBlock, blocks.end * kBlock < n ? blocks.end * kBlock : n});
    });
  }

  void attention(int l) {
    Cache cache = s.cache;
    const size_t number = cache.type == Type::float32 ? 4 : cache.type == Type::float8 ? 1 : 2;
    cache.keys = static_cast<char*>(cache.keys) + static_cast<size_t>(l * s.layer_stride) * number;
    cache.values = static_cast<char*>(cache.values) + static_cast<size_t>(l * s.layer_stride) * number;
    if (cache.k_scale != nullptr) cache.k_scale += l * cache.groups, cache.v_scale += l * cache.groups;

    const int64_t dim = cache.head_dim, per_token = m.qkv_size / dim;
    const Range mine = team.share(s.batch * per_token);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      place_head(s.rope, cache, s.layers[l].q_norm, s.layers[l].k_norm, i / per_token, i % per_token, m.qkv + i * dim);
    team.sync();
    const Attention a{cache, s.tables, m.qkv, m.qkv_size, s.batch, s.rope.heads, s.attention_scale, m.partial};
    attend(a, team, m.counters + l, [&](int64_t b, int64_t head, const float* row) {
      round_row(row, m.attended_wide + b * m.attended_k + head * dim, dim);
    });
    if constexpr (kIs8Bit<T>) {
      finish_rows(m.attended_wide, m.attended_k, s.batch, m.heads_size, m.attended, m.attended_row);
      team.sync();
    }
  }

  void feed_forward(const Layer& layer) {
    int32_t *starts = m.sorting + team.rank * m.sorting_size, *rows = starts + s.experts + 1;
    int32_t* sorted = rows + s.batch * s.experts_per_token;
    if (s.experts > 0)
      sort_copies(m.chosen, s.batch * s.experts_per_token, s.experts, s.experts_per_token, starts, rows, sorted);
    const auto expert = [&](int64_t e) -> Expert {
      if (e >= s.experts) {
        const int64_t i = e - s.experts, first = s.batch * (s.experts_per_token + i);
        return {layer.shared[2 * i], layer.shared[2 * i + 1], s.shared_inner, s.batch, nullptr, nullptr, first};
      }
      const auto *gate_ups = static_cast<const T*>(layer.gate_up), *downs = static_cast<const T*>(layer.down);
      const int64_t up_size = 2 * blocks_of(s.expert_inner) * block_size<T>(m.normed_k);
      const int64_t down_size = blocks_of(s.hidden) * block_size<T>(padded<T>(s.expert_inner)), begin = starts[e];
      return {gate_ups + e * up_size, downs + e * down_size, s.expert_inner, starts[e + 1] - begin,
              rows + begin,           sorted + begin,        0};
    };
    const auto inner_blocks = [](const Expert& e) { return blocks_of(e.inner); };
    over_experts(2 * block_size<T>(m.normed_k), expert, inner_blocks, [&](const Expert& e, Range blocks) {
      const Rows<Waiting<T>> out{m.hidden_wide + e.first_copy * m.hidden_k, m.hidden_k, e.out_rows};
      const Rows<const Activation<T>> x{m.normed, m.normed_row, e.x_rows};
      gate_up(static_cast<const T*>(e.gate_up), m.normed_k, blocks.begin, blocks.end, x, e.batch, out, work());
    });
    team.sync();
    if constexpr (kIs8Bit<T>) {
      const int64_t routed = s.batch * s.experts_per_token;
      finish_rows(m.hidden_wide, m.hidden_k, routed, s.expert_inner, m.hidden, m.hidden_row);
      finish_rows(m.hidden_wide + routed * m.hidden_k, m.hidden_k, m.copies - routed, s.shared_inner,
                  m.hidden + routed * m.hidden_row, m.hidden_row);
      team.sync();
    }
    const auto down_blocks = [&](const Expert&) { return blocks_of(s.hidden); };
    over_experts(block_size<T>(m.hidden_k), expert, down_blocks, [&](const Expert& e, Range blocks) {
      const Rows<const Activation<T>> x{m.hidden + e.first_copy * m.hidden_row, m.hidden_row, e.out_rows};
      const Rows<float> out{m.made + e.first_copy * s.hidden, s.hidden, e.out_rows};
      matmul(static_cast<const T*>(e.down), padded<T>(e.inner), s.hidden, blocks.begin, blocks.end, x, e.batch, out);
    });
    team.sync();
  }

  // The blocks of all experts that have tokens, of `block` numbers each, by the whole team: visit(expert, some of its blocks).
  template <class Get, class Size, class Visit>
  void over_experts(int64_t block, Get get, Size size, Visit visit) {
    const int64_t count = s.experts + s.shared_experts;
    int64_t total = 0;
    for (int64_t e = 0; e < count; ++e) {
      const Expert expert = get(e);
      if (expert.batch > 0) total += size(expert);
    }
    divide(total, block, [&](Range piece) {
      int64_t before = 0;
      for (int64_t e = 0; e < count; ++e) {
        const Expert expert = get(e);
        if (expert.batch == 0) continue;
        const int64_t blocks = size(expert);
        const int64_t begin = piece.begin - before, end = piece.end - before;
        const Range part{begin < 0 ? 0 : begin, end > blocks ? blocks : end};
        if (part.begin < part.end) visit(expert, part);
        before += blocks;
      }
    });
  }
};

}  // namespace minimind::cpu::MINIMIND_ISA
