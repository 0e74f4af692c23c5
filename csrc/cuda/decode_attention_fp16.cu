#include "attention_tensor_core.cuh"

namespace minimind::attention {

bool tensor_core_fp16(const DecodeAttention& p, void* stream) {
  return p.cache_dtype == Number::fp8 ? try_tensor_core<fp16, fp8>(p, stream)
                                     : try_tensor_core<fp16, fp16>(p, stream);
}

}  // namespace minimind::attention
