// csrc/cpu/int8.h for one instruction set, to be called by test_int8_forms.py.
#include "../../csrc/cpu/matmul.h"

using namespace minimind::cpu;
using namespace minimind::cpu::MINIMIND_ISA;

// x [n] -> the integers [groups * kGroup] and scales [groups] of its activation row
extern "C" void quantize_row(const float* x, int64_t n, int32_t* integers, float* scales) {
  for (int64_t g = 0; g * kGroup < n; ++g) {
    ActivationGroup group;
    quantize(x + g * kGroup, n - g * kGroup, group);
    for (int i = 0; i < kGroup; ++i) integers[g * kGroup + i] = static_cast<int32_t>(group.values[i]);
    scales[g] = group.scale;
  }
}

// out [B, N] = x [B, K] . w [N, K], packed, of k_size columns with their padding
extern "C" void multiply(const void* w, int64_t k_size, int64_t n, const float* x, int64_t k, int64_t batch, float* out) {
  const int64_t groups = k_size / kGroup;
  auto* rows = new ActivationGroup[static_cast<size_t>(batch * groups)];
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < groups; ++g) quantize(x + b * k + g * kGroup, k - g * kGroup, rows[b * groups + g]);
  const Rows<const ActivationGroup> activations{rows, groups};
  matmul(static_cast<const q8*>(w), k_size, n, 0, blocks_of(n), activations, batch, Rows<float>{out, n});
  delete[] rows;
}
