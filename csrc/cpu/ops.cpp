// The operators on a CPU: arguments are checked, indices too, since a wrong one would read foreign memory; then the kernels
// of this processor run on at most as many threads as torch uses.
#include "../ops.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <tuple>

#include "amx.h"
#include "args.h"
#include "chosen.h"
#include "sample.h"
#include "thread_choice.h"
#include "threads.h"

namespace minimind::cpu {

namespace {

// Why kernels that were built for this processor do not run, or "".
const char* why_no_amx() {
#ifdef MINIMIND_AMX
  if (amx_state() == Amx::refused) return "no amx: the system does not let this process use it (arch_prctl)";
#endif
  return "";
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const Kernels* const* tables = all_kernels();
    const char* wanted = std::getenv("MINIMIND_CPU_KERNELS");
    if (wanted == nullptr || *wanted == 0) return **tables;
    std::string names;
    for (; *tables != nullptr; ++tables) {
      if (std::strcmp((*tables)->name, wanted) == 0) return **tables;
      names += std::string(" ") + (*tables)->name;
    }
    if (*why_no_amx() != 0) names += std::string("; ") + why_no_amx();
    fail("MINIMIND_CPU_KERNELS=", wanted, ": this processor and build have", names);
  }();
  return chosen;
}

char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    memory.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    size = bytes;
  }
  return memory.get();
}

namespace {

// Threads for a call that moves about so many numbers: starting the others costs what 20,000 of them do.
int threads_for(int64_t numbers) { return numbers < 20000 ? 1 : max_threads(); }

// f(0), ..., f(n - 1) on several threads.
template <class F>
void for_each(int64_t n, int threads, const F& f) {
  struct Call {
    int64_t n;
    const F& f;
  } call{n, f};
  run_parallel(threads, &call, [](void* data, int rank, int size) {
    const auto& c = *static_cast<Call*>(data);
    for (int64_t i = rank; i < c.n; i += size) c.f(i);
  });
}

Type type_of(const Tensor& t) { return static_cast<Type>(t.dtype()); }
bool is_float(const Tensor& t) { return t.dtype() <= Dtype::float16; }

template <class T>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data()) : nullptr;
}

void check(const char* what, const Tensor& t, Dtype dtype, const std::vector<int64_t>& sizes) {
  bool right = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; right && d < t.dim(); ++d) right = sizes[d] < 0 || sizes[d] == t.size(d);
  MINIMIND_CHECK(right, what, ": wrong shape");
  MINIMIND_CHECK(t.dtype() == dtype, what, " must be ", name(dtype), ", got ", name(t.dtype()));
  MINIMIND_CHECK(t.is_cpu() && t.is_contiguous(), what, " must be contiguous and on the CPU");
}

// keys, values [P, S, G, D], or one layer of [L, P, S, G, D] if `first` is 1.
Cache cache_of(const Tensor& keys, const Tensor& values, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
               int64_t first = 0) {
  MINIMIND_CHECK(keys.dim() == 4 + first && values.dim() == keys.dim(), "key_cache and value_cache: wrong shape");
  for (int64_t d = 0; d < keys.dim(); ++d)
    MINIMIND_CHECK(keys.size(d) == values.size(d) && (d > first || keys.stride(d) == values.stride(d)),
                   "key_cache and value_cache must have the same shape and strides");
  MINIMIND_CHECK(keys.dtype() == values.dtype() && keys.dtype() <= Dtype::float8_e4m3fn,
                 "key_cache: ", name(keys.dtype()), " is not supported");
  MINIMIND_CHECK(keys.is_cpu() && values.is_cpu(), "key_cache and value_cache must be on the CPU");
  MINIMIND_CHECK(keys.is_contiguous(first + 1) && values.is_contiguous(first + 1), "a page of key_cache must be dense");
  const int64_t groups = keys.size(-2), dim = keys.size(-1);
  MINIMIND_CHECK(dim > 0 && dim <= 256 && dim % 2 == 0, "head_dim must be even and at most 256, got ", dim);
  const bool scaled = keys.dtype() == Dtype::float8_e4m3fn;
  for (const auto* scale : {&k_scale, &v_scale}) {
    MINIMIND_CHECK(scale->has_value() == scaled, "k_scale and v_scale go with a float8 cache and with no other");
    if (scaled && first == 0) check("k_scale, v_scale", **scale, Dtype::float32, {groups});
    if (scaled && first == 1) check("k_scale, v_scale", **scale, Dtype::float32, {keys.size(0), groups});
  }
  return {keys.data(),
          values.data(),
          pointer<float>(k_scale),
          pointer<float>(v_scale),
          keys.stride(first),
          keys.size(first) * keys.size(first + 1),
          static_cast<int>(keys.size(first + 1)),
          static_cast<int>(groups),
          static_cast<int>(dim),
          type_of(keys)};
}

void check_heads(int64_t heads, const Cache& cache) {
  MINIMIND_CHECK(heads > 0 && heads % cache.groups == 0, "heads=", heads, " is no multiple of the cache's ", cache.groups);
}

Rope rope_of(const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots, const Cache& cache,
             int64_t tokens, int64_t heads, double eps) {
  check_heads(heads, cache);
  check("cos", cos, Dtype::float32, {-1, cache.head_dim / 2});
  check("sin", sin, Dtype::float32, {cos.size(0), cache.head_dim / 2});
  check("positions", positions, Dtype::int32, {tokens});
  check("slots", slots, Dtype::int64, {tokens});
  MINIMIND_CHECK(cos.size(0) > 0, "cos has no row");
  const auto* rows = slots.data<const int64_t>();
  for (int64_t n = 0; n < tokens; ++n)
    MINIMIND_CHECK(rows[n] < cache.rows, "slots[", n, "] = ", rows[n], " lies beyond the cache's ", cache.rows, " rows");
  return {cos.data<const float>(), sin.data<const float>(), cos.size(0), positions.data<const int32_t>(), rows,
          nullptr,                 nullptr,                 Type::float32, static_cast<float>(eps),
          static_cast<int>(heads)};
}

Tables tables_of(const Tensor& block_table, const Tensor& lengths, const Cache& cache, int64_t batch) {
  check("block_table", block_table, Dtype::int32, {batch, -1});
  check("lengths", lengths, Dtype::int32, {batch});
  const auto *table = block_table.data<const int32_t>(), *length = lengths.data<const int32_t>();
  const int64_t width = block_table.size(1), pages = cache.rows / cache.page_size;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t used = length[b] <= 0 ? 0 : (length[b] - 1) / cache.page_size + 1;
    MINIMIND_CHECK(used <= width, "lengths[", b, "] = ", length[b], " needs ", used, " pages; block_table has ", width);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = table[b * width + i];
      MINIMIND_CHECK(page >= 0 && page < pages, "block_table[", b, ", ", i, "] = ", page, " is none of ", pages, " pages");
    }
  }
  return {table, length, width};
}

Tensor rope_append_kv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                      const Tensor& slots, const Tensor& key_cache, const Tensor& value_cache, int64_t heads,
                      const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const Cache cache = cache_of(key_cache, value_cache, k_scale, v_scale);
  MINIMIND_CHECK(qkv.dim() == 2 && qkv.is_cpu() && is_float(qkv) && qkv.is_contiguous(1), "qkv: wrong shape or dtype");
  const int64_t tokens = qkv.size(0);
  Rope rope = rope_of(cos, sin, positions, slots, cache, tokens, heads, eps);
  MINIMIND_CHECK(qkv.size(1) == (heads + 2 * cache.groups) * cache.head_dim, "qkv has ", qkv.size(1), " columns");
  MINIMIND_CHECK(q_weight.has_value() == k_weight.has_value(), "q_weight and k_weight must be given together");
  if (q_weight) {
    MINIMIND_CHECK(is_float(*q_weight), "q_weight: ", name(q_weight->dtype()), " is not supported");
    check("q_weight", *q_weight, q_weight->dtype(), {cache.head_dim});
    check("k_weight", *k_weight, q_weight->dtype(), {cache.head_dim});
    rope.q_weight = q_weight->data();
    rope.k_weight = k_weight->data();
    rope.weight_type = type_of(*q_weight);
  }
  Tensor q = Tensor::empty({tokens, heads, cache.head_dim}, qkv.dtype(), qkv);
  kernels().rope_append_kv({rope, cache, qkv.data(), q.data(), type_of(qkv), tokens, qkv.stride(0), threads_for(qkv.numel())});
  return q;
}

Tensor decode_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                        const Tensor& lengths, double scale, const OptionalTensor& k_scale,
                        const OptionalTensor& v_scale, const OptionalTensor&) {
  const Cache cache = cache_of(key_cache, value_cache, k_scale, v_scale);
  MINIMIND_CHECK(q.dim() == 3 && q.is_cpu() && is_float(q) && q.is_contiguous(1), "q: wrong shape or dtype");
  const int64_t batch = q.size(0), heads = q.size(1);
  MINIMIND_CHECK(q.size(2) == cache.head_dim, "q has head_dim ", q.size(2), ", the cache ", cache.head_dim);
  check_heads(heads, cache);
  const Tables tables = tables_of(block_table, lengths, cache, batch);
  Tensor out = Tensor::empty({batch, heads, cache.head_dim}, q.dtype(), q);
  int64_t tokens = 0;
  for (int64_t b = 0; b < batch; ++b) tokens += std::max(tables.lengths[b], 0);
  const int64_t floats = q.numel() + attention_scratch(tables.lengths, batch, heads, cache.head_dim);
  kernels().decode_attention({cache, tables, q.data(), out.data(), type_of(q), batch, q.stride(0), static_cast<int>(heads),
                              threads_for(2 * tokens * cache.groups * cache.head_dim), static_cast<float>(scale),
                              reinterpret_cast<float*>(scratch(static_cast<size_t>(floats) * sizeof(float)))});
  return out;
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                  const Tensor& top_p, const Tensor& min_p, const Tensor& repetition_penalty,
                                  const Tensor& presence_penalty, const Tensor& history, const Tensor& seeds,
                                  const Tensor& offsets) {
  check("logits", logits, Dtype::float32, {-1, -1});
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  MINIMIND_CHECK(vocab > 0, "logits has no column");
  check("temperature", temperature, Dtype::float32, {batch});
  check("top_k", top_k, Dtype::int32, {batch});
  check("top_p", top_p, Dtype::float32, {batch});
  check("min_p", min_p, Dtype::float32, {batch});
  check("repetition_penalty", repetition_penalty, Dtype::float32, {batch});
  check("presence_penalty", presence_penalty, Dtype::float32, {batch});
  check("history", history, Dtype::int32, {batch, vocab});
  check("seeds", seeds, Dtype::int64, {batch});
  check("offsets", offsets, Dtype::int64, {batch});
  Tensor tokens = Tensor::empty({batch}, Dtype::int64, logits), log_probs = Tensor::empty({batch}, Dtype::float32, logits);
  const Kernels& table = kernels();
  const auto row = [&](int64_t b) {
    const Sampled sampled = sample_row({logits.data<const float>() + b * vocab,
                                        history.data<const int32_t>() + b * vocab,
                                        vocab,
                                        temperature.data<const float>()[b],
                                        top_p.data<const float>()[b],
                                        min_p.data<const float>()[b],
                                        repetition_penalty.data<const float>()[b],
                                        presence_penalty.data<const float>()[b],
                                        top_k.data<const int32_t>()[b],
                                        seeds.data<const int64_t>()[b],
                                        offsets.data<const int64_t>()[b]},
                                       table);
    tokens.data<int64_t>()[b] = sampled.token;
    log_probs.data<float>()[b] = sampled.log_prob;
  };
  for_each(batch, batch > 1 ? threads_for(logits.numel()) : 1, row);
  return {tokens, log_probs};
}

// The weights of the schema's list, taken in order and checked.
struct WeightReader {
  const TensorList& list;
  Dtype packed_dtype;  // int32: 8 bits, four in each; a row of scales comes last (int8.h)
  size_t at = 0;

  const Tensor& next(const char* what, Dtype dtype, const std::vector<int64_t>& sizes) {
    MINIMIND_CHECK(at < list.size(), "weights: ", list.size(), " tensors, but ", what, " is still to come");
    const std::string place = std::string("weights[") + std::to_string(at) + "], " + what;
    check(place.c_str(), list[at], dtype, sizes);
    return list[at++];
  }
  const float* norm(const char* what, int64_t n) { return next(what, Dtype::float32, {n}).data<const float>(); }
  bool quantized() const { return packed_dtype == Dtype::int32; }
  // Packed rows (cpu/matmul.h) of k numbers, or of any number if k is 0; shape: all that comes before them.
  const Tensor& packed(const char* what, std::vector<int64_t> shape, int64_t k) {
    const bool pairs = packed_dtype == Dtype::bfloat16;
    const int64_t size = quantized() ? packed_k8(k) / 4 + 1 : packed_k(k) / (pairs ? 2 : 1);
    shape.insert(shape.end(), {k == 0 ? -1 : size, kBlock});
    if (pairs) shape.push_back(2);
    return next(what, packed_dtype, shape);
  }
  struct FeedForward {
    const void *gate_up, *down;
    int64_t inner;  // with its padding
  };
  // gate_up [..., I / 16, 2, packed], down [..., C / 16, packed].
  FeedForward feed_forward(const std::vector<int64_t>& outer, int64_t hidden) {
    const auto dims = static_cast<int64_t>(outer.size());
    std::vector<int64_t> up = outer, lower = outer;
    up.insert(up.end(), {-1, 2}), lower.push_back(blocks_of(hidden));
    const Tensor &gate_up = packed("gate_up", up, hidden), &down = packed("down", lower, 0);
    const int64_t size = down.size(dims + 1), blocks = gate_up.size(dims);
    const int64_t inner = quantized() ? kBlock * blocks : size * (packed_dtype == Dtype::bfloat16 ? 2 : 1);
    const bool agree = quantized() ? size == packed_k8(inner) / 4 + 1 : inner % kPackedK == 0 && blocks == blocks_of(inner);
    MINIMIND_CHECK(agree, "gate_up and down: sizes disagree");
    return {gate_up.data(), down.data(), inner};
  }
};

// The choice for this model (its head's address) and batches of about this size; -1: for prompts, which are too long to
// try other numbers without a reason.
ThreadChoice& thread_choice(const void* model, int64_t batch, int most) {
  int size = batch < 0 ? -1 : 0;
  while (batch > 0 && (batch >>= 1)) ++size;
  thread_local std::map<std::tuple<const void*, int, int>, ThreadChoice> choices;
  if (choices.size() > 256) choices.clear();  // models come and go
  const int first = size < 0 ? ThreadChoice::kLongest : ThreadChoice::kFirst;
  return choices.try_emplace({model, size, most}, most, first).first->second;
}

// Millions of multiplications in a prompt's layers, about; a few tokens take as long as sixteen, since weights are read.
double work_of(const Step& s) {
  const double inner = static_cast<double>(s.expert_inner * s.experts_per_token + s.shared_inner * s.shared_experts);
  const double inside = static_cast<double>(s.rope.heads) * s.cache.head_dim;
  const double row = static_cast<double>(s.hidden) * (3 * inner + 4 * inside);
  double keys = 0;
  for (int64_t b = 0; b < s.batch; ++b) keys += s.tables.lengths[b];
  return 1e-6 * s.num_layers * (static_cast<double>(std::max<int64_t>(s.batch, 16)) * row + 2 * inside * keys);
}

// last: null, or the rows whose logits are wanted.
Tensor run_step(const Tensor& tokens, const Tensor* last, const Tensor& positions, const Tensor& slots,
                const Tensor& block_table, const Tensor& lengths, const Tensor& cos, const Tensor& sin,
                const TensorList& weights, const Tensor& key_cache, const Tensor& value_cache, int64_t heads, bool qk_norm,
                int64_t experts, int64_t experts_per_token, int64_t shared_experts, bool normalize_gates, double eps,
                const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check("tokens", tokens, Dtype::int64, {-1});
  MINIMIND_CHECK(weights.size() > 2, "weights: ", weights.size(), " tensors, but head is still to come");
  const Dtype matrix = weights[0].dtype();
  MINIMIND_CHECK(matrix == Dtype::float32 || matrix == Dtype::bfloat16, "weights: ", name(matrix), " is not supported");
  MINIMIND_CHECK(experts == 0 || (experts_per_token > 0 && experts_per_token <= experts), "experts_per_token=",
                 experts_per_token, " of ", experts, " experts");
  const int64_t batch = tokens.size(0), layers = key_cache.size(0), shared = experts == 0 ? 1 : shared_experts;
  const Cache cache = cache_of(key_cache, value_cache, k_scale, v_scale, 1);
  const Rope rope = rope_of(cos, sin, positions, slots, cache, batch, heads, eps);
  const Tables tables = tables_of(block_table, lengths, cache, batch);

  const bool quantized = weights[2].dtype() == Dtype::int32;
  WeightReader reader{weights, quantized ? Dtype::int32 : matrix};
  const Tensor& embedding = reader.next("embedding", matrix, {-1, -1});
  const int64_t vocab = embedding.size(0), hidden = embedding.size(1);
  const int64_t inside = heads * cache.head_dim, qkv = inside + 2 * cache.groups * int64_t{cache.head_dim};
  const float* final_norm = reader.norm("final norm", hidden);
  const void* head = reader.packed("head", {blocks_of(vocab)}, hidden).data();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t token = tokens.data<const int64_t>()[b];
    MINIMIND_CHECK(token >= 0 && token < vocab, "tokens[", b, "] = ", token, " is not in the vocabulary of ", vocab);
  }
  int64_t expert_inner = 0, shared_inner = 0;
  std::vector<Layer> table(static_cast<size_t>(layers));
  std::vector<const void*> shared_weights(static_cast<size_t>(2 * layers * shared));
  auto next_shared = shared_weights.begin();
  for (Layer& layer : table) {
    layer.input_norm = reader.norm("input norm", hidden);
    layer.qkv = reader.packed("qkv", {blocks_of(qkv)}, hidden).data();
    layer.q_norm = qk_norm ? reader.norm("q norm", cache.head_dim) : nullptr;
    layer.k_norm = qk_norm ? reader.norm("k norm", cache.head_dim) : nullptr;
    layer.o = reader.packed("o", {blocks_of(hidden)}, inside).data();
    layer.post_norm = reader.norm("post-attention norm", hidden);
    if (experts > 0) {
      layer.router = reader.next("router", Dtype::float32, {experts, hidden}).data<const float>();
      const auto routed = reader.feed_forward({experts}, hidden);
      layer.gate_up = routed.gate_up, layer.down = routed.down, expert_inner = routed.inner;
    }
    layer.shared = &*next_shared;
    for (int64_t e = 0; e < shared; ++e) {
      const auto dense = reader.feed_forward({}, hidden);
      MINIMIND_CHECK(shared_inner == 0 || shared_inner == dense.inner, "gate_up and down: sizes disagree between layers");
      *next_shared++ = dense.gate_up, *next_shared++ = dense.down;
      shared_inner = dense.inner;
    }
  }
  MINIMIND_CHECK(reader.at == weights.size(), "weights: ", weights.size(), " tensors, but the model has ", reader.at);

  if (last != nullptr) {
    check("last", *last, Dtype::int32, {-1});
    for (int64_t i = 0; i < last->size(0); ++i) {
      const int32_t row = last->data<const int32_t>()[i];
      MINIMIND_CHECK(row >= 0 && row < batch, "last[", i, "] = ", row, " is none of ", batch, " rows");
    }
  }
  Tensor logits = Tensor::empty({last == nullptr ? batch : last->size(0), vocab}, Dtype::float32, tokens);
  Step step{};
  static const int32_t kNone = 0;  // an empty tensor has no address
  if (last != nullptr) {
    step.num_last = last->size(0);
    step.last = step.num_last > 0 ? last->data<const int32_t>() : &kNone;
  }
  step.tokens = tokens.data<const int64_t>();
  step.rope = rope;
  step.tables = tables;
  step.cache = cache;
  step.layer_stride = key_cache.stride(0);
  step.embedding = embedding.data();
  step.head = head;
  step.final_norm = final_norm;
  step.layers = table.data();
  step.type = type_of(embedding);
  step.quantized = quantized;
  step.batch = batch, step.vocab = vocab, step.hidden = hidden;
  step.expert_inner = expert_inner, step.shared_inner = shared_inner;
  step.num_layers = static_cast<int>(layers), step.experts = static_cast<int>(experts);
  step.experts_per_token = experts == 0 ? 0 : static_cast<int>(experts_per_token);
  step.shared_experts = static_cast<int>(shared);
  step.threads = threads_for(vocab * hidden);
  step.normalize_gates = normalize_gates;
  step.eps = static_cast<float>(eps);
  step.attention_scale = 1.0f / std::sqrt(static_cast<float>(cache.head_dim));
  step.logits = logits.data<float>();
  if (batch == 0) return logits;
  ThreadChoice& choice = thread_choice(head, last == nullptr ? batch : -1, step.threads);
  step.threads = choice.threads();
  step.scratch = scratch(kernels().step_scratch(step));
  const auto start = std::chrono::steady_clock::now();
  kernels().decode_step(step);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  choice.took(last == nullptr ? seconds : seconds / work_of(step));
  return logits;
}

Tensor decode_step(const Tensor& tokens, const Tensor& positions, const Tensor& slots, const Tensor& block_table,
                   const Tensor& lengths, const Tensor& cos, const Tensor& sin, const TensorList& weights,
                   const Tensor& key_cache, const Tensor& value_cache, int64_t heads, bool qk_norm, int64_t experts,
                   int64_t experts_per_token, int64_t shared_experts, bool normalize_gates, double eps,
                   const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  return run_step(tokens, nullptr, positions, slots, block_table, lengths, cos, sin, weights, key_cache, value_cache, heads,
                  qk_norm, experts, experts_per_token, shared_experts, normalize_gates, eps, k_scale, v_scale);
}

Tensor prefill_step(const Tensor& tokens, const Tensor& last, const Tensor& positions, const Tensor& slots,
                    const Tensor& block_table, const Tensor& lengths, const Tensor& cos, const Tensor& sin,
                    const TensorList& weights, const Tensor& key_cache, const Tensor& value_cache, int64_t heads,
                    bool qk_norm, int64_t experts, int64_t experts_per_token, int64_t shared_experts, bool normalize_gates,
                    double eps, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  return run_step(tokens, &last, positions, slots, block_table, lengths, cos, sin, weights, key_cache, value_cache, heads,
                  qk_norm, experts, experts_per_token, shared_experts, normalize_gates, eps, k_scale, v_scale);
}

const Library cpu("CPU", [](Library& m) {
  m.impl("rope_append_kv", boxed<rope_append_kv>);
  m.impl("decode_attention", boxed<decode_attention>);
  m.impl("sample", boxed<sample>);
  m.impl("decode_step", boxed<decode_step>);
  m.impl("prefill_step", boxed<prefill_step>);
});

}  // namespace

// What was built, for minimind/ops/native.py: "compiler|kernels this processor runs, best first|the one in use|threads|
// why others do not run".
extern "C" __attribute__((visibility("default"))) const char* minimind_build_info() {
  thread_local std::string info;
  info = [] {
    std::string text = MINIMIND_COMPILER "|";
    for (const Kernels* const* table = all_kernels(); *table != nullptr; ++table) text += std::string((*table)->name) + " ";
    text += std::string("|") + kernels().name;
    return text + "|" + std::to_string(max_threads()) + "|" + why_no_amx();
  }();
  return info.c_str();
}

}  // namespace minimind::cpu
