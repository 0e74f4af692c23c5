// Sampling of one row; minimind/inference/decode/reference.py defines every option.
#pragma once

#include "args.h"

namespace minimind::cpu {

struct SampleRow {
  const float* logits;     // [V]
  const int32_t* history;  // [V]
  int64_t vocab;
  float temperature, top_p, min_p, repetition_penalty, presence_penalty;
  int32_t top_k;
  int64_t seed, offset;
};

struct Sampled {
  int64_t token;
  float log_prob;
};

Sampled sample_row(const SampleRow& row, const Kernels& kernels);

}  // namespace minimind::cpu
