// The feed-forward of a layer: SwiGLU experts (Shazeer 2020, arXiv 2002.05202), routed and shared.
#pragma once

#include "matmul.h"
#include "team.h"

namespace minimind::cpu::MINIMIND_ISA {

// out[b] = silu(gate) * up for the blocks of inner rows in [begin, end); a block of w's gate rows is followed by the same of
// its up rows. Whole blocks are written: rows of padding give zeros. work: kBlock * batch floats.
template <class T>
inline void gate_up(const T* w, int64_t k_size, int64_t begin, int64_t end, Rows<const Activation<T>> x, int64_t batch,
                    Rows<Waiting<T>> out, float* work) {
  const int64_t size = block_size<T>(k_size);
  Tiles amx;
  for (int64_t i = begin; i < end; ++i) {
    const auto finish = [&](int64_t b, int v, Floats gate, Floats up) {
      store(out[b] + i * kBlock + v * kWidth, as_factor<T>(gate / (1.0f + exponential(-gate)) * up));
    };
    if constexpr (kPairsFrom<T> != kMany)
      if (batch >= kPairsFrom<T>) {
        multiply_blocks<2>(w + 2 * i * size, k_size, x, batch, amx, [&](int64_t b, const Floats* sums, auto) {
          for (int v = 0; v < kVectors; ++v) finish(b, v, sums[v], sums[kVectors + v]);
        });
        continue;
      }
    multiply_blocks<1>(w + 2 * i * size, k_size, x, batch, amx, [&](int64_t b, const Floats* gates, auto) {
      for (int v = 0; v < kVectors; ++v) store(work + b * kBlock + v * kWidth, gates[v]);
    });
    multiply_blocks<1>(w + (2 * i + 1) * size, k_size, x, batch, amx, [&](int64_t b, const Floats* ups, auto) {
      for (int v = 0; v < kVectors; ++v) finish(b, v, load(work + b * kBlock + v * kWidth), ups[v]);
    });
  }
}

// The top_k largest of softmax(logits [E]), the first of equals; gates [top_k] divided by their sum on request.
inline void choose_experts(float* logits, int experts, int top_k, bool normalize, float* gates, int32_t* chosen) {
  float maximum = logits[0], total = 0, sum_chosen = 0;
  for (int e = 1; e < experts; ++e) maximum = logits[e] > maximum ? logits[e] : maximum;
  for (int e = 0; e < experts; ++e) {
    logits[e] = exponential(broadcast(logits[e] - maximum))[0];
    total += logits[e];
  }
  for (int k = 0; k < top_k; ++k) {
    int best = 0;
    for (int e = 1; e < experts; ++e) best = logits[e] > logits[best] ? e : best;
    chosen[k] = best;
    gates[k] = logits[best] / total;
    sum_chosen += gates[k];
    logits[best] = -1;
  }
  if (normalize)
    for (int k = 0; k < top_k; ++k) gates[k] /= sum_chosen + 1e-20f;
}

// An expert and the rows it gets: token x_rows[i] is copy out_rows[i] of all (token, expert) pairs.
struct Expert {
  const void *gate_up, *down;
  int64_t inner, batch;
  const int32_t *x_rows, *out_rows;  // null: all in order
  int64_t first_copy;
};

// Sorts the copies [B, K] by expert: starts [E + 1], rows and copies [B K] in that order.
inline void sort_copies(const int32_t* chosen, int64_t copies, int experts, int top_k, int32_t* starts, int32_t* rows,
                        int32_t* sorted) {
  for (int e = 0; e <= experts; ++e) starts[e] = 0;
  for (int64_t c = 0; c < copies; ++c) ++starts[chosen[c] + 1];
  for (int e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  for (int64_t c = 0; c < copies; ++c) {
    const int32_t at = starts[chosen[c]]++;
    sorted[at] = static_cast<int32_t>(c);
    rows[at] = static_cast<int32_t>(c / top_k);
  }
  for (int e = experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}

}  // namespace minimind::cpu::MINIMIND_ISA
