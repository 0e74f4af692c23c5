// decode_attention for 16-bit queries over a cache of the same type or of fp8, head dimensions 32, 64, 80, 96, 128.
//
// Every query head of a group shares one read of K and V. CUDA cores would need 8 multiply-adds for each number of the
// cache with 8 heads in a group: at an A100's 2 TB/s 8.2e12 of its 9.7e12 a second, nothing left for the rest. On
// tensor cores keys (or dimensions) take the 16 rows of an m16n8k16 product and heads its 8 columns, so nothing is
// padded with 8 heads and the product is at most a twentieth of the peak of any card here, even with half of the
// columns empty. The other way round, heads in the 16 rows, half of it or more would be padding.
//
//   S^T [16 keys, 8 heads] = K [16, D] Q^T        K by ldmatrix, Q^T held in registers
//   O^T [D, 8 heads]      += V^T [D, 16] P^T      V^T by transposing ldmatrix, P^T by transposing the registers of S^T
//
// P is split in two 16-bit numbers, high + low, and multiplied twice: tensor cores idle anyhow, and then P loses
// nothing that float32 would keep (2^-17 of bf16's 2^-9).
//
// The four warps of a block take tiles of 16 keys in turn, each with kStages buffers of its own that cp.async fills, so
// the loop has no barrier wider than a warp; softmax is online, and warps are merged once at the end. All buffers are
// filled at once at the start (which is all of a split of 128 tokens), and each again as soon as it has been used.
// Bytes in flight of a block: 4 warps * 1 to 2 stages * 2 * 16 * 2 D, at least 16 KB for D = 64, 32 KB for D = 128. An
// H100 needs 3.35 TB/s * 0.7 us / 132 = 18 KB for each multiprocessor, an A100 or a GeForce card 8 to 13 KB. Of blocks
// with 32 KB of shared memory (D = 64) an H100's multiprocessor holds 6, of those with 64 KB (D = 128) 3; an sm_86 or
// sm_89 card (100 KB) 3 and 1. Two stages rather than three, because more blocks hide each other's start and merge:
// with D = 96, 48 KB, an sm_86 card holds two, with three stages one.
// Instructions: about 150 for a tile and warp of 4 KB (D = 64); at 25 KB a microsecond of an H100's multiprocessor
// that is 0.9 of its 7 instructions a nanosecond.
#pragma once

#include "attention_merge.cuh"

namespace minimind::attention {

constexpr int kTile = 16;  // keys
constexpr int kStages = 2;

// A tile in shared memory: rows of kChunks 16-byte chunks, exchanged within a row so that the same chunk of 8
// neighbouring rows lies in 8 different groups of banks, as ldmatrix wants it.
template <class KV, int D>
struct Tile {
  static constexpr int kChunks = D * static_cast<int>(sizeof(KV)) / 16;
  static constexpr int kBytes = kTile * kChunks * 16;
  static constexpr int kSame = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;  // gcd(., 8)
  static_assert(kChunks * 16 == D * static_cast<int>(sizeof(KV)));

  __device__ static __forceinline__ int position(int row, int chunk) {  // in bytes
    return (row * kChunks + (chunk ^ (row / (8 / kSame) & (kSame - 1)))) * 16;
  }
};

template <class KV, int D>
constexpr size_t kWorkBytes = work_bytes(static_cast<size_t>(kWarps) * kStages * 2 * Tile<KV, D>::kBytes, D);

// Copies of one warp's tile of keys and values. offset: of lane r and r + 16, where row r of the tile begins in the
// caches, or -1: zeros, and nothing is read.
template <class KV, int D>
__device__ __forceinline__ void load_tile(const DecodeAttention& p, unsigned char* stage, int64_t offset, int lane) {
  using Layout = Tile<KV, D>;
  constexpr int kAll16 = kTile * Layout::kChunks;
#pragma unroll
  for (int first = 0; first < kAll16; first += kWarp) {
    const int i = first + lane, row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const int64_t begin = __shfl_sync(kAll, offset, row % kTile);
    if (i >= kAll16) continue;
    const bool wanted = begin >= 0;
    const int64_t bytes = wanted ? begin * static_cast<int64_t>(sizeof(KV)) + chunk * 16 : 0;
    unsigned char* to = stage + Layout::position(row, chunk);
    cp_async_16(to, static_cast<const unsigned char*>(p.key_cache) + bytes, wanted);
    cp_async_16(to + Layout::kBytes, static_cast<const unsigned char*>(p.value_cache) + bytes, wanted);
  }
}

// The fragment `a` of mma for 16 keys and dimensions 16 step ... 16 step + 15. Of fp8 a lane receives four neighbouring
// dimensions 4 t ... 4 t + 3 and calls them columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; load_query does the same.
template <class T, class KV, int D>
__device__ __forceinline__ void load_keys(uint32_t (&a)[4], const unsigned char* tile, int step, int lane,
                                          NanFinder& nan) {
  using Layout = Tile<KV, D>;
  if constexpr (sizeof(KV) == 2) {
    ldmatrix_x4(a, tile + Layout::position(lane % 16, 2 * step + lane / 16));
  } else {
    uint32_t raw[2];  // of keys g and g + 8
    ldmatrix_x2(raw, tile + Layout::position(lane % 16, step));
    nan.look(raw[0]), nan.look(raw[1]);
    a[0] = widen<T>(raw[0], 0, 1), a[1] = widen<T>(raw[1], 0, 1);
    a[2] = widen<T>(raw[0], 2, 3), a[3] = widen<T>(raw[1], 2, 3);
  }
}

// The fragment `a` for 16 dimensions and 16 keys. Of fp8 a lane receives dimensions 2 g, 2 g + 1 of four keys and calls
// them rows g, g + 8; dimension_of undoes it.
template <class T, class KV, int D>
__device__ __forceinline__ void load_values(uint32_t (&a)[4], const unsigned char* tile, int step, int lane,
                                            NanFinder& nan) {
  using Layout = Tile<KV, D>;
  if constexpr (sizeof(KV) == 2) {
    ldmatrix_x4_trans(a, tile + Layout::position(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else {
    uint32_t raw[2];  // of keys 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
    ldmatrix_x2_trans(raw, tile + Layout::position(lane % 16, step));
    nan.look(raw[0]), nan.look(raw[1]);
    a[0] = widen<T>(raw[0], 0, 2), a[1] = widen<T>(raw[0], 1, 3);
    a[2] = widen<T>(raw[1], 0, 2), a[3] = widen<T>(raw[1], 1, 3);
  }
}

// The dimension of row g (second: of row g + 8) of the product with the values.
template <class KV>
__device__ __forceinline__ int dimension_of(int step, int g, int second) {
  return sizeof(KV) == 2 ? 16 * step + g + 8 * second : 16 * step + 2 * g + second;
}

// Q^T as fragments `b`: lane 4 g + t holds head g; zeros beyond the unit's heads. queries: [heads, D].
template <class KV, int D>
__device__ __forceinline__ void load_query(uint32_t (&b)[D / 16][2], const void* queries, int heads, int lane) {
  const int g = lane / 4, t = lane % 4;
  const auto* pairs = static_cast<const uint32_t*>(queries) + g * (D / 2);
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = 8 * step + (sizeof(KV) == 2 ? t + 4 * half : 2 * t + half);
      b[step][half] = g < heads ? pairs[pair] : 0;
    }
}

// Online softmax of two heads, 2 t and 2 t + 1, and the rows of O^T that this lane holds.
template <int D>
struct State {
  float maximum[2] = {-INFINITY, -INFINITY};  // in units of log2; the same in the lanes of a head
  float denominator[2] = {0, 0};              // of this lane's keys
  float sums[D / 16][4] = {};
};

template <class T, class KV, int D>
__device__ __forceinline__ void attend(State<D>& state, const uint32_t (&query)[D / 16][2], const unsigned char* keys,
                                       int first_token, int end, float scale, int lane, NanFinder& nan) {
  float scores[4] = {};  // (key g, heads 2 t and 2 t + 1), (key g + 8, the same)
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    load_keys<T, KV, D>(a, keys, step, lane, nan);
    mma_m16n8k16<T>(scores, a, query[step][0], query[step][1]);
  }
  const int token = first_token + lane / 4;
  float rescale[2];
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = token + 8 * (i / 2) < end ? scores[i] * scale : -INFINITY;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float maximum = fmaxf(state.maximum[head], fmaxf(scores[head], scores[2 + head]));
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(kAll, maximum, distance));
    rescale[head] = exp2f(state.maximum[head] - maximum);
    state.maximum[head] = maximum;
    scores[head] = exp2f(scores[head] - maximum);
    scores[2 + head] = exp2f(scores[2 + head] - maximum);
    state.denominator[head] = state.denominator[head] * rescale[head] + (scores[head] + scores[2 + head]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float first = scores[2 * half], second = scores[2 * half + 1];
    const uint32_t pair = pack<T>(first, second);
    high[half] = movmatrix_trans(pair);
    low[half] = movmatrix_trans(pack<T>(first - unpack<T>(pair, 0), second - unpack<T>(pair, 1)));
  }
  const unsigned char* values = keys + Tile<KV, D>::kBytes;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    load_values<T, KV, D>(a, values, step, lane, nan);
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sums[step][i] *= rescale[i % 2];
    mma_m16n8k16<T>(state.sums[step], a, high[0], high[1]);
    mma_m16n8k16<T>(state.sums[step], a, low[0], low[1]);
  }
}

template <class KV, int D>
__device__ __forceinline__ void publish(const WarpResults& results, State<D>& state, bool nan, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float denominator = state.denominator[head];
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2)
      denominator += __shfl_xor_sync(kAll, denominator, distance);
    const int row = warp * kHeads + 2 * t + head;
    if (g == 0) {
      results.maximum[row] = state.maximum[head];
      results.denominator[row] = nan ? NAN : denominator;
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
#pragma unroll
      for (int second = 0; second < 2; ++second)
        results.sums[row * results.stride + dimension_of<KV>(step, g, second)] = state.sums[step][2 * second + head];
  }
}

template <class T, class KV, int D>
__device__ __forceinline__ void attend_unit(const DecodeAttention& p, const Work& w) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kStageBytes = 2 * Tile<KV, D>::kBytes;
  unsigned char* const shared = dynamic_shared();
  unsigned char* const ring = shared + warp * kStages * kStageBytes;

  // This warp's tiles begin at `first`, first + kStride, ...; a lane looks up the row of one key, a tile ahead of its
  // copy, so that the copies do not wait for the block table.
  constexpr int kStride = kWarps * kTile;
  const int first = w.begin + warp * kTile;
  const auto offset_at = [&](int tile) {
    const int token = first + tile * kStride + lane % kTile;
    return token < w.end ? row_offset(p, w, token) : int64_t{-1};
  };
  const int tiles = first < w.end ? ceil_div(w.end - first, kStride) : 0;
  int64_t offset = offset_at(0);
  const auto fill = [&](int from, int to) {
#pragma unroll
    for (int tile = 0; tile < kStages; ++tile) {
      if (tile < from || tile >= to) continue;
      if (tile < tiles) load_tile<KV, D>(p, ring + tile * kStageBytes, offset, lane);
      cp_async_commit();
      offset = offset_at(tile + 1);
    }
  };

  // Where the kernel makes the queries, all keys but the last token's are there before the kernels ahead are done.
  const bool makes_last = p.q == nullptr && w.is_last() && (w.end - 1 - w.begin) / kTile % kWarps == warp;
  const int early = makes_last ? min(tiles - 1, kStages) : p.q == nullptr ? kStages : 0;
  fill(0, early);
  wait_for_previous();
  const void* queries = shared + kWorkBytes<KV, D>;
  if (p.q == nullptr) {
    prepare(p, w, reinterpret_cast<T*>(shared + kWorkBytes<KV, D>));
    __syncthreads();
  } else {
    queries = static_cast<const T*>(p.q) + (static_cast<int64_t>(w.sequence) * p.heads + w.first_head) * D;
  }
  fill(early, kStages);

  uint32_t query[D / 16][2];
  load_query<KV, D>(query, queries, w.heads, lane);
  const float scale = p.scale * kLog2e * (p.k_scale == nullptr ? 1.0f : p.k_scale[w.group]);
  State<D> state;
  NanFinder nan;
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* const stage = ring + tile % kStages * kStageBytes;
    cp_async_wait<kStages - 1>();
    __syncwarp();  // the copies of all lanes are there
    attend<T, KV, D>(state, query, stage, first + tile * kStride, w.end, scale, lane, nan);
    __syncwarp();  // all lanes are done with it
    if (tile + kStages < tiles) load_tile<KV, D>(p, stage, offset, lane);
    cp_async_commit();
    offset = offset_at(tile + kStages + 1);
  }

  __syncthreads();  // the rings become room for the results
  const bool found_nan = __any_sync(kAll, nan.found());
  const WarpResults results(shared, D);
  publish<KV, D>(results, state, found_nan, warp, lane);
  finish(p, w, results, shared);
}

template <class T, class KV, int D>  // with D = 32 ptxas spills rather than take 128 registers, unless it is told to
__global__ void __launch_bounds__(kWarps* kWarp, D == 32 ? 4 : 1) tensor_core_kernel(DecodeAttention p) {
  let_next_start();
  Walk walk;
  for (Work w; walk.next(p, w);) {
    if (w.begin < w.end) {
      attend_unit<T, KV, D>(p, w);
    } else {
      wait_for_previous();
      write_zeros(p, w);
    }
  }
  wait_for_previous();  // of blocks without work
}

template <class T, class KV, int D>
void launch_tensor_core(const DecodeAttention& p, void* stream) {
  const auto kernel = tensor_core_kernel<T, KV, D>;
  constexpr int kThreads = kWarps * kWarp;
  const size_t shared = kWorkBytes<KV, D> + query_bytes(D, sizeof(T));
  const unsigned blocks = blocks_of(p, resident_blocks(kernel, kThreads, shared, kResident));
  launch(kernel, {blocks, kThreads, shared, stream, p.overlap}, p);
}

// false: no kernel for this head dimension.
template <class T, class KV>
bool try_tensor_core(const DecodeAttention& p, void* stream) {
  switch (p.head_dim) {
    case 32: return launch_tensor_core<T, KV, 32>(p, stream), true;
    case 64: return launch_tensor_core<T, KV, 64>(p, stream), true;
    case 80: return launch_tensor_core<T, KV, 80>(p, stream), true;
    case 96: return launch_tensor_core<T, KV, 96>(p, stream), true;
    case 128: return launch_tensor_core<T, KV, 128>(p, stream), true;
    default: return false;
  }
}

// Instantiated in decode_attention_bf16.cu and decode_attention_fp16.cu, so that they compile at the same time.
bool tensor_core_bf16(const DecodeAttention& p, void* stream);
bool tensor_core_fp16(const DecodeAttention& p, void* stream);

}  // namespace minimind::attention
