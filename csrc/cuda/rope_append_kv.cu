#include "rope_append_kv.cuh"

#include "torch_glue.cuh"

namespace minimind {
namespace {

Tensor rope_append_kv_op(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                         const Tensor& slots, const Tensor& key_cache, const Tensor& value_cache, int64_t heads,
                         const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  MINIMIND_CHECK(on_device(qkv), "qkv: not on a ", kDispatchKey, " device");
  const Caches caches(key_cache, value_cache, k_scale, v_scale, qkv);
  const int64_t size = caches.head_dim, half = size / 2;
  MINIMIND_CHECK(heads > 0, "heads: ", heads, "; expected at least 1");
  MINIMIND_CHECK(qkv.dim() == 2 && qkv.size(1) == (heads + 2 * caches.groups) * size, "qkv: not of size [N, (", heads,
                 " + 2 * ", caches.groups, ") * ", size, "]");
  MINIMIND_CHECK(qkv.stride(1) == 1, "qkv: numbers of a row are not neighbours");
  const int64_t tokens = qkv.size(0);
  MINIMIND_CHECK(cos.dim() == 2 && cos.size(0) > 0, "cos: empty, or not of size [positions, ", half, "]");
  check_tensor("cos", cos, Dtype::float32, {cos.size(0), half}, qkv);
  check_tensor("sin", sin, Dtype::float32, {cos.size(0), half}, qkv);
  check_tensor("positions", positions, Dtype::int32, {tokens}, qkv);
  check_tensor("slots", slots, Dtype::int64, {tokens}, qkv);
  MINIMIND_CHECK(q_weight.has_value() == k_weight.has_value(), "q_weight, k_weight: one without the other");

  RopeAppend p = {};
  p.qkv = qkv.data(), p.cos = cos.data<float>(), p.sin = sin.data<float>();
  p.positions = positions.data<int32_t>(), p.slots = slots.data<int64_t>();
  p.dtype = wide_number_of("qkv", qkv), p.cache_dtype = caches.dtype;
  if (q_weight.has_value()) {
    check_tensor("q_weight", *q_weight, q_weight->dtype(), {size}, qkv);
    check_tensor("k_weight", *k_weight, q_weight->dtype(), {size}, qkv);
    p.weight_dtype = wide_number_of("q_weight", *q_weight);
    p.q_weight = q_weight->data(), p.k_weight = k_weight->data();
  }
  p.k_scale = caches.k_scale, p.v_scale = caches.v_scale;
  p.key_cache = key_cache.data(), p.value_cache = value_cache.data();
  p.tokens = tokens, p.qkv_stride = qkv.stride(0);
  p.page_stride = caches.page_stride, p.cache_rows = caches.pages * caches.page_size;
  p.heads = static_cast<int>(heads), p.groups = caches.groups, p.head_dim = caches.head_dim;
  p.angles = static_cast<int>(cos.size(0)), p.page_size = caches.page_size, p.eps = static_cast<float>(eps);
  p.pairs = half % 2 == 0 && p.qkv_stride % 2 == 0 && p.page_stride % 2 == 0 && aligned(cos, 8) && aligned(sin, 8) &&
            aligned(qkv, 2 * bytes_of(p.dtype)) && aligned(key_cache, 2 * bytes_of(caches.dtype)) &&
            aligned(value_cache, 2 * bytes_of(caches.dtype));
  const Device device(qkv);
  const Tensor q = Tensor::empty({tokens, heads, size}, qkv.dtype(), qkv);
  p.q = q.data();
  rope_append_kv(p, device.stream());
  return q;
}

const Library library(kDispatchKey, [](Library& m) { m.impl("rope_append_kv", boxed<rope_append_kv_op>); });

}  // namespace
}  // namespace minimind
