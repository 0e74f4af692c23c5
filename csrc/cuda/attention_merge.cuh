// The end of a unit of decode_attention: the block merges the results of its warps, and the last block of a sequence's
// tile of heads merges those of its splits.
#pragma once

#include "attention_split.cuh"

namespace minimind::attention {

// What the warps of a block leave in shared memory for each other.
struct WarpResults {
  float* maximum;      // [kWarps, kHeads], in units of log2
  float* denominator;  // [kWarps, kHeads]
  float* sums;         // [kWarps, kHeads, stride]
  int stride;          // D and 4 more: then the lanes that hold other heads write to other banks

  __device__ __forceinline__ WarpResults(unsigned char* shared, int head_dim) {
    maximum = reinterpret_cast<float*>(shared);
    denominator = maximum + kWarps * kHeads;
    sums = denominator + kWarps * kHeads;
    stride = head_dim + 4;
  }
  __host__ __device__ static constexpr size_t bytes(int head_dim) {
    return sizeof(float) * kWarps * kHeads * (2 + head_dim + 4);
  }
};

// Weights of the splits of a tile, in the same place once those are used.
struct SplitWeights {
  float* weight;  // [kHeads, kMaxSplits]
  float* total;   // [kHeads]

  __device__ __forceinline__ explicit SplitWeights(unsigned char* shared)
      : weight(reinterpret_cast<float*>(shared)), total(weight + kHeads * kMaxSplits) {}
  static constexpr size_t kBytes = sizeof(float) * kHeads * (kMaxSplits + 1);
};

// Shared memory of a kernel whose loop over keys needs `loop` bytes; behind it lie the queries that `prepare` makes, of
// `number` bytes a number.
__host__ __device__ constexpr size_t work_bytes(size_t loop, int head_dim) {
  const size_t results = WarpResults::bytes(head_dim);
  const size_t most = loop > results ? loop : results;
  return most > SplitWeights::kBytes ? most : SplitWeights::kBytes;
}
__host__ __device__ constexpr size_t query_bytes(int head_dim, size_t number) { return kHeads * head_dim * number; }

// Into the output, or the parts where the sequence has other splits. A warp without a token has maximum -inf and so
// weight 0; one warp at least has a token.
__device__ __forceinline__ void merge_warps(const DecodeAttention& p, const Work& w, const WarpResults& r) {
  const float value_scale = p.v_scale == nullptr ? 1.0f : p.v_scale[w.group];
  const int64_t first = static_cast<int64_t>(w.sequence) * p.heads + w.first_head;
  const int64_t parts = static_cast<int64_t>(p.batch) * p.heads * p.splits;
  for (int i = threadIdx.x; i < w.heads * p.head_dim; i += blockDim.x) {
    const int head = i / p.head_dim, d = i - head * p.head_dim;
    float maximum = r.maximum[head];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) maximum = fmaxf(maximum, r.maximum[warp * kHeads + head]);
    float denominator = 0, sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int row = warp * kHeads + head;
      const float weight = exp2f(r.maximum[row] - maximum);
      denominator += weight * r.denominator[row];
      sum += weight * r.sums[row * r.stride + d];
    }
    sum *= value_scale;
    if (w.splits == 1) {
      store(p.out, p.out_dtype, (first + head) * p.head_dim + d, sum / denominator);
      continue;
    }
    const int64_t part = (first + head) * p.splits + w.split;
    p.partial[part * p.head_dim + d] = sum;
    if (d == 0) {
      p.partial[parts * p.head_dim + 2 * part] = maximum;
      p.partial[parts * p.head_dim + 2 * part + 1] = denominator;
    }
  }
}

// Whether all other splits of the unit's tile are done; what their blocks wrote can then be read. For the whole block.
__device__ __forceinline__ bool is_last_split(const DecodeAttention& p, const Work& w) {
  if (w.splits == 1) return false;
  __threadfence();  // what this thread wrote is there before the arrival is
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    uint32_t* arrivals = p.arrivals + static_cast<int64_t>(w.sequence) * p.groups * tiles_of_group(p) + w.tile;
    const auto others = static_cast<uint32_t>(w.splits - 1);
    last = atomicInc(arrivals, others) == others;  // and it is 0 again
  }
  last = __syncthreads_or(last);
  if (last) __threadfence();
  return last;
}

// The sum over the splits in their order, whichever block does it: a warp weighs the splits of a head, then a thread
// adds up two neighbouring dimensions. Parts are read past L1, which may hold what was there before.
__device__ __forceinline__ void merge_splits(const DecodeAttention& p, const Work& w, unsigned char* shared) {
  const SplitWeights weights(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t parts = static_cast<int64_t>(p.batch) * p.heads * p.splits;
  const int64_t first = (static_cast<int64_t>(w.sequence) * p.heads + w.first_head) * p.splits;
  const auto* stats = reinterpret_cast<const Pair<float>*>(p.partial + parts * p.head_dim);
  for (int head = warp; head < w.heads; head += kWarps) {
    Pair<float> mine[kMaxSplits / kWarp];
    float maximum = -INFINITY, denominator = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const int split = i * kWarp + lane;
      mine[i] = split < w.splits ? load_past_l1(stats + first + head * p.splits + split) : Pair<float>{-INFINITY, 0};
      maximum = fmaxf(maximum, mine[i].first);
    }
    maximum = warp_max(maximum);
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const float weight = exp2f(mine[i].first - maximum);
      weights.weight[head * kMaxSplits + i * kWarp + lane] = weight;
      denominator += weight * mine[i].second;
    }
    denominator = warp_sum(denominator);
    if (lane == 0) weights.total[head] = denominator;
  }
  __syncthreads();

  const int pairs = p.head_dim / 2;
  for (int i = threadIdx.x; i < w.heads * pairs; i += blockDim.x) {
    const int head = i / pairs, pair = i - head * pairs;
    const auto* sums = reinterpret_cast<const Pair<float>*>(p.partial) + (first + head * p.splits) * pairs + pair;
    Pair<float> sum = {0, 0};
#pragma unroll 8
    for (int split = 0; split < w.splits; ++split) {
      const Pair<float> part = load_past_l1(sums + static_cast<int64_t>(split) * pairs);
      const float weight = weights.weight[head * kMaxSplits + split];
      sum.first += weight * part.first;
      sum.second += weight * part.second;
    }
    const int64_t start = (static_cast<int64_t>(w.sequence) * p.heads + w.first_head + head) * p.head_dim + 2 * pair;
    store(p.out, p.out_dtype, start, sum.first / weights.total[head]);
    store(p.out, p.out_dtype, start + 1, sum.second / weights.total[head]);
  }
}

// From the results of all warps to what the unit leaves behind; afterwards the shared memory is free.
__device__ __forceinline__ void finish(const DecodeAttention& p, const Work& w, const WarpResults& results,
                                       unsigned char* shared) {
  __syncthreads();
  merge_warps(p, w, results);
  if (is_last_split(p, w)) merge_splits(p, w, shared);
  __syncthreads();
}

}  // namespace minimind::attention
