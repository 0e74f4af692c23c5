// One instruction set's kernels, as main.cpp calls them.
#pragma once

#include <vector>

#include "../../../csrc/cpu/args.h"

namespace parity {

using namespace minimind::cpu;

enum Weights { kFloat, kBf16, kInt8 };

struct Form {
  const Kernels* table;
  bool pairs;  // instructions that multiply pairs of bfloat16, with roundings of their own
  // out [B, N] = x [B, K] . w [N, K], packed; x is rounded as the step rounds it. k_size: K with its padding
  void (*multiply)(Weights, const void* w, int64_t k_size, int64_t n, const float* x, int64_t k, int64_t batch,
                   float* out);
  // x [K] -> integers [groups * kGroup], scales [groups]
  void (*quantize)(const float* x, int64_t k, int32_t* integers, float* scales);
};

std::vector<Form>& forms();

}  // namespace parity
