// Runs every kernel once on small shapes, for a sanitizer to watch: build with -fsanitize=thread (a missing barrier is a
// race of two fibers) or -fsanitize=address,undefined. Buffers are exactly as long as the kernels may reach.
#include <cstdio>
#include <vector>

#include "decode_step.cuh"
#include "rope_append_kv.cuh"
#include "sample.cuh"

namespace minimind {
namespace {

uint32_t state = 1;
float noise() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
}

template <class T>
std::vector<T> noises(size_t n) {
  std::vector<T> x(n);
  for (auto& each : x) {
    if constexpr (std::is_same_v<T, q8>)
      each.bits = static_cast<int8_t>(127 * noise());
    else
      each = from_float<T>(noise());
  }
  return x;
}

template <class T, class KV>
void attend(int dim, int of_group, std::vector<int32_t> lengths, int pages_of_sequence = 20) {
  constexpr int kPage = 16, kGroups = 2, kPages = 20;
  const int heads = of_group * kGroups, batch = static_cast<int>(lengths.size());
  const auto q = noises<T>(static_cast<size_t>(batch) * heads * dim);
  const auto keys = noises<KV>(static_cast<size_t>(kPages) * kPage * kGroups * dim);
  const auto values = noises<KV>(keys.size());
  std::vector<int32_t> table(batch * pages_of_sequence);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i * 7 % kPages);
  const std::vector<float> scales(kGroups, 0.5f);
  std::vector<T> out(q.size());

  DecodeAttention p = {};
  p.q = q.data(), p.key_cache = keys.data(), p.value_cache = values.data();
  p.block_table = table.data(), p.lengths = lengths.data();
  if (sizeof(KV) == 1) p.k_scale = p.v_scale = scales.data();
  p.out = out.data(), p.page_stride = kPage * kGroups * dim;
  p.batch = batch, p.heads = heads, p.groups = kGroups, p.head_dim = dim;
  p.page_size = kPage, p.max_pages = pages_of_sequence;
  p.splits = attention::max_splits(int64_t{kPage} * pages_of_sequence);
  p.dtype = p.out_dtype = kNumber<T>, p.cache_dtype = kNumber<KV>, p.scale = 0.1f;
  std::vector<float> partial(decode_attention_scratch(p));
  std::vector<uint32_t> arrivals(decode_attention_arrivals(p));
  p.partial = partial.data(), p.arrivals = arrivals.data();
  decode_attention(p, true, nullptr);
  for (const auto& x : out)
    if (!std::isfinite(to_float(x))) std::printf("not finite\n"), std::exit(1);
}

template <class T, class KV>
void append(int dim) {
  constexpr int kTokens = 5, kHeads = 3, kGroups = 2, kPage = 4;
  const auto qkv = noises<T>(static_cast<size_t>(kTokens) * (kHeads + 2 * kGroups) * dim);
  const auto cos = noises<float>(10 * dim / 2), sin = noises<float>(10 * dim / 2);
  const auto weights = noises<float>(dim);
  const std::vector<int32_t> positions = {0, 9, 3, 100, -1};
  const std::vector<int64_t> slots = {0, 11, -1, 5, 6};
  const std::vector<float> scales(kGroups, 0.5f);
  std::vector<KV> keys(3 * kPage * kGroups * dim), values(keys.size());
  std::vector<T> q(static_cast<size_t>(kTokens) * kHeads * dim);

  RopeAppend p = {};
  p.qkv = qkv.data(), p.cos = cos.data(), p.sin = sin.data();
  p.positions = positions.data(), p.slots = slots.data();
  p.q_weight = p.k_weight = weights.data(), p.weight_dtype = Number::fp32;
  if (sizeof(KV) == 1) p.k_scale = p.v_scale = scales.data();
  p.q = q.data(), p.key_cache = keys.data(), p.value_cache = values.data();
  p.tokens = kTokens, p.qkv_stride = (kHeads + 2 * kGroups) * dim;
  p.page_stride = kPage * kGroups * dim, p.cache_rows = 3 * kPage;
  p.heads = kHeads, p.groups = kGroups, p.head_dim = dim, p.angles = 10, p.page_size = kPage;
  p.dtype = kNumber<T>, p.cache_dtype = kNumber<KV>, p.eps = 1e-6f, p.pairs = dim % 4 == 0;
  rope_append_kv(p, nullptr);
}

// W: of the matrices; q8 have scales, and rows of a multiple of 16 numbers.
template <class T, class KV, class W = T>
void step(int dim, std::vector<int32_t> lengths) {
  constexpr int kPage = 16, kGroups = 2, kHeads = 4, kWidth = 40, kInner = 72, kVocabulary = 19, kLayers = 2, kOwn = 9;
  constexpr bool kScaled = sizeof(W) == 1;
  const int batch = static_cast<int>(lengths.size()), pages = batch * kOwn;
  const int inside = kHeads * dim, projected = inside + 2 * kGroups * dim;
  const auto weights = [](size_t n, size_t k) { return noises<W>(n * (kScaled ? (k + 15) / 16 * 16 : k)); };
  const auto embedding = noises<T>(kVocabulary * kWidth);
  const auto head = weights(kVocabulary, kWidth), qkv = weights(projected, kWidth), o = weights(kWidth, inside);
  const auto gate_up = weights(2 * kInner, kWidth), down = weights(kWidth, kInner);
  const auto row_scales = [](size_t n) { return std::vector<float>(kScaled ? n : 0, 0.01f); };
  const auto head_scales = row_scales(kVocabulary), qkv_scales = row_scales(projected), scales_c = row_scales(kWidth);
  const auto gate_up_scales = row_scales(2 * kInner);
  const auto matrix = [](const std::vector<W>& w, const std::vector<float>& scale) {
    return Matrix{w.data(), kScaled ? scale.data() : nullptr};
  };
  const auto norm = noises<float>(kWidth), head_norm = noises<float>(dim);
  const auto cos = noises<float>(10 * dim / 2), sin = noises<float>(10 * dim / 2);
  const std::vector<float> scales(kLayers * kGroups, 0.5f);
  auto keys = noises<KV>(static_cast<size_t>(kLayers) * pages * kPage * kGroups * dim), values = keys;
  std::vector<int32_t> table(pages), positions(batch, 3);
  std::vector<int64_t> slots(batch, -1), tokens(batch, 7);
  for (int i = 0; i < pages; ++i) table[i] = pages - 1 - i;
  for (int b = 0; b < batch; ++b)
    if (lengths[b] > 0)
      slots[b] = table[b * kOwn + (lengths[b] - 1) / kPage] * kPage + (lengths[b] - 1) % kPage;
  std::vector<float> x(batch * kWidth), projections(batch * projected), attended(batch * inside), hidden(batch * kInner);
  std::vector<float> logits(batch * kVocabulary);
  const StepLayer layer = {norm.data(),         matrix(qkv, qkv_scales), head_norm.data(),
                           head_norm.data(),    matrix(o, scales_c),     norm.data(),
                           matrix(gate_up, gate_up_scales), matrix(down, scales_c)};
  const std::vector<StepLayer> layers(kLayers, layer);

  DecodeStep s = {};
  DecodeAttention& p = s.attention;
  p.key_cache = keys.data(), p.value_cache = values.data(), p.block_table = table.data(), p.lengths = lengths.data();
  if (sizeof(KV) == 1) p.k_scale = p.v_scale = scales.data();
  p.out = attended.data(), p.page_stride = kPage * kGroups * dim;
  p.batch = batch, p.heads = kHeads, p.groups = kGroups, p.head_dim = dim, p.page_size = kPage, p.max_pages = kOwn;
  p.splits = attention::max_splits(kPage * kOwn);
  p.dtype = kNumber<T>, p.cache_dtype = kNumber<KV>, p.out_dtype = Number::fp32, p.scale = 0.1f, p.overlap = true;
  RopeAppend& fresh = p.fresh;
  fresh.qkv = projections.data(), fresh.cos = cos.data(), fresh.sin = sin.data();
  fresh.positions = positions.data(), fresh.slots = slots.data(), fresh.k_scale = p.k_scale, fresh.v_scale = p.v_scale;
  fresh.key_cache = keys.data(), fresh.value_cache = values.data(), fresh.tokens = batch, fresh.qkv_stride = projected;
  fresh.page_stride = p.page_stride, fresh.cache_rows = int64_t{pages} * kPage, fresh.heads = kHeads;
  fresh.groups = kGroups, fresh.head_dim = dim, fresh.angles = 10, fresh.page_size = kPage, fresh.eps = 1e-6f;
  fresh.dtype = fresh.weight_dtype = Number::fp32, fresh.cache_dtype = p.cache_dtype;
  std::vector<float> partial(decode_attention_scratch(p));
  std::vector<uint32_t> arrivals(decode_attention_arrivals(p), 77);
  p.partial = partial.data(), p.arrivals = arrivals.data();
  s.tokens = tokens.data(), s.layers = layers.data(), s.embedding = embedding.data(), s.head = matrix(head, head_scales);
  s.final_norm = norm.data(), s.x = x.data(), s.qkv = projections.data(), s.attended = attended.data();
  s.hidden = hidden.data(), s.logits = logits.data(), s.vocabulary = kVocabulary;
  s.layer_stride = static_cast<int64_t>(pages) * kPage * kGroups * dim, s.num_layers = kLayers;
  s.width = kWidth, s.inner = kInner, s.norm_dtype = Number::fp32, s.aligned = true;
  decode_step(s, nullptr);
  for (const float logit : logits)
    if (!std::isfinite(logit)) std::printf("not finite\n"), std::exit(1);
}

void choose(int vocabulary) {
  const std::vector<float> temperature = {0, 0.7f, 1}, top_p = {1, 0.9f, 0.5f}, min_p = {0, 0, 0.1f};
  const std::vector<float> repetition(3, 1.2f), presence(3, 0.3f);
  const std::vector<int32_t> top_k = {0, 20, 0}, history(3 * static_cast<size_t>(vocabulary), 1);
  const std::vector<int64_t> seeds = {1, 2, 3}, offsets = {0, 1, 2};
  const auto logits = noises<float>(3 * static_cast<size_t>(vocabulary));
  std::vector<int64_t> tokens(3);
  std::vector<float> log_probs(3), scratch;

  Sample p = {};
  p.logits = logits.data(), p.temperature = temperature.data(), p.top_p = top_p.data(), p.min_p = min_p.data();
  p.repetition_penalty = repetition.data(), p.presence_penalty = presence.data();
  p.top_k = top_k.data(), p.history = history.data(), p.seeds = seeds.data(), p.offsets = offsets.data();
  p.tokens = tokens.data(), p.log_probs = log_probs.data();
  p.logits_stride = p.history_stride = vocabulary, p.batch = 3, p.vocabulary = vocabulary;
  if (!sampling::fits_shared(vocabulary)) {
    scratch.resize(3 * sampling::row_numbers(vocabulary));
    p.scratch = scratch.data();
  }
  sample(p, nullptr);
  for (const auto token : tokens)
    if (token < 0 || token >= vocabulary) std::printf("no token\n"), std::exit(1);
}

}  // namespace
}  // namespace minimind

int main() {
  using namespace minimind;
  attend<bf16, bf16>(64, 4, {1, 0, 65, 320});
  attend<bf16, bf16>(96, 2, {300});
  attend<fp16, fp8>(80, 9, {40, 150});
  attend<bf16, fp8>(128, 8, {129});
  attend<bf16, bf16>(32, 1, {24'600}, 1538);  // more tiles than buffers
  attend<float, float>(64, 4, {1, 0, 65, 320});
  attend<bf16, bf16>(6, 3, {40, 200});
  attend<float, bf16>(256, 2, {200});
  append<bf16, bf16>(96);
  append<float, fp8>(64);
  append<fp16, fp16>(6);
  step<bf16, bf16>(64, {140});
  step<bf16, fp8>(96, {1, 0, 129, 20});
  step<fp16, fp16>(80, {3, 144, 1, 17, 0});
  step<float, float>(64, {130, 2});
  step<bf16, bf16, q8>(64, {130, 2, 0});
  choose(33);
  choose(1000);
  choose(25'000);
  std::printf("done\n");
}
