// The CPU kernels, compiled once for each instruction set (MINIMIND_ISA names it; CMakeLists.txt has the flags).
#include "document_attention.h"
#include "step.h"

namespace minimind::cpu::MINIMIND_ISA {
namespace {

void rope_append_kv(const RopeCall& c) {
  const int dim = c.cache.head_dim;
  const int64_t heads = c.rope.heads, per_token = heads + 2 * c.cache.groups;
  float weights[2][kMaxHeadDim];
  const float* norms[2] = {};
  const void* given[2] = {c.rope.q_weight, c.rope.k_weight};
  for (int i = 0; i < 2 && given[i] != nullptr; ++i) {
    load_row(c.rope.weight_type, given[i], 0, weights[i], dim);
    norms[i] = weights[i];
  }
  parallel(c.threads, [&](const Team& team) {
    const Range mine = team.share(c.tokens * per_token);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t n = i / per_token, index = i % per_token;
      float x[kMaxHeadDim];
      load_row(c.type, c.qkv, n * c.qkv_stride + index * dim, x, dim);
      place_head(c.rope, c.cache, norms[0], norms[1], n, index, x);
      if (index < heads) store_row(c.type, x, c.q, (n * heads + index) * dim, dim);
    }
  });
}

void decode_attention(const AttentionCall& c) {
  const int64_t dim = c.cache.head_dim, row = c.heads * dim;
  float* q = c.scratch;  // [B, H, D]
  int64_t counter = 0;
  const Attention a{c.cache, c.tables, q, row, c.batch, c.heads, c.scale, c.scratch + c.batch * row};
  parallel(c.threads, [&](const Team& team) {
    const Range mine = team.share(c.batch);
    for (int64_t b = mine.begin; b < mine.end; ++b)
      load_row(c.type, c.q, b * c.q_stride, q + b * row, static_cast<int>(row));
    team.sync();
    attend(a, team, &counter, [&](int64_t b, int64_t head, const float* result) {
      store_row(c.type, result, c.out, b * row + head * dim, static_cast<int>(dim));
    });
  });
}

template <class T>
void run_step(const Step& s) {
  const Buffers<T> buffers(s, s.scratch);
  for (int l = 0; l < s.num_layers; ++l) buffers.counters[l] = 0;
  parallel(s.threads, [&](const Team& team) { StepRunner<T>{s, buffers, team}.run(); });
}

void decode_step(const Step& s) {
  if (s.quantized) return run_step<q8>(s);
  s.type == Type::float32 ? run_step<float>(s) : run_step<bf16>(s);
}

size_t step_scratch(const Step& s) {
  if (s.quantized) return Buffers<q8>(s, nullptr).bytes;
  return s.type == Type::float32 ? Buffers<float>(s, nullptr).bytes : Buffers<bf16>(s, nullptr).bytes;
}

float largest(const float* x, int64_t n) {
  float best = x[0];
  int64_t i = 0;
  if (n >= kWidth) {
    Floats lanes = load(x);
    for (i = kWidth; i + kWidth <= n; i += kWidth) {
      const Floats next = load(x + i);
      lanes = select(next > lanes, next, lanes);
    }
    for (int lane = 0; lane < kWidth; ++lane) best = lanes[lane] > best ? lanes[lane] : best;
  }
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// masses[i] = f(i, how many of the vector there are), vector by vector, and their sums.
template <class F>
inline void fill_masses(float* masses, double* sums, int64_t n, F f) {
  for (int64_t first = 0; first < n; first += kSumOver) {
    const int64_t end = first + kSumOver < n ? first + kSumOver : n;
    Doubles sum = {};
    int64_t i = first;
    for (; i + kWidth <= end; i += kWidth) {
      const Floats mass = f(i, kWidth);
      store(masses + i, mass);
      sum += __builtin_convertvector(mass, Doubles);
    }
    double all = 0;
    if (i < end) {
      store_some(masses + i, f(i, end - i), end - i);
      for (; i < end; ++i) all += masses[i];
    }
    for (int lane = 0; lane < kWidth; ++lane) all += sum[lane];
    sums[first / kSumOver] = all;
  }
}

MINIMIND_INLINE Floats load_upto(const float* from, int64_t n) { return n == kWidth ? load(from) : load_some(from, n); }

void masses(const float* x, float shift, float* out, double* sums, int64_t n) {
  fill_masses(out, sums, n, [&](int64_t i, int64_t count) { return exponential(load_upto(x + i, count) - shift); });
}

void keep(const float* x, float least, float min_mass, float* masses, double* sums, int64_t n) {
  fill_masses(masses, sums, n, [&](int64_t i, int64_t count) {
    const Floats logit = load_upto(x + i, count), mass = load_upto(masses + i, count);
    return select((logit >= least) & (mass >= min_mass), mass, Floats{});
  });
}

template <class E>
void attend_documents(const DocumentCall& c) {
  const int64_t dim = c.head_dim, of_group = c.heads / c.groups, row = c.heads * dim, kv_row = c.groups * dim;
  const size_t bytes = DocumentBuffers<E>(c, nullptr).bytes;
  int64_t counter = 0;
  parallel(c.threads, [&](const Team& team) {
    const DocumentBuffers<E> buffers(c, c.scratch + bytes * static_cast<size_t>(team.rank));
    for (int64_t t; (t = Team::next(&counter)) < c.num_documents * c.groups;) {
      const Document& document = c.documents[t / c.groups];
      const int64_t group = t % c.groups;
      // of all heads' numbers, this document's and this group's
      const auto of_q = [&](auto* data) { return Strided{data + document.start * row + group * of_group * dim, row}; };
      const auto of_kv = [&](auto* data) { return Strided{data + document.start * kv_row + group * dim, kv_row}; };
      const auto *q = static_cast<const E*>(c.q), *k = static_cast<const E*>(c.k), *v = static_cast<const E*>(c.v);
      const DocumentTask<E> task{document.length, dim, of_group, dim, c.scale};
      if (c.dout == nullptr)
        task.forward(of_q(q), of_kv(k), of_kv(v), of_q(static_cast<E*>(c.out)), buffers);
      else
        task.backward(of_q(static_cast<const E*>(c.dout)), of_q(q), of_kv(k), of_kv(v), of_q(static_cast<E*>(c.dq)),
                      of_kv(static_cast<E*>(c.dk)), of_kv(static_cast<E*>(c.dv)), buffers);
    }
  });
}

void document_attention(const DocumentCall& c) {
  c.type == Type::float32 ? attend_documents<float>(c) : attend_documents<bf16>(c);
}

size_t document_scratch(const DocumentCall& c) {
  return c.type == Type::float32 ? DocumentBuffers<float>(c, nullptr).bytes : DocumentBuffers<bf16>(c, nullptr).bytes;
}

}  // namespace

#define MINIMIND_TEXT(x) #x
#define MINIMIND_NAME(x) MINIMIND_TEXT(x)
extern const Kernels table;
const Kernels table = {MINIMIND_NAME(MINIMIND_ISA), rope_append_kv, decode_attention, decode_step, step_scratch, largest,
                       masses, keep, document_attention, document_scratch};

}  // namespace minimind::cpu::MINIMIND_ISA
