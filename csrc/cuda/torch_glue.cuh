// Between torch's tensors and the kernels' plain structures.
#pragma once

#include <cmath>
#include <utility>

#include "../ops.h"
#include "numeric.cuh"

namespace minimind {

#ifdef MINIMIND_EMULATE
inline const char* const kDispatchKey = "CPU";

struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};
inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
#else
inline const char* const kDispatchKey = "CUDA";

// Makes the tensor's device the current one for a scope; stream: torch's current one of that device.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.device_index()) {
    MINIMIND_TORCH(aoti_torch_create_cuda_guard(index_, &guard_));
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { aoti_torch_delete_cuda_guard(guard_); }
  void* stream() const {
    void* stream = nullptr;
    MINIMIND_TORCH(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};
inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

inline Number number_of(const char* what, const Tensor& tensor) {
  switch (tensor.dtype()) {
    case Dtype::float32: return Number::fp32;
    case Dtype::bfloat16: return Number::bf16;
    case Dtype::float16: return Number::fp16;
    case Dtype::float8_e4m3fn: return Number::fp8;
    default: fail(what, ": ", name(tensor.dtype()), "; expected float32, bfloat16 or float16");
  }
}

inline Number wide_number_of(const char* what, const Tensor& tensor) {
  MINIMIND_CHECK(tensor.dtype() != Dtype::float8_e4m3fn, what, ": float8_e4m3fn is for caches only");
  return number_of(what, tensor);
}

// A contiguous tensor of this dtype and size, on the device of `like`.
inline void check_tensor(const char* what, const Tensor& tensor, Dtype dtype, std::initializer_list<int64_t> sizes,
                         const Tensor& like) {
  MINIMIND_CHECK(tensor.dtype() == dtype, what, ": ", name(tensor.dtype()), "; expected ", name(dtype));
  MINIMIND_CHECK(tensor.same_device(like), what, ": on another device than the first argument");
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == sizes.begin()[d];
  if (!same) {
    std::ostringstream expected;
    for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << size;
    fail(what, ": not of size [", expected.str(), "]");
  }
  MINIMIND_CHECK(tensor.is_contiguous(), what, ": not contiguous");
}

// A pair of caches [P, S, G, D], or of all layers [L, P, S, G, D], whose pages are contiguous, of one dtype and with the
// same strides.
struct Caches {
  int64_t pages, page_stride, layers = 1, layer_stride = 0;
  int page_size, groups, head_dim;
  Number dtype;
  const float *k_scale = nullptr, *v_scale = nullptr;  // [L, G]

  Caches(const Tensor& keys, const Tensor& values, const OptionalTensor& k_scale_tensor,
         const OptionalTensor& v_scale_tensor, const Tensor& like, bool whole = false) {
    const int64_t pages_at = whole ? 1 : 0, dims = 4 + pages_at;
    MINIMIND_CHECK(keys.dim() == dims && values.dim() == dims, "key_cache, value_cache: ", keys.dim(), " and ",
                   values.dim(), " dimensions; expected ", dims, ": [", whole ? "layers, " : "",
                   "pages, page size, groups, head size]");
    for (int64_t d = 0; d < dims; ++d)
      MINIMIND_CHECK(keys.size(d) == values.size(d), "value_cache: another size than key_cache");
    MINIMIND_CHECK(keys.dtype() == values.dtype(), "value_cache: ", name(values.dtype()), ", key_cache: ",
                   name(keys.dtype()));
    MINIMIND_CHECK(keys.same_device(like) && values.same_device(like),
                   "key_cache, value_cache: on another device than the first argument");
    MINIMIND_CHECK(keys.is_contiguous(pages_at + 1) && values.is_contiguous(pages_at + 1),
                   "key_cache, value_cache: a page is not contiguous");
    for (int64_t d = 0; d <= pages_at; ++d)
      MINIMIND_CHECK(keys.size(d) <= 1 || keys.stride(d) == values.stride(d),
                     "value_cache: another stride of pages than key_cache");
    if (whole) layers = keys.size(0), layer_stride = keys.stride(0);
    pages = keys.size(pages_at), page_stride = keys.stride(pages_at);
    page_size = static_cast<int>(keys.size(-3)), groups = static_cast<int>(keys.size(-2));
    head_dim = static_cast<int>(keys.size(-1));
    MINIMIND_CHECK(page_size > 0 && groups > 0, "key_cache: pages of ", page_size, " tokens and ", groups, " groups");
    MINIMIND_CHECK(head_dim > 0 && head_dim <= 256 && head_dim % 2 == 0, "key_cache: head size ", head_dim,
                   "; expected an even number up to 256");
    dtype = number_of("key_cache", keys);
    const bool scaled = dtype == Number::fp8;
    MINIMIND_CHECK(k_scale_tensor.has_value() == scaled && v_scale_tensor.has_value() == scaled,
                   "k_scale, v_scale: wanted for a cache of float8_e4m3fn, and only for one");
    if (!scaled) return;
    for (const auto& [what, scale] : {std::pair("k_scale", &*k_scale_tensor), std::pair("v_scale", &*v_scale_tensor)}) {
      if (whole)
        check_tensor(what, *scale, Dtype::float32, {layers, groups}, like);
      else
        check_tensor(what, *scale, Dtype::float32, {groups}, like);
    }
    k_scale = k_scale_tensor->data<float>(), v_scale = v_scale_tensor->data<float>();
  }
};

inline bool aligned(const Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data()) % bytes == 0;
}

}  // namespace minimind
