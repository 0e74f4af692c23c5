// csrc/cpu's kernels for one instruction set, MINIMIND_ISA, and the products that the step is made of.
#include "form.h"

#include "../../../csrc/cpu/kernels.cpp"

namespace minimind::cpu::MINIMIND_ISA {
namespace {

template <class T>
void multiply_as(const void* w, int64_t k_size, int64_t n, const float* x, int64_t k, int64_t batch, float* out) {
  const int64_t row = row_size<T>(k_size);
  std::vector<Activation<T>> rows(static_cast<size_t>(batch * row));
  for (int64_t b = 0; b < batch; ++b) StepRunner<T>::to_activations(x + b * k, rows.data() + b * row, k);
  const Rows<const Activation<T>> activations{rows.data(), row};
  // in two shares, as two threads have them
  const int64_t blocks = blocks_of(n), middle = blocks / 2;
  for (const auto& [begin, end] : {Range{0, middle}, Range{middle, blocks}})
    matmul(static_cast<const T*>(w) + begin * block_size<T>(k_size), k_size, n - begin * kBlock, 0, end - begin,
           activations, batch, Rows<float>{out + begin * kBlock, n});
}

void multiply_any(parity::Weights weights, const void* w, int64_t k_size, int64_t n, const float* x, int64_t k,
                  int64_t batch, float* out) {
  if (weights == parity::kFloat) return multiply_as<float>(w, k_size, n, x, k, batch, out);
  if (weights == parity::kBf16) return multiply_as<bf16>(w, k_size, n, x, k, batch, out);
  multiply_as<q8>(w, k_size, n, x, k, batch, out);
}

void quantize_row(const float* x, int64_t k, int32_t* integers, float* scales) {
  for (int64_t g = 0; g * kGroup < k; ++g) {
    ActivationGroup group;
    quantize(x + g * kGroup, k - g * kGroup, group);
    for (int i = 0; i < kGroup; ++i) integers[g * kGroup + i] = static_cast<int32_t>(group.values[i]);
    scales[g] = group.scale;
  }
}

const bool registered = [] {
  parity::forms().push_back({&table, sizeof(Activation<bf16>) == sizeof(bf16), multiply_any, quantize_row});
  return true;
}();

}  // namespace
}  // namespace minimind::cpu::MINIMIND_ISA
