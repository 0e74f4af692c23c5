// csrc/cpu/matmul.h for one instruction set, to be called by test_amx.py.
#include "../../csrc/cpu/matmul.h"

using namespace minimind::cpu;
using namespace minimind::cpu::MINIMIND_ISA;

// out [B, N] = x [B, K] . w [N, K], packed; x, bits of bfloat16, has rows `stride` apart; index [B]: which, or null.
extern "C" void multiply_bf16(const void* w, int64_t k_size, int64_t n, const void* x, int64_t stride, const int32_t* index,
                              int64_t batch, float* out) {
  const Rows<const bf16> rows{static_cast<const bf16*>(x), stride, index};
  matmul(static_cast<const bf16*>(w), k_size, n, 0, blocks_of(n), rows, batch, Rows<float>{out, n});
}

// The same of 8 bits, of rows of x [rows, K] in float32; index [B]: which, or null.
extern "C" void multiply_int8(const void* w, int64_t k_size, int64_t n, const float* x, int64_t k, int64_t rows,
                              const int32_t* index, int64_t batch, float* out) {
  const int64_t groups = k_size / kGroup;
  auto* all = new ActivationGroup[static_cast<size_t>(rows * groups)];
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t g = 0; g < groups; ++g) quantize(x + b * k + g * kGroup, k - g * kGroup, all[b * groups + g]);
  matmul(static_cast<const q8*>(w), k_size, n, 0, blocks_of(n), Rows<const ActivationGroup>{all, groups, index}, batch,
         Rows<float>{out, n});
  delete[] all;
}
