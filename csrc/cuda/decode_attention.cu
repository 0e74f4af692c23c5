#include "decode_attention.cuh"

#include "torch_glue.cuh"

namespace minimind {
namespace {

Tensor decode_attention_op(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                           const Tensor& block_table, const Tensor& lengths, double scale,
                           const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                           const OptionalTensor& arrivals) {
  MINIMIND_CHECK(on_device(q), "q: not on a ", kDispatchKey, " device");
  const Caches caches(key_cache, value_cache, k_scale, v_scale, q);
  MINIMIND_CHECK(q.dim() == 3 && q.size(2) == caches.head_dim && q.size(1) > 0 && q.size(1) % caches.groups == 0,
                 "q: not of size [B, a multiple of ", caches.groups, ", ", caches.head_dim, "]");
  const int64_t batch = q.size(0), heads = q.size(1);
  MINIMIND_CHECK(q.is_contiguous(), "q: not contiguous");
  MINIMIND_CHECK(batch <= 65535 && heads <= 65535, "q: ", batch, " sequences of ", heads, " heads; at most 65535");
  MINIMIND_CHECK(block_table.dim() == 2 && block_table.size(1) > 0, "block_table: not of size [", batch, ", pages]");
  check_tensor("block_table", block_table, Dtype::int32, {batch, block_table.size(1)}, q);
  check_tensor("lengths", lengths, Dtype::int32, {batch}, q);

  DecodeAttention p = {};
  p.q = q.data(), p.key_cache = key_cache.data(), p.value_cache = value_cache.data();
  p.block_table = block_table.data<int32_t>(), p.lengths = lengths.data<int32_t>();
  p.k_scale = caches.k_scale, p.v_scale = caches.v_scale;
  p.page_stride = caches.page_stride;
  p.batch = static_cast<int>(batch), p.heads = static_cast<int>(heads), p.groups = caches.groups;
  p.head_dim = caches.head_dim, p.page_size = caches.page_size, p.max_pages = static_cast<int>(block_table.size(1));
  p.splits = attention::max_splits(static_cast<int64_t>(p.max_pages) * p.page_size);
  MINIMIND_CHECK(attention::max_units(p) < (int64_t{1} << 30), "q, block_table: too much for one call");
  p.dtype = p.out_dtype = wide_number_of("q", q), p.cache_dtype = caches.dtype, p.scale = static_cast<float>(scale);

  const auto all_aligned = [&](int64_t bytes) {
    return aligned(q, bytes) && aligned(key_cache, bytes) && aligned(value_cache, bytes) &&
           p.page_stride * bytes_of(p.cache_dtype) % bytes == 0;
  };
  MINIMIND_CHECK(all_aligned(2 * bytes_of(p.cache_dtype)) && aligned(q, 2 * bytes_of(p.dtype)),
                 "q, key_cache, value_cache: a row begins at an odd number");
  const Device device(q);
  const Tensor out = Tensor::empty({batch, heads, caches.head_dim}, q.dtype(), q);
  p.out = out.data();
  const Tensor scratch = Tensor::empty({decode_attention_scratch(p)}, Dtype::float32, q);
  p.partial = scratch.data<float>();
  const int64_t counters = decode_attention_arrivals(p);
  Tensor own;
  if (arrivals.has_value()) {
    MINIMIND_CHECK(arrivals->dtype() == Dtype::int32 && arrivals->same_device(q) && arrivals->is_contiguous() &&
                       arrivals->numel() >= counters,
                   "arrivals: not ", counters, " int32 on the device of q");
    p.arrivals = arrivals->data<uint32_t>();
  } else if (p.splits > 1) {
    own = Tensor::empty({counters}, Dtype::int32, q);
    p.arrivals = own.data<uint32_t>();
    fill_with_zeros(p.arrivals, static_cast<size_t>(counters) * sizeof(uint32_t), device.stream());
  }
  decode_attention(p, all_aligned(16), device.stream());
  return out;
}

const Library library(kDispatchKey, [](Library& m) { m.impl("decode_attention", boxed<decode_attention_op>); });

}  // namespace
}  // namespace minimind
