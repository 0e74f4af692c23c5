#include "decode_step.cuh"

#include "torch_glue.cuh"

namespace minimind {
namespace {

// The weights of the schema's list, taken in order and checked.
class WeightReader {
 public:
  explicit WeightReader(const TensorList& list) : list_(list) {
    MINIMIND_CHECK(!list.empty(), "weights: empty");
    matrix_ = list[0].dtype();
    scaled_ = list.size() > 2 && list[2].dtype() == Dtype::int8;  // the head
    wide_number_of("weights[0]", list[0]);
  }
  bool scaled() const { return scaled_; }

  const Tensor& next(const char* what) {
    MINIMIND_CHECK(at_ < list_.size(), "weights: ", list_.size(), " tensors, but ", what, " is still to come");
    return list_[at_++];
  }
  int64_t rows_of_next() const { return at_ < list_.size() && list_[at_].dim() == 2 ? list_[at_].size(0) : 0; }
  const void* embedding(int64_t n, int64_t k) { return rows("embedding", matrix_, n, k); }
  Matrix matrix(const char* what, int64_t n, int64_t k) {
    if (!scaled_) return {rows(what, matrix_, n, k), nullptr};
    constexpr int64_t kEach = matvec::kEach<q8>;
    const void* const integers = rows(what, Dtype::int8, n, (k + kEach - 1) / kEach * kEach);
    const Tensor& scales = next(what);
    check_tensor((std::string(what) + " scales").c_str(), scales, Dtype::float32, {n}, list_[0]);
    return {integers, scales.data<float>()};
  }
  const void* norm(const char* what, int64_t n) {
    const Tensor& tensor = next(what);
    if (norm_ == Dtype::other) norm_ = tensor.dtype();
    wide_number_of(what, tensor);
    check_tensor(what, tensor, norm_, {n}, list_[0]);
    return tensor.data();
  }
  void finish() const {
    MINIMIND_CHECK(at_ == list_.size(), "weights: ", list_.size(), " tensors, but the model has ", at_);
  }

 private:
  const void* rows(const char* what, Dtype dtype, int64_t n, int64_t k) {
    const Tensor& tensor = next(what);
    check_tensor(what, tensor, dtype, {n, k}, list_[0]);
    MINIMIND_CHECK(aligned(tensor, 16), what, ": does not begin at a multiple of 16 bytes");
    return tensor.data();
  }

  const TensorList& list_;
  size_t at_ = 0;
  bool scaled_ = false;
  Dtype matrix_, norm_ = Dtype::other;
};

struct Weights {
  int64_t vocabulary, width, inner = 0;
  const void *embedding, *final_norm;
  Matrix head;
  std::vector<StepLayer> layers;
  bool scaled;
  Number dtype, norm_dtype;

  Weights(const TensorList& list, const Caches& caches, int64_t heads, bool qk_norm) {
    WeightReader reader(list);
    const Tensor& first = list[0];
    MINIMIND_CHECK(first.dim() == 2 && first.size(0) > 0, "embedding: not of size [vocabulary, width]");
    vocabulary = first.size(0), width = first.size(1);
    const int64_t dim = caches.head_dim, inside = heads * dim;
    embedding = reader.embedding(vocabulary, width);
    final_norm = reader.norm("final norm", width);
    head = reader.matrix("head", vocabulary, width);
    for (int64_t i = 0; i < caches.layers; ++i) {
      StepLayer layer = {};
      layer.input_norm = reader.norm("input norm", width);
      layer.qkv = reader.matrix("qkv", inside + 2 * caches.groups * dim, width);
      if (qk_norm) layer.q_norm = reader.norm("q norm", dim), layer.k_norm = reader.norm("k norm", dim);
      layer.o = reader.matrix("o", width, inside);
      layer.post_norm = reader.norm("post-attention norm", width);
      if (i == 0) inner = reader.rows_of_next() / 2;
      layer.gate_up = reader.matrix("gate_up", 2 * inner, width);
      layer.down = reader.matrix("down", width, inner);
      layers.push_back(layer);
    }
    reader.finish();
    scaled = reader.scaled();
    dtype = number_of("weights", first);
    norm_dtype = number_of("final norm", list[1]);
  }
};

void check_sizes(const Weights& w, int64_t batch, int64_t inside) {
  MINIMIND_CHECK(batch <= matvec::kMaxRows, "tokens: ", batch, " of them; at most ", matvec::kMaxRows, " on a GPU");
  for (const auto& [what, k] : {std::pair("width", w.width), std::pair("heads times head size", inside),
                                std::pair("inner width", w.inner)}) {
    MINIMIND_CHECK(k > 0 && (w.scaled ? k % 4 == 0 : k * bytes_of(w.dtype) % 16 == 0), "weights: rows of ", k, " (", what,
                   ") do not begin at multiples of ", w.scaled ? "4 numbers" : "16 bytes");
    MINIMIND_CHECK(k < (int64_t{1} << 24) && multiply_fits(w.dtype, w.scaled, static_cast<int>(batch), static_cast<int>(k)),
                   "weights: ", batch, " rows of ", k, " (", what, ") do not fit shared memory");
  }
}

Tensor decode_step_op(const Tensor& tokens, const Tensor& positions, const Tensor& slots, const Tensor& block_table,
                      const Tensor& lengths, const Tensor& cos, const Tensor& sin, const TensorList& weights,
                      const Tensor& key_cache, const Tensor& value_cache, int64_t heads, bool qk_norm, int64_t experts,
                      int64_t, int64_t, bool, double eps, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  MINIMIND_CHECK(on_device(tokens), "tokens: not on a ", kDispatchKey, " device");
  MINIMIND_CHECK(experts == 0, "experts: ", experts, "; on a GPU this step is for dense models only");
  const Caches caches(key_cache, value_cache, k_scale, v_scale, tokens, true);
  MINIMIND_CHECK(tokens.dim() == 1, "tokens: not of size [B]");
  const int64_t batch = tokens.size(0), half = caches.head_dim / 2;
  MINIMIND_CHECK(heads > 0 && heads % caches.groups == 0 && heads <= 65535, "heads: ", heads, "; expected a multiple of ",
                 caches.groups);
  check_tensor("tokens", tokens, Dtype::int64, {batch}, tokens);
  check_tensor("positions", positions, Dtype::int32, {batch}, tokens);
  check_tensor("slots", slots, Dtype::int64, {batch}, tokens);
  check_tensor("lengths", lengths, Dtype::int32, {batch}, tokens);
  MINIMIND_CHECK(block_table.dim() == 2 && block_table.size(1) > 0, "block_table: not of size [", batch, ", pages]");
  check_tensor("block_table", block_table, Dtype::int32, {batch, block_table.size(1)}, tokens);
  MINIMIND_CHECK(cos.dim() == 2 && cos.size(0) > 0, "cos: empty, or not of size [positions, ", half, "]");
  check_tensor("cos", cos, Dtype::float32, {cos.size(0), half}, tokens);
  check_tensor("sin", sin, Dtype::float32, {cos.size(0), half}, tokens);
  const Weights w(weights, caches, heads, qk_norm);
  MINIMIND_CHECK(weights[0].same_device(tokens), "weights: on another device than the tokens");
  check_sizes(w, batch, heads * caches.head_dim);

  DecodeAttention p = {};
  p.key_cache = key_cache.data(), p.value_cache = value_cache.data();
  p.block_table = block_table.data<int32_t>(), p.lengths = lengths.data<int32_t>();
  p.k_scale = caches.k_scale, p.v_scale = caches.v_scale, p.page_stride = caches.page_stride;
  p.batch = static_cast<int>(batch), p.heads = static_cast<int>(heads), p.groups = caches.groups;
  p.head_dim = caches.head_dim, p.page_size = caches.page_size, p.max_pages = static_cast<int>(block_table.size(1));
  p.splits = attention::max_splits(static_cast<int64_t>(p.max_pages) * p.page_size);
  p.dtype = w.dtype, p.cache_dtype = caches.dtype, p.out_dtype = Number::fp32, p.overlap = true;
  p.scale = 1.0f / std::sqrt(static_cast<float>(caches.head_dim));
  RopeAppend& fresh = p.fresh;
  fresh.cos = cos.data<float>(), fresh.sin = sin.data<float>();
  fresh.positions = positions.data<int32_t>(), fresh.slots = slots.data<int64_t>();
  fresh.k_scale = caches.k_scale, fresh.v_scale = caches.v_scale;
  fresh.key_cache = key_cache.data(), fresh.value_cache = value_cache.data();
  fresh.tokens = batch, fresh.page_stride = caches.page_stride, fresh.cache_rows = caches.pages * caches.page_size;
  fresh.heads = p.heads, fresh.groups = p.groups, fresh.head_dim = p.head_dim, fresh.page_size = p.page_size;
  fresh.angles = static_cast<int>(cos.size(0)), fresh.eps = static_cast<float>(eps);
  fresh.dtype = Number::fp32, fresh.cache_dtype = caches.dtype, fresh.weight_dtype = w.norm_dtype;

  const Device device(tokens);
  const auto room = [&](int64_t n) { return Tensor::empty({batch, n}, Dtype::float32, tokens); };
  const int64_t inside = heads * caches.head_dim, projected = inside + 2 * int64_t{caches.groups} * caches.head_dim;
  const Tensor x = room(w.width), qkv = room(projected), attended = room(inside), hidden = room(w.inner);
  const Tensor logits = room(w.vocabulary);
  const Tensor partial = Tensor::empty({decode_attention_scratch(p)}, Dtype::float32, tokens);
  const Tensor arrivals = Tensor::empty({decode_attention_arrivals(p)}, Dtype::int32, tokens);
  p.partial = partial.data<float>(), p.arrivals = arrivals.data<uint32_t>(), p.out = attended.data();
  fresh.qkv = qkv.data(), fresh.qkv_stride = projected;

  DecodeStep step = {};
  step.tokens = tokens.data<int64_t>(), step.layers = w.layers.data();
  step.embedding = w.embedding, step.final_norm = w.final_norm, step.head = w.head;
  step.x = x.data<float>(), step.qkv = qkv.data<float>(), step.attended = attended.data<float>();
  step.hidden = hidden.data<float>(), step.logits = logits.data<float>();
  step.vocabulary = w.vocabulary, step.layer_stride = caches.layer_stride;
  step.num_layers = static_cast<int>(caches.layers), step.width = static_cast<int>(w.width);
  step.inner = static_cast<int>(w.inner), step.norm_dtype = w.norm_dtype, step.attention = p;
  const int64_t bytes = bytes_of(caches.dtype);
  const auto cache_aligned = [&](int64_t by) {
    return aligned(key_cache, by) && aligned(value_cache, by) && caches.page_stride * bytes % by == 0 &&
           caches.layer_stride * bytes % by == 0;
  };
  MINIMIND_CHECK(cache_aligned(2 * bytes), "key_cache, value_cache: a row begins at an odd number");
  step.aligned = cache_aligned(16);
  decode_step(step, device.stream());
  return logits;
}

const Library library(kDispatchKey, [](Library& m) { m.impl("decode_step", boxed<decode_step_op>); });

}  // namespace
}  // namespace minimind
