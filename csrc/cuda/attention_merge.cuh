// The second kernel of decode_attention: the splits of each sequence put together.
#pragma once

#include "attention_split.cuh"

namespace minimind::attention {

constexpr int kMergeThreads = 256;

// One block for each query head: the sum over its sequence's splits, always in the same order. The threads form teams
// of D / 2, two neighbouring dimensions each; team i takes splits i, i + teams, ..., and then the teams are added up.
static __global__ void __launch_bounds__(kMergeThreads) merge_splits_kernel(DecodeAttention p) {
  const int head = blockIdx.x, sequence = blockIdx.y;
  const int length = sequence_length(p, sequence), splits = ceil_div(length, split_tokens(length));
  if (splits <= 1) return;  // written already
  __shared__ float weights[kMaxSplits];
  __shared__ float total;
  __shared__ Pair<float> team_sums[kMergeThreads];
  const int64_t parts = static_cast<int64_t>(p.batch) * p.heads * p.splits;
  const int64_t first = (static_cast<int64_t>(sequence) * p.heads + head) * p.splits;
  const int thread = threadIdx.x;

  if (thread < kWarp) {
    const auto* stats = reinterpret_cast<const Pair<float>*>(p.partial + parts * p.head_dim) + first;
    Pair<float> mine[kMaxSplits / kWarp];
    float maximum = -INFINITY, denominator = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const int split = i * kWarp + thread;
      mine[i] = split < splits ? stats[split] : Pair<float>{-INFINITY, 0};
      maximum = fmaxf(maximum, mine[i].first);
    }
    maximum = warp_max(maximum);
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const float weight = exp2f(mine[i].first - maximum);
      weights[i * kWarp + thread] = weight;
      denominator += weight * mine[i].second;
    }
    denominator = warp_sum(denominator);
    if (thread == 0) total = denominator;
  }
  __syncthreads();

  const int pairs = p.head_dim / 2, teams = kMergeThreads / pairs;
  const int team = thread / pairs, pair = thread - team * pairs;
  Pair<float> sum = {0, 0};
  if (team < teams) {
    const auto* sums = reinterpret_cast<const Pair<float>*>(p.partial) + first * pairs + pair;
#pragma unroll 8
    for (int split = team; split < splits; split += teams) {
      const Pair<float> part = sums[static_cast<int64_t>(split) * pairs];
      sum.first += weights[split] * part.first;
      sum.second += weights[split] * part.second;
    }
    team_sums[thread] = sum;
  }
  __syncthreads();
  if (team > 0) return;
  for (int other = 1; other < teams; ++other) {
    sum.first += team_sums[other * pairs + pair].first;
    sum.second += team_sums[other * pairs + pair].second;
  }
  const int64_t start = (static_cast<int64_t>(sequence) * p.heads + head) * p.head_dim + 2 * pair;
  store(p.out, p.dtype, start, sum.first / total);
  store(p.out, p.dtype, start + 1, sum.second / total);
}

}  // namespace minimind::attention
