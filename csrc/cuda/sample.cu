#include "sample.cuh"

#include "torch_glue.cuh"

namespace minimind {
namespace {

std::tuple<Tensor, Tensor> sample_op(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                     const Tensor& top_p, const Tensor& min_p, const Tensor& repetition_penalty,
                                     const Tensor& presence_penalty, const Tensor& history, const Tensor& seeds,
                                     const Tensor& offsets) {
  MINIMIND_CHECK(on_device(logits), "logits: not on a ", kDispatchKey, " device");
  MINIMIND_CHECK(logits.dtype() == Dtype::float32, "logits: ", name(logits.dtype()), "; expected float32");
  MINIMIND_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1,
                 "logits: not of size [B, V] with neighbours in a row");
  const int64_t batch = logits.size(0), vocabulary = logits.size(1);
  MINIMIND_CHECK(vocabulary < (int64_t{1} << 30), "logits: ", vocabulary, " tokens; at most 2^30");
  MINIMIND_CHECK(history.dtype() == Dtype::int32 && history.dim() == 2 && history.size(0) == batch &&
                     history.size(1) == vocabulary && history.stride(1) == 1 && history.same_device(logits),
                 "history: not int32 [", batch, ", ", vocabulary, "] on the device of logits");
  check_tensor("temperature", temperature, Dtype::float32, {batch}, logits);
  check_tensor("top_k", top_k, Dtype::int32, {batch}, logits);
  check_tensor("top_p", top_p, Dtype::float32, {batch}, logits);
  check_tensor("min_p", min_p, Dtype::float32, {batch}, logits);
  check_tensor("repetition_penalty", repetition_penalty, Dtype::float32, {batch}, logits);
  check_tensor("presence_penalty", presence_penalty, Dtype::float32, {batch}, logits);
  check_tensor("seeds", seeds, Dtype::int64, {batch}, logits);
  check_tensor("offsets", offsets, Dtype::int64, {batch}, logits);

  Sample p = {};
  p.logits = logits.data<float>(), p.logits_stride = logits.stride(0);
  p.history = history.data<int32_t>(), p.history_stride = history.stride(0);
  p.temperature = temperature.data<float>(), p.top_k = top_k.data<int32_t>();
  p.top_p = top_p.data<float>(), p.min_p = min_p.data<float>();
  p.repetition_penalty = repetition_penalty.data<float>(), p.presence_penalty = presence_penalty.data<float>();
  p.seeds = seeds.data<int64_t>(), p.offsets = offsets.data<int64_t>();
  p.batch = static_cast<int>(batch), p.vocabulary = static_cast<int>(vocabulary);

  const Device device(logits);
  const Tensor tokens = Tensor::empty({batch}, Dtype::int64, logits);
  const Tensor log_probs = Tensor::empty({batch}, Dtype::float32, logits);
  p.tokens = tokens.data<int64_t>(), p.log_probs = log_probs.data<float>();
  Tensor scratch;
  if (!sampling::fits_shared(p.vocabulary)) {
    scratch = Tensor::empty({batch, sampling::row_numbers(p.vocabulary)}, Dtype::float32, logits);
    p.scratch = scratch.data<float>();
  }
  sample(p, device.stream());
  return {tokens, log_probs};
}

const Library library(kDispatchKey, [](Library& m) { m.impl("sample", boxed<sample_op>); });

}  // namespace
}  // namespace minimind
