// Attention of packed documents, forward and backward.
#include "reference.h"

namespace parity {

namespace {

// Attention of one document, with the magnitudes that rounding is relative to.
struct DocumentTruth {
  Doubles out, dq, dk, dv, out_size, dq_size, dk_size, dv_size;
  double score = 0;
};

DocumentTruth document_truth(const Doubles& q, const Doubles& k, const Doubles& v, const Doubles& dout,
                             const std::vector<Document>& documents, int64_t heads, int64_t groups, int64_t dim,
                             double scale) {
  DocumentTruth r;
  for (Doubles* x : {&r.out, &r.dq, &r.out_size, &r.dq_size}) x->resize(q.size());
  for (Doubles* x : {&r.dk, &r.dv, &r.dk_size, &r.dv_size}) x->resize(k.size());
  for (const Document& document : documents)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = document.start; i < document.start + document.length; ++i) {
        const size_t row = at((i * heads + head) * dim);
        const auto place = [&](int64_t t) {
          return at(((document.start + t) * groups + head / (heads / groups)) * dim);
        };
        const int64_t tokens = i - document.start + 1;
        const Attended a = attend(
            &q[row], dim, scale, tokens, [&](int64_t t) { return &k[place(t)]; },
            [&](int64_t t) { return &v[place(t)]; });
        r.score = std::fmax(r.score, a.score);
        Doubles p(at(tokens)), dp(at(tokens)), dp_size(at(tokens));
        double top = -INFINITY, total = 0, mean = 0, mean_size = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t d = 0; d < dim; ++d) {
            p[at(t)] += scale * q[row + at(d)] * k[place(t) + at(d)];
            const double term = dout[row + at(d)] * v[place(t) + at(d)];
            dp[at(t)] += term, dp_size[at(t)] += std::fabs(term);
          }
          top = std::fmax(top, p[at(t)]);
        }
        for (double& each : p) total += each = std::exp(each - top);
        for (size_t t = 0; t < p.size(); ++t) p[t] /= total, mean += p[t] * dp[t], mean_size += p[t] * dp_size[t];
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t d = 0; d < dim; ++d) {
            const double ds = scale * p[at(t)] * (dp[at(t)] - mean),
                         ds_size = scale * p[at(t)] * (dp_size[at(t)] + mean_size);
            const size_t to = place(t) + at(d), from = row + at(d);
            r.dq[from] += ds * k[to], r.dq_size[from] += ds_size * std::fabs(k[to]);
            r.dk[to] += ds * q[from], r.dk_size[to] += ds_size * std::fabs(q[from]);
            r.dv[to] += p[at(t)] * dout[from], r.dv_size[to] += p[at(t)] * std::fabs(dout[from]);
          }
        for (int64_t d = 0; d < dim; ++d)
          r.out[row + at(d)] = a.out[at(d)], r.out_size[row + at(d)] = a.magnitude[at(d)];
      }
  return r;
}

}  // namespace

void documents() {
  const std::vector<Document> packed = {{18, 67}, {2, 16}, {85, 3}, {1, 1}, {0, 1}};
  const int64_t tokens = 88;
  Random random(7);
  for (Type type : {Type::float32, Type::bfloat16})
    for (const auto& [heads, groups, dim] : {std::array<int64_t, 3>{2, 1, 64}, {2, 2, 80}, {3, 1, 16}}) {
      const int64_t q_count = tokens * heads * dim, k_count = tokens * groups * dim;
      const auto q = stored(type, q_count, random), k = stored(type, k_count, random),
                 v = stored(type, k_count, random), dout = stored(type, q_count, random);
      const float scale = 1 / std::sqrt(static_cast<float>(dim));
      const DocumentTruth truth = document_truth(numbers(type, q.data(), q_count), numbers(type, k.data(), k_count),
                                                 numbers(type, v.data(), k_count), numbers(type, dout.data(), q_count),
                                                 packed, heads, groups, dim, scale);
      for (const Form& form : usable()) {
        const auto bytes = [&](int64_t count) { return std::vector<char>(at(count) * size_of(type), 0x11); };
        auto out = bytes(q_count), dq = bytes(q_count), dk = bytes(k_count), dv = bytes(k_count);
        DocumentCall call{q.data(),  k.data(),  v.data(),  nullptr,       out.data(),
                          dq.data(), dk.data(), dv.data(), packed.data(), static_cast<int64_t>(packed.size()),
                          heads,     groups,    dim,       type,          2,
                          scale,     nullptr};
        const auto run = [&](const void* gradient) {
          call.dout = gradient;
          std::vector<char> scratch(2 * form.table->document_scratch(call) + 64, 0x7f);
          call.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
          form.table->document_attention(call);
        };
        run(nullptr), run(dout.data());
        const bool pairs = form.pairs && type == Type::bfloat16;
        // sums over D and over tokens; what that does to p; p and ds are rounded to bfloat16 for products of pairs
        const auto terms = static_cast<double>(2 * (dim + 4) * truth.score + static_cast<double>(2 * 67 + dim + 16));
        const double relative = terms * (pairs ? kEps : kEps / 2) + (pairs ? 2 * 0x1p-9 : 0);
        const auto compare = [&](const char* what, const std::vector<char>& got, const Doubles& wanted,
                                 const Doubles& size) {
          for (size_t i = 0; i < wanted.size(); ++i) {
            const double x = value_of(type, got.data(), static_cast<int64_t>(i));
            expect(std::fabs(x - wanted[i]) <= relative * size[i] + 1.001 * eps_of(type) / 2 * std::fabs(wanted[i]),
                   "%s: %s of documents, type %d, head_dim %ld: number %zu is %g, not %g", form.table->name, what,
                   int(type), long(dim), i, x, wanted[i]);
          }
        };
        compare("attention", out, truth.out, truth.out_size), compare("dq", dq, truth.dq, truth.dq_size);
        compare("dk", dk, truth.dk, truth.dk_size), compare("dv", dv, truth.dv, truth.dv_size);
      }
    }
}

}  // namespace parity
