// One token for each row of logits: penalties, temperature, top-k, top-p, min-p, then the inverse of the cumulative
// distribution in the order of the tokens, at one Philox number. One launch, a block for each row, no synchronisation.
//
// A row is not sorted. weights[i] = exp(z[i] - max z), z after penalties and temperature, stays in shared memory (25.6
// KB for 6400 tokens) or, if it is too long, in scratch memory, which L2 holds. A truncation keeps the weights above a
// threshold, which is searched for by bisection over the bits of a float32, whose order is that of the numbers: three
// thresholds a pass, so two bits, and the search ends as soon as no weight, or one, lies between the bounds: for 6400
// tokens and top-p after 6 to 9 passes of about 0.6 us. Every sum has a fixed order: equal inputs give equal bits.
#pragma once

#include "philox.cuh"
#include "warp.cuh"

namespace minimind {

struct Sample {
  const float* logits;  // [B, V]
  const float *temperature, *top_p, *min_p, *repetition_penalty, *presence_penalty;
  const int32_t *top_k, *history;  // history [B, V]
  const int64_t *seeds, *offsets;
  int64_t* tokens;
  float* log_probs;
  float* scratch;  // [B, V + V / 32] where a row does not fit shared memory, else null
  int64_t logits_stride, history_stride;
  int batch, vocabulary;
};

namespace sampling {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr size_t kMaxShared = 96 * 1024;  // sm_86, sm_89 and sm_120 give a block 99 KB

// Weights of a row, and a number for every 32 of them.
__host__ __device__ __forceinline__ int64_t row_numbers(int vocabulary) {
  return static_cast<int64_t>(vocabulary) + (vocabulary + kWarp - 1) / kWarp;
}

// Results of the warps of a block; two sets in turn, so that one barrier a reduction is enough. At the start of the
// block's shared memory; a row that fits follows.
struct alignas(16) Exchange {
  unsigned long long best[kWarps];
  float mass[2][3][kWarps];
  int count[2][3][kWarps];
};
inline size_t shared_with_row(int vocabulary) { return sizeof(Exchange) + row_numbers(vocabulary) * sizeof(float); }
inline bool fits_shared(int vocabulary) { return shared_with_row(vocabulary) <= kMaxShared; }

// The penalised logit of a token divided by the temperature; presence is subtracted after the repetition penalty.
__device__ __forceinline__ float adjusted(const Sample& p, int row, int token, float temperature) {
  float x = p.logits[row * p.logits_stride + token];
  if (p.history[row * p.history_stride + token] > 0) {
    const float penalty = p.repetition_penalty[row];
    x = x > 0 ? x / penalty : x * penalty;
    x -= p.presence_penalty[row];
  }
  return x / temperature;
}

// Larger for a larger number, and of equal ones for the lower token; a NaN is the largest, as it is for torch.argmax.
__device__ __forceinline__ unsigned long long rank(float x, int token) {
  const uint32_t bits = float_to_bits(x + 0.0f);  // -0 becomes 0
  const uint32_t ordered = x != x ? kAll : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (kAll - static_cast<uint32_t>(token));
}

__device__ __forceinline__ int token_of(unsigned long long rank) {
  return static_cast<int>(kAll - static_cast<uint32_t>(rank));
}
__device__ __forceinline__ float number_of(unsigned long long rank) {
  const auto ordered = static_cast<uint32_t>(rank >> 32);
  return bits_to_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ unsigned long long block_max(unsigned long long x, Exchange& exchange) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAll, x, distance);
    x = x > other ? x : other;
  }
  if (lane == 0) exchange.best[warp] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = x > exchange.best[i] ? x : exchange.best[i];
  return x;
}

// The row of one block.
struct Row {
  float* weights;  // [V]
  float* groups;   // [V / 32]: sums of 32 neighbouring weights
  int vocabulary, num_groups;

  __device__ __forceinline__ float kept(int token, uint32_t threshold) const {
    return float_to_bits(weights[token]) >= threshold ? weights[token] : 0.0f;
  }
};

// What lies at or above a threshold.
struct Tail {
  float mass;
  int count;
};

// The tails summed over the block, the same in every thread.
template <int kTails>
__device__ __forceinline__ void block_sum(Tail (&tails)[kTails], Exchange& exchange, int& turn) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  turn ^= 1;
#pragma unroll
  for (int i = 0; i < kTails; ++i) {
    const float mass = warp_sum(tails[i].mass);
    const int count = __reduce_add_sync(kAll, tails[i].count);
    if (lane == 0) exchange.mass[turn][i][warp] = mass, exchange.count[turn][i][warp] = count;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTails; ++i) {
    tails[i].mass = warp_sum(lane < kWarps ? exchange.mass[turn][i][lane] : 0.0f);
    tails[i].count = __reduce_add_sync(kAll, lane < kWarps ? exchange.count[turn][i][lane] : 0);
  }
}

// Thresholds as the bits of a float32: `low` keeps enough, `high` does not.
struct Bounds {
  uint32_t low, high;
  Tail at_low, at_high;
};

struct AtLeastCount {
  int count;
  __device__ __forceinline__ bool enough(const Tail& tail) const { return tail.count >= count; }
  __device__ __forceinline__ bool exact(const Tail& tail) const { return tail.count == count; }
};

struct AtLeastMass {
  float mass;
  __device__ __forceinline__ bool enough(const Tail& tail) const { return tail.count > 0 && tail.mass >= mass; }
  __device__ __forceinline__ bool exact(const Tail&) const { return false; }
};

// Narrows the bounds until they are neighbours, at most one weight lies between them, or `low` keeps just enough.
template <class Wanted>
__device__ __forceinline__ void search(Bounds& bounds, const Row& row, Exchange& exchange, int& turn, Wanted wanted) {
  while (bounds.high - bounds.low > 1 && bounds.at_low.count - bounds.at_high.count > 1 &&
         !wanted.exact(bounds.at_low)) {
    const uint32_t step = (bounds.high - bounds.low + 3) / 4;
    uint32_t thresholds[3];
    Tail tails[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i) thresholds[i] = min(bounds.low + (i + 1) * step, bounds.high);
    for (int token = threadIdx.x; token < row.vocabulary; token += kThreads) {
      const float weight = row.weights[token];
#pragma unroll
      for (int i = 0; i < 3; ++i)
        if (float_to_bits(weight) >= thresholds[i]) tails[i].mass += weight, ++tails[i].count;
    }
    block_sum(tails, exchange, turn);
    const uint32_t high = bounds.high;
#pragma unroll
    for (int i = 2; i >= 0; --i) {  // tails shrink as thresholds grow: the first that is enough ends it
      if (thresholds[i] == high || thresholds[i] <= bounds.low) continue;
      if (wanted.enough(tails[i]))
        bounds.low = thresholds[i], bounds.at_low = tails[i];
      else
        bounds.high = thresholds[i], bounds.at_high = tails[i];
    }
  }
}

// For one warp: the first lane with a positive value whose running sum exceeds the goal, else the last lane with a
// positive value.
__device__ __forceinline__ int first_above(float mine, float running, float goal) {
  const unsigned positive = __ballot_sync(kAll, mine > 0), above = __ballot_sync(kAll, mine > 0 && running > goal);
  return above != 0 ? __ffs(above) - 1 : positive != 0 ? kWarp - 1 - __clz(positive) : 0;
}

// For one warp: the first of n numbers, none negative, whose running sum exceeds the share `uniform` of the whole, or
// the last positive one where rounding lets none; the sum of those before it, and the sum to exceed.
struct Place {
  int index;
  float before, goal;
};
__device__ __forceinline__ Place locate(const float* numbers, int n, float uniform) {
  const int lane = threadIdx.x % kWarp, each = (n + kWarp - 1) / kWarp;
  const int begin = min(lane * each, n), end = min(begin + each, n);
  float sum = 0;
  for (int i = begin; i < end; ++i) sum += numbers[i];
  const float inclusive = warp_inclusive_sum(sum, lane);
  const float goal = uniform * __shfl_sync(kAll, inclusive, kWarp - 1);
  const int owner = first_above(sum, inclusive, goal);
  float running = __shfl_up_sync(kAll, inclusive, 1);
  if (lane == 0) running = 0;
  Place place = {begin, running, goal};
  for (int i = begin; i < end; ++i) {
    if (numbers[i] > 0) {
      place.index = i, place.before = running;
      if (running + numbers[i] > goal) break;
    }
    running += numbers[i];
  }
  place.index = __shfl_sync(kAll, place.index, owner);
  place.before = __shfl_sync(kAll, place.before, owner);
  return place;
}

// For the first warp: the token at which the running sum of the kept weights exceeds the share `uniform` of it.
__device__ __forceinline__ int draw(const Row& row, uint32_t threshold, float uniform) {
  const int lane = threadIdx.x % kWarp;
  const Place place = locate(row.groups, row.num_groups, uniform);
  const int token = place.index * kWarp + lane;
  const float weight = token < row.vocabulary ? row.kept(token, threshold) : 0.0f;
  const float running = place.before + warp_inclusive_sum(weight, lane);
  return place.index * kWarp + first_above(weight, running, place.goal);
}

// The least weight that top-k, top-p and min-p leave, in this order; equal weights stay or go together.
__device__ __forceinline__ uint32_t truncate(const Sample& p, int index, const Row& row, const Tail& all,
                                             Exchange& exchange, int& turn) {
  constexpr uint32_t kAboveAll = 0x3f800001;  // the float32 after 1, the largest weight
  Bounds bounds = {0, kAboveAll, all, {0, 0}};
  const int top_k = p.top_k[index];
  if (top_k > 0 && top_k < row.vocabulary) search(bounds, row, exchange, turn, AtLeastCount{top_k});
  const float top_p = p.top_p[index];
  if (top_p < 1) {
    bounds.high = kAboveAll, bounds.at_high = {0, 0};
    search(bounds, row, exchange, turn, AtLeastMass{top_p * bounds.at_low.mass});
  }
  return max(bounds.low, float_to_bits(min(max(p.min_p[index], 0.0f), 1.0f)));
}

static __global__ void __launch_bounds__(kThreads, 1) sample_kernel(Sample p) {
  Exchange& exchange = *reinterpret_cast<Exchange*>(dynamic_shared());
  const int index = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Row row;
  row.weights = p.scratch == nullptr ? reinterpret_cast<float*>(&exchange + 1)
                                     : p.scratch + index * row_numbers(p.vocabulary);
  row.groups = row.weights + p.vocabulary;
  row.vocabulary = p.vocabulary;
  row.num_groups = (p.vocabulary + kWarp - 1) / kWarp;
  int turn = 0;
  const bool greedy = !(p.temperature[index] > 0);
  const float temperature = greedy ? 1.0f : p.temperature[index];

  unsigned long long best = 0;
  for (int token = threadIdx.x; token < row.vocabulary; token += kThreads) {
    const float x = adjusted(p, index, token, temperature);
    row.weights[token] = x;
    const unsigned long long mine = rank(x, token);
    best = best > mine ? best : mine;
  }
  best = block_max(best, exchange);
  const float maximum = number_of(best);
  int token = token_of(best);
  Tail all[1] = {};
  for (int i = threadIdx.x; i < row.vocabulary; i += kThreads) {
    const float weight = expf(row.weights[i] - maximum);
    row.weights[i] = weight;
    all[0].mass += weight, ++all[0].count;
  }
  block_sum(all, exchange, turn);

  float difference = 0;             // of the chosen logit from the largest
  if (!greedy && all[0].mass > 0) {  // false with a NaN or an infinity among the logits: then the log-probability is NaN
    const uint32_t threshold = truncate(p, index, row, all[0], exchange, turn);
    for (int group = warp; group < row.num_groups; group += kWarps) {
      const int i = group * kWarp + lane;
      const float sum = warp_sum(i < row.vocabulary ? row.kept(i, threshold) : 0.0f);
      if (lane == 0) row.groups[group] = sum;
    }
    __syncthreads();
    if (warp > 0) return;
    token = draw(row, threshold, philox_uniform(p.seeds[index], p.offsets[index]));
    difference = adjusted(p, index, token, temperature) - maximum;
  }
  if (threadIdx.x == 0) {
    p.tokens[index] = token;
    p.log_probs[index] = difference - logf(all[0].mass);
  }
}

}  // namespace sampling

inline void sample(const Sample& p, void* stream) {
  using namespace sampling;
  if (p.batch == 0) return;
  const size_t shared = p.scratch == nullptr ? shared_with_row(p.vocabulary) : sizeof(Exchange);
  launch(sample_kernel, {static_cast<unsigned>(p.batch), kThreads, shared, stream}, p);
}

}  // namespace minimind
