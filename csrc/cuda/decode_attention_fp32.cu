#include "attention_cuda_core.cuh"

namespace minimind::attention {

void cuda_core(const DecodeAttention& p, void* stream) {
  switch (p.cache_dtype) {
    case Number::bf16: return launch_cuda_core<bf16>(p, stream);
    case Number::fp16: return launch_cuda_core<fp16>(p, stream);
    case Number::fp8: return launch_cuda_core<fp8>(p, stream);
    case Number::fp32: return launch_cuda_core<float>(p, stream);
  }
}

}  // namespace minimind::attention
