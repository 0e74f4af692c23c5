// The whole decoding step of a small model, dense and with experts.
#include "reference.h"

namespace parity {

namespace {

// A small model: sizes that fill no block, group or vector.
struct SmallModel {
  static constexpr int kLayers = 2, kHeads = 3, kGroups = 1, kDim = 10, kPage = 8, kPages = 45;
  static constexpr int64_t kHidden = 40, kInner = 24, kVocab = 50, kInside = kHeads * kDim,
                           kQkv = kInside + 2 * kGroups * kDim;
  Weights type;
  int experts, chosen, shared;
  Floats final_norm, embedding;
  Packed head;
  struct FeedForward {
    Packed up, gate, down;
    std::vector<char> gate_up;  // their blocks take turns
  };
  struct LayerWeights {
    Floats input_norm, post_norm, q_norm, k_norm, router;
    Packed qkv, o;
    std::vector<FeedForward> mlps;  // the routed, then the shared
    std::vector<char> gate_ups, downs;
    std::vector<const void*> shared;
  };
  std::vector<LayerWeights> layers{kLayers};

  SmallModel(Weights type, int experts, int chosen, int shared, Random& random)
      : type(type), experts(experts), chosen(chosen), shared(shared) {
    const auto norm = [&](int64_t n) {
      Floats x = random.normals(n, 0.1f);
      for (float& each : x) each += 1;
      return x;
    };
    const auto matrix = [&](int64_t n, int64_t k) {
      return pack(type, random.normals(n * k, 1 / std::sqrt(static_cast<float>(k))), n, k);
    };
    embedding = random.normals(kVocab * kHidden);
    for (float& each : embedding) each = bf16_of(each);
    final_norm = norm(kHidden), head = matrix(kVocab, kHidden);
    for (LayerWeights& layer : layers) {
      layer.input_norm = norm(kHidden), layer.post_norm = norm(kHidden), layer.q_norm = norm(kDim),
      layer.k_norm = norm(kDim);
      layer.qkv = matrix(kQkv, kHidden), layer.o = matrix(kHidden, kInside);
      layer.router = random.normals(experts * kHidden, 0.3f);
      for (int e = 0; e < experts + shared; ++e) {
        FeedForward mlp{matrix(kInner, kHidden), matrix(kInner, kHidden), matrix(kHidden, kInner), {}};
        const size_t block = mlp.up.bytes.size() / at(blocks_of(kInner));
        for (size_t first = 0; first < mlp.up.bytes.size(); first += block)
          for (const Packed* half : {&mlp.gate, &mlp.up})
            mlp.gate_up.insert(mlp.gate_up.end(), half->bytes.begin() + static_cast<long>(first),
                               half->bytes.begin() + static_cast<long>(first + block));
        layer.mlps.push_back(mlp);
        if (e >= experts) continue;
        layer.gate_ups.insert(layer.gate_ups.end(), mlp.gate_up.begin(), mlp.gate_up.end());
        layer.downs.insert(layer.downs.end(), mlp.down.bytes.begin(), mlp.down.bytes.end());
      }
      for (size_t e = at(experts); e < layer.mlps.size(); ++e)
        layer.shared.push_back(layer.mlps[e].gate_up.data()), layer.shared.push_back(layer.mlps[e].down.bytes.data());
    }
  }
};

struct Batch {
  std::vector<int64_t> tokens, slots;
  std::vector<int32_t> positions, lengths, table;
  int64_t width;
};

Doubles times(const Doubles& w, const Doubles& x) {  // w [N, K]
  Doubles out(w.size() / x.size());
  for (size_t n = 0; n < out.size(); ++n)
    for (size_t k = 0; k < x.size(); ++k) out[n] += w[n * x.size() + k] * x[k];
  return out;
}
Doubles normed(const Doubles& x, const Floats& weight) {
  double squares = 0;
  for (double each : x) squares += each * each;
  Doubles out(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    out[i] = x[i] / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5) * weight[i];
  return out;
}
void add(Doubles& x, const Doubles& delta, double factor = 1) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += factor * delta[i];
}
Doubles fed_forward(const SmallModel::FeedForward& mlp, const Doubles& x) {
  Doubles gate = times(mlp.gate.values, x), up = times(mlp.up.values, x);
  for (size_t i = 0; i < up.size(); ++i) up[i] *= gate[i] / (1 + std::exp(-gate[i]));
  return times(mlp.down.values, up);
}
Doubles routed(const SmallModel& m, const SmallModel::LayerWeights& layer, const Doubles& x) {
  Doubles out(x.size()), p = times(Doubles(layer.router.begin(), layer.router.end()), x);
  double total = 0, taken = 0;
  for (double& each : p) total += each = std::exp(each);
  std::vector<std::pair<double, size_t>> order;
  for (size_t e = 0; e < p.size(); ++e) order.emplace_back(-p[e] / total, e);
  std::sort(order.begin(), order.end());
  for (int i = 0; i < m.chosen; ++i) taken -= order[at(i)].first;
  for (int i = 0; i < m.chosen; ++i)
    add(out, fed_forward(layer.mlps[order[at(i)].second], x), -order[at(i)].first / taken);
  return out;
}

// Logits of sequence b; caches [layers][rows, D] as they were before the step.
Doubles logits_of(const SmallModel& m, const Batch& batch, size_t b, const Angles& angles,
                  const std::vector<Doubles>& keys, const std::vector<Doubles>& values) {
  using M = SmallModel;
  const float* token = m.embedding.data() + batch.tokens[b] * M::kHidden;
  Doubles x(token, token + M::kHidden);
  const float *cos = angles.cos.data() + batch.positions[b] * angles.half,
              *sin = angles.sin.data() + batch.positions[b] * angles.half;
  for (size_t l = 0; l < m.layers.size(); ++l) {
    const auto& layer = m.layers[l];
    const Doubles qkv = times(layer.qkv.values, normed(x, layer.input_norm));
    const auto part = [&](int64_t head) {
      return Doubles(qkv.begin() + head * M::kDim, qkv.begin() + (head + 1) * M::kDim);
    };
    const Doubles key = turned(part(M::kHeads), layer.k_norm.data(), 1e-5, cos, sin), value = part(M::kHeads + 1);
    Doubles attended;
    const int32_t* pages = batch.table.data() + static_cast<int64_t>(b) * batch.width;
    const auto row = [&](const Doubles& now, const Doubles& before, int64_t t) {
      return t + 1 == batch.lengths[b] ? now.data()
                                       : before.data() + (pages[t / M::kPage] * M::kPage + t % M::kPage) * M::kDim;
    };
    for (int64_t head = 0; head < M::kHeads; ++head) {
      const Doubles q = turned(part(head), layer.q_norm.data(), 1e-5, cos, sin);
      const Doubles out =
          attend(
              q.data(), M::kDim, 1 / std::sqrt(10.0), batch.lengths[b], [&](int64_t t) { return row(key, keys[l], t); },
              [&](int64_t t) { return row(value, values[l], t); })
              .out;
      attended.insert(attended.end(), out.begin(), out.end());
    }
    add(x, times(layer.o.values, attended));
    const Doubles ready = normed(x, layer.post_norm);
    if (m.experts > 0) add(x, routed(m, layer, ready));
    for (size_t e = at(m.experts); e < layer.mlps.size(); ++e) add(x, fed_forward(layer.mlps[e], ready));
  }
  return times(m.head.values, normed(x, m.final_norm));
}

Floats run_step(const Form& form, const SmallModel& m, const Batch& batch, const Angles& angles, Floats keys,
                Floats values, int threads) {
  using M = SmallModel;
  std::vector<Layer> layers;
  for (const auto& l : m.layers)
    layers.push_back({l.input_norm.data(), l.post_norm.data(), l.q_norm.data(), l.k_norm.data(),
                      m.experts > 0 ? l.router.data() : nullptr, l.qkv.bytes.data(), l.o.bytes.data(),
                      l.gate_ups.data(), l.downs.data(), l.shared.data()});
  std::vector<uint16_t> narrow;
  for (float x : m.embedding) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4), narrow.push_back(static_cast<uint16_t>(bits >> 16));
  }
  const auto size = static_cast<int64_t>(batch.tokens.size());
  Floats logits(at(size * M::kVocab), NAN);
  Step s{};
  s.tokens = batch.tokens.data();
  s.rope = {angles.cos.data(),
            angles.sin.data(),
            angles.rows,
            batch.positions.data(),
            batch.slots.data(),
            nullptr,
            nullptr,
            Type::float32,
            1e-5f,
            M::kHeads};
  s.tables = {batch.table.data(), batch.lengths.data(), batch.width};
  s.cache = {keys.data(),          values.data(), nullptr,    nullptr, M::kPage * M::kGroups * M::kDim,
             M::kPages * M::kPage, M::kPage,      M::kGroups, M::kDim, Type::float32};
  s.layer_stride = M::kPages * M::kPage * M::kDim;
  s.type = m.type == kFloat ? Type::float32 : Type::bfloat16;
  s.embedding = m.type == kFloat ? static_cast<const void*>(m.embedding.data()) : narrow.data();
  s.head = m.head.bytes.data(), s.final_norm = m.final_norm.data(), s.layers = layers.data();
  s.quantized = m.type == kInt8;
  s.batch = size, s.vocab = M::kVocab, s.hidden = M::kHidden;
  s.expert_inner = s.shared_inner = m.type == kInt8 ? kBlock * blocks_of(M::kInner) : M::kInner;
  s.num_layers = M::kLayers, s.experts = m.experts, s.experts_per_token = m.chosen, s.shared_experts = m.shared,
  s.threads = threads;
  s.normalize_gates = true, s.eps = 1e-5f, s.attention_scale = 1 / std::sqrt(10.0f), s.logits = logits.data();
  std::vector<char> scratch(form.table->step_scratch(s) + 64, 0x7f);
  s.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  form.table->decode_step(s);
  return logits;
}

}  // namespace

void steps() {
  using M = SmallModel;
  Random random(6);
  Batch batch{{3, 49, 7, 0, 20}, {}, {}, {1, 4, 0, 9, 300}, {}, 38};
  int32_t page = 0;
  for (int32_t length : batch.lengths) {
    std::vector<int32_t> pages(38, -1);
    for (int32_t i = 0; i * M::kPage < length; ++i) pages[at(i)] = page++ * 7 % M::kPages;
    const int32_t last = length - 1;
    batch.slots.push_back(length == 0 ? -1 : pages[at(last / M::kPage)] * M::kPage + last % M::kPage);
    batch.positions.push_back(std::max(last, 0));
    batch.table.insert(batch.table.end(), pages.begin(), pages.end());
  }
  const Angles angles(310, M::kDim / 2);
  const int64_t rows = M::kPages * M::kPage * M::kDim;
  const Floats keys = random.normals(M::kLayers * rows), values = random.normals(M::kLayers * rows);
  std::vector<Doubles> all_keys, all_values;
  for (int l = 0; l < M::kLayers; ++l) {
    all_keys.emplace_back(keys.begin() + l * rows, keys.begin() + (l + 1) * rows);
    all_values.emplace_back(values.begin() + l * rows, values.begin() + (l + 1) * rows);
  }
  for (Weights type : {kFloat, kBf16, kInt8})
    for (bool dense : {true, false}) {
      const SmallModel m(type, dense ? 0 : 4, dense ? 0 : 2, 1, random);
      Doubles truth;
      for (size_t b = 0; b < batch.tokens.size(); ++b) {
        const Doubles row =
            batch.lengths[b] == 0 ? Doubles(M::kVocab) : logits_of(m, batch, b, angles, all_keys, all_values);
        truth.insert(truth.end(), row.begin(), row.end());
      }
      const auto off = [&](const Floats& logits) {
        return error(Doubles(logits.begin(), logits.end()), truth) / largest(truth);
      };
      const double plain = off(run_step(usable().back(), m, batch, angles, keys, values, 1));
      // eight products along a token's way, whose sums have at most kHidden terms, in float32 and with rounded factors
      const double rounding = type == kFloat ? kEps / 2 : type == kBf16 ? 0x1p-9 : 0.5 / 127;
      expect(plain <= (type == kFloat ? 8 * M::kHidden : 8 * std::sqrt(M::kHidden)) * rounding,
             "generic: a step, weights %d, dense %d, is off by %g", int(type), dense, plain);
      for (const Form& form : usable()) {
        const Floats logits = run_step(form, m, batch, angles, keys, values, 1);
        expect(off(logits) <= 2 * plain + 4 * rounding, "%s: a step, weights %d, dense %d, is off by %g, generic by %g",
               form.table->name, int(type), dense, off(logits), plain);
        expect(logits == run_step(form, m, batch, angles, keys, values, 3),
               "%s: a step, weights %d, dense %d, on three threads is not the same bits", form.table->name, int(type),
               dense);
        for (size_t b : {0, 3, 4}) {
          const auto row = static_cast<long>(b) * batch.width;
          const Batch one{{batch.tokens[b]},
                          {batch.slots[b]},
                          {batch.positions[b]},
                          {batch.lengths[b]},
                          {batch.table.begin() + row, batch.table.begin() + row + batch.width},
                          batch.width};
          const Floats alone = run_step(form, m, one, angles, keys, values, 1);
          expect(std::memcmp(alone.data(), &logits[b * M::kVocab], sizeof(float) * M::kVocab) == 0,
                 "%s: a step, weights %d, dense %d: sequence %zu is not the same bits alone", form.table->name,
                 int(type), dense, b);
        }
      }
    }
}

}  // namespace parity
