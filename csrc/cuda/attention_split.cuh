// How decode_attention divides its work, and how its parts are put together.
//
// A split is a run of tokens of one sequence; its size follows from that sequence's own length and nothing else, so a
// sequence gives the same bits whatever else is in the batch. With fewer than 16k tokens a split has 128, two tiles for
// each of a block's four warps; beyond that a sequence has at most 128 splits: 32k tokens and 2 KV heads make 256 of
// them, two for each of an H100's 132 multiprocessors. Writing and reading partial results of (D + 2) float32 for each
// query head moves 2 * 4 (D + 2) * 4 bytes (4 query heads) for each split's 128 * 2 * 2 D bytes of K and V: 6% of the
// traffic, 3% from 32k tokens on.
//
// A unit of work is one split for one tile of up to 8 query heads of a group. The grid is as large as the device holds
// at once, whatever the longest context may be: a block walks over the units that the lengths at hand make, so that a
// CUDA graph, whose grid is fixed, costs what they cost. The block that finishes the last split of a tile puts the
// splits together, always in their order: the same bits whichever block that is.
#pragma once

#include "rope.cuh"

namespace minimind {

struct DecodeAttention {
  const void* q;  // [B, H, D] of dtype; null: rotated by the kernel itself, from `fresh`
  const void *key_cache, *value_cache;
  const int32_t *block_table, *lengths;
  const float *k_scale, *v_scale;  // [G], or null
  void* out;                       // [B, H, D] of out_dtype
  float* partial;                  // [B, H, splits, D] sums, then [B, H, splits, 2] maximum and denominator
  uint32_t* arrivals;              // [B, tiles of heads]: splits that are done, all 0 before and after
  int64_t page_stride;             // in numbers, not bytes
  int batch, heads, groups, head_dim, page_size, max_pages, splits;
  Number dtype, cache_dtype, out_dtype;
  float scale;
  RopeAppend fresh;  // where q is null: the new tokens, float32, the last ones of their sequences; its q is not used
  bool overlap;      // Launch::overlap
};

namespace attention {

constexpr int kMaxSplits = 128;
constexpr int kMinSplitTokens = 128;
constexpr int kSplitStep = 64;
constexpr int kWarps = 4;
constexpr int kHeads = 8;     // query heads that one read of K and V serves
constexpr int kResident = 4;  // blocks of a multiprocessor: with two, enough bytes are under way (attention_tensor_core.cuh)
constexpr int kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__host__ __device__ __forceinline__ int split_tokens(int length) {
  const int even = ceil_div(ceil_div(length, kMaxSplits), kSplitStep) * kSplitStep;
  return even > kMinSplitTokens ? even : kMinSplitTokens;
}

// The most splits of a sequence of at most `tokens`.
__host__ __device__ __forceinline__ int max_splits(int64_t tokens) {
  const int64_t smallest = (tokens + kMinSplitTokens - 1) / kMinSplitTokens;
  return static_cast<int>(smallest < kMaxSplits ? smallest : kMaxSplits);
}

// The number of splits of a sequence; a sequence of length 0 has one, which writes zeros.
__device__ __forceinline__ int splits_of(int length) { return max(ceil_div(length, split_tokens(length)), 1); }

__host__ __device__ __forceinline__ int tiles_of_group(const DecodeAttention& p) {
  return ceil_div(p.heads / p.groups, kHeads);
}

// A unit of work: the tokens [begin, end) of a sequence for query heads [first_head, first_head + heads).
struct Work {
  int sequence, tile, group, first_head, heads, length, split, splits, begin, end;

  // Whether it holds the sequence's last token, which is written by the kernel itself where p.q is null.
  __device__ __forceinline__ bool is_last() const { return end == length; }
};

__device__ __forceinline__ int sequence_length(const DecodeAttention& p, int sequence) {
  const int64_t room = static_cast<int64_t>(p.max_pages) * p.page_size;
  return static_cast<int>(min(static_cast<int64_t>(max(p.lengths[sequence], 0)), room));
}

// Takes a block over its units: those of all sequences in order, every gridDim.x-th of them. Each warp does it for
// itself, 32 sequences at a time, a lane for each; between two units it holds three numbers only.
class Walk {
 public:
  // The block's next unit; false when there is none.
  __device__ __forceinline__ bool next(const DecodeAttention& p, Work& w) {
    const int of_group = p.heads / p.groups, tiles_of_one = tiles_of_group(p), tiles = p.groups * tiles_of_one;
    const int lane = threadIdx.x % kWarp, wanted = unit_ / tiles;  // among the splits of all sequences
    int length, splits, up_to;
    while (true) {
      const int sequence = first_ + lane;
      length = sequence < p.batch ? sequence_length(p, sequence) : 0;
      splits = sequence < p.batch ? splits_of(length) : 0;
      up_to = before_ + warp_inclusive_sum(splits, lane);
      const int all = __shfl_sync(kAll, up_to, kWarp - 1);
      if (wanted < all) break;
      if (first_ + kWarp >= p.batch) return false;
      first_ += kWarp, before_ = all;
    }
    const int owner = __ffs(__ballot_sync(kAll, up_to > wanted)) - 1;
    w.sequence = first_ + owner;
    w.length = __shfl_sync(kAll, length, owner);
    w.splits = __shfl_sync(kAll, splits, owner);
    w.split = wanted - (__shfl_sync(kAll, up_to, owner) - w.splits);
    w.tile = unit_ % tiles;
    w.group = w.tile / tiles_of_one;
    const int tile = w.tile % tiles_of_one, tokens = split_tokens(w.length);
    w.first_head = w.group * of_group + tile * kHeads;
    w.heads = min(of_group - tile * kHeads, kHeads);
    w.begin = w.split * tokens;
    w.end = min(w.begin + tokens, w.length);
    unit_ += gridDim.x;
    return true;
  }

 private:
  int unit_ = blockIdx.x, first_ = 0, before_ = 0;  // before_: splits of the sequences before first_
};

// The most units of work, for the longest lengths; below 2^30.
inline int64_t max_units(const DecodeAttention& p) {
  return static_cast<int64_t>(p.batch) * p.splits * p.groups * tiles_of_group(p);
}

// Blocks of a launch. resident: how many the device holds at once.
inline unsigned blocks_of(const DecodeAttention& p, unsigned resident) {
  const int64_t most = max_units(p);
  return static_cast<unsigned>(most < resident ? most : resident);
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
  for (int i = threadIdx.x; i < w.heads * p.head_dim; i += blockDim.x) store(p.out, p.out_dtype, start + i, 0.0f);
}

// The new token's queries of a unit, normed and rotated, into `queries` [heads, D] of dtype Q, shared; by the unit that
// holds the last token also its key and value into the caches. The block synchronises afterwards.
template <class Q>
__device__ __forceinline__ void prepare(const DecodeAttention& p, const Work& w, Q* queries) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int others = w.is_last() ? 2 : 0;
  for (int i = warp; i < w.heads + others; i += kWarps) {
    const int head = i < w.heads ? w.first_head + i : p.heads + (i - w.heads) * p.groups + w.group;
    rope::Head<1> x;
    const bool wanted = rope::load_head<float>(x, p.fresh, w.sequence, head, lane);
    if (i < w.heads)
      rope::store_head(queries, kNumber<Q>, static_cast<int64_t>(i) * p.head_dim, 1.0f, x, p.head_dim, lane);
    else if (wanted)
      rope::append_head(x, p.fresh, w.sequence, head, lane);
  }
}

}  // namespace attention
}  // namespace minimind
