// How decode_attention divides its work, and how a block puts the results of its warps together.
//
// A split is a run of tokens of one sequence; its size follows from that sequence's own length and nothing else, so a
// sequence gives the same bits whatever else is in the batch, and a CUDA graph, whose grid is fixed, serves every
// length. With fewer than 16k tokens a split has 128, two tiles for each of a block's four warps; beyond that a
// sequence has at most 128 splits: 32k tokens and 2 KV heads make 256 blocks, two for each of an H100's 132
// multiprocessors. Writing and reading partial results of (D + 2) float32 for each query head moves 2 * 4 (D + 2) * 4
// bytes (4 query heads) for each split's 128 * 2 * 2 D bytes of K and V: 6% of the traffic, 3% from 32k tokens on.
#pragma once

#include "warp.cuh"

namespace minimind {

struct DecodeAttention {
  const void* q;  // [B, H, D]
  const void *key_cache, *value_cache;
  const int32_t *block_table, *lengths;
  const float *k_scale, *v_scale;  // [G], or null
  void* out;                       // [B, H, D]
  float* partial;                  // [B, H, splits, D] sums, then [B, H, splits, 2] maximum and denominator
  int64_t page_stride;             // in numbers, not bytes
  int batch, heads, groups, head_dim, page_size, max_pages, splits;
  Number dtype, cache_dtype;
  float scale;
};

namespace attention {

constexpr int kMaxSplits = 128;
constexpr int kMinSplitTokens = 128;
constexpr int kSplitStep = 64;
constexpr int kWarps = 4;
constexpr int kHeads = 8;  // query heads that one read of K and V serves
constexpr int kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__host__ __device__ __forceinline__ int split_tokens(int length) {
  const int even = ceil_div(ceil_div(length, kMaxSplits), kSplitStep) * kSplitStep;
  return even > kMinSplitTokens ? even : kMinSplitTokens;
}

// Of any sequence of at most `tokens`.
__host__ __device__ __forceinline__ int max_splits(int64_t tokens) {
  const int64_t smallest = (tokens + kMinSplitTokens - 1) / kMinSplitTokens;
  return static_cast<int>(smallest < kMaxSplits ? smallest : kMaxSplits);
}

// What one block does: the tokens [begin, end) of sequence b for query heads [first_head, first_head + heads).
struct Work {
  int sequence, split, group, first_head, heads, length, begin, end;
  bool alone;  // this split is the whole sequence
};

__device__ __forceinline__ int sequence_length(const DecodeAttention& p, int sequence) {
  const int64_t room = static_cast<int64_t>(p.max_pages) * p.page_size;
  return static_cast<int>(min(static_cast<int64_t>(max(p.lengths[sequence], 0)), room));
}

__device__ __forceinline__ Work work_of(const DecodeAttention& p) {
  Work w;
  const int of_group = p.heads / p.groups, tiles = ceil_div(of_group, kHeads);
  w.split = blockIdx.x;
  w.group = blockIdx.y / tiles;
  w.sequence = blockIdx.z;
  const int tile = blockIdx.y % tiles;
  w.first_head = w.group * of_group + tile * kHeads;
  w.heads = min(of_group - tile * kHeads, kHeads);
  w.length = sequence_length(p, w.sequence);
  const int tokens = split_tokens(w.length);
  w.begin = w.split * tokens;  // at most 128 * 2^31 / 128: no overflow, since split < splits <= length / tokens + 1
  w.end = min(w.begin + tokens, w.length);
  w.alone = w.length <= tokens;
  return w;
}

// Where the row of a token and group begins, in numbers from the start of the cache.
__device__ __forceinline__ int64_t row_offset(const DecodeAttention& p, const Work& w, int token) {
  const int page = token / p.page_size, inside = token - page * p.page_size;
  const int64_t physical = p.block_table[static_cast<int64_t>(w.sequence) * p.max_pages + page];
  return physical * p.page_stride + (static_cast<int64_t>(inside) * p.groups + w.group) * p.head_dim;
}

__device__ __forceinline__ void store(void* to, Number dtype, int64_t i, float x) {
  if (dtype == Number::bf16)
    static_cast<bf16*>(to)[i] = from_float<bf16>(x);
  else if (dtype == Number::fp16)
    static_cast<fp16*>(to)[i] = from_float<fp16>(x);
  else
    static_cast<float*>(to)[i] = x;
}

__device__ __forceinline__ void write_zeros(const DecodeAttention& p, const Work& w) {
  const int64_t start = (static_cast<int64_t>(w.sequence) * p.heads + w.first_head) * p.head_dim;
  for (int i = threadIdx.x; i < w.heads * p.head_dim; i += blockDim.x) store(p.out, p.dtype, start + i, 0.0f);
}

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

// The block's result from those of its warps, in the order of the warps; written as the output if the sequence has no
// other split. A warp without a token has maximum -inf and so weight 0; one warp at least has a token.
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
    if (w.alone) {
      store(p.out, p.dtype, (first + head) * p.head_dim + d, sum / denominator);
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

}  // namespace attention
}  // namespace minimind
