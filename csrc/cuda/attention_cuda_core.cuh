// decode_attention in float32 multiply-adds: float32 queries or caches, which tensor cores would round, and any even
// head dimension up to 256. A lane holds the dimensions 2 (lane + 32 chunk), + 1, so that a warp reads whole rows; it
// takes kKeys keys at a time, whose loads are all under way together: 4 keys * 2 * 512 bytes a warp for float32 and D =
// 128, 64 KB for each multiprocessor with 16 warps. The products of all heads with a key are summed over the warp by
// shuffles, 5 for a key and head, which is what bounds it with 8 heads in a group (at 1 KB a key, 40 shuffles for each
// of an H100's 25 keys a microsecond and multiprocessor: 0.6 of its rate).
#pragma once

#include "attention_merge.cuh"

namespace minimind::attention {

constexpr int kKeys = 4;

template <class KV>
__device__ __forceinline__ Pair<float> load_pair(const void* cache, int64_t i) {
  const auto pair = *reinterpret_cast<const Pair<KV>*>(static_cast<const KV*>(cache) + i);
  return {to_float(pair.first), to_float(pair.second)};
}

__device__ __forceinline__ Pair<float> load_pair(const void* from, Number dtype, int64_t i) {
  if (dtype == Number::bf16) return load_pair<bf16>(from, i);
  if (dtype == Number::fp16) return load_pair<fp16>(from, i);
  return load_pair<float>(from, i);
}

template <class KV, int kChunks>
struct Rows {
  Pair<float> x[kKeys][kChunks];

  // offsets: where the rows begin, or -1: zeros, and nothing is read.
  __device__ __forceinline__ void load(const void* cache, const DecodeAttention& p, const int64_t (&offsets)[kKeys],
                                       int lane) {
#pragma unroll
    for (int key = 0; key < kKeys; ++key)
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int d = 2 * (lane + kWarp * chunk);
        const bool wanted = offsets[key] >= 0 && d < p.head_dim;
        x[key][chunk] = wanted ? load_pair<KV>(cache, offsets[key] + d) : Pair<float>{0, 0};
      }
  }
};

template <class KV, int kChunks>
__device__ __forceinline__ void attend_unit(const DecodeAttention& p, const Work& w) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned char* const shared = dynamic_shared();
  auto* const made = reinterpret_cast<float*>(shared + work_bytes(0, p.head_dim));
  if (p.q == nullptr) {
    prepare(p, w, made);
    __syncthreads();
  }
  const float scale = p.scale * kLog2e * (p.k_scale == nullptr ? 1.0f : p.k_scale[w.group]);
  Pair<float> query[kHeads][kChunks], sums[kHeads][kChunks] = {};
  float maximum[kHeads], denominator[kHeads] = {};
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    maximum[head] = -INFINITY;
    const int64_t row = static_cast<int64_t>(w.sequence) * p.heads + w.first_head + head;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int d = 2 * (lane + kWarp * chunk);
      query[head][chunk] = {0, 0};
      if (head >= w.heads || d >= p.head_dim) continue;
      query[head][chunk] = p.q == nullptr ? load_pair<float>(made, head * p.head_dim + d)
                                          : load_pair(p.q, p.dtype, row * p.head_dim + d);
    }
  }

  for (int first = w.begin + warp * kKeys; first < w.end; first += kWarps * kKeys) {
    int64_t offsets[kKeys];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) offsets[key] = first + key < w.end ? row_offset(p, w, first + key) : -1;
    Rows<KV, kChunks> keys, values;
    keys.load(p.key_cache, p, offsets, lane);
    values.load(p.value_cache, p, offsets, lane);
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (head >= w.heads) break;
      float scores[kKeys], highest = maximum[head];
#pragma unroll
      for (int key = 0; key < kKeys; ++key) {
        float product = 0;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
          product += query[head][chunk].first * keys.x[key][chunk].first +
                     query[head][chunk].second * keys.x[key][chunk].second;
        scores[key] = offsets[key] >= 0 ? warp_sum(product) * scale : -INFINITY;
        highest = fmaxf(highest, scores[key]);
      }
      const float rescale = exp2f(maximum[head] - highest);
      maximum[head] = highest;
      denominator[head] *= rescale;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) sums[head][chunk].first *= rescale, sums[head][chunk].second *= rescale;
#pragma unroll
      for (int key = 0; key < kKeys; ++key) {
        const float weight = exp2f(scores[key] - highest);
        denominator[head] += weight;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          sums[head][chunk].first += weight * values.x[key][chunk].first;
          sums[head][chunk].second += weight * values.x[key][chunk].second;
        }
      }
    }
  }

  const WarpResults results(shared, p.head_dim);
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    const int row = warp * kHeads + head;
    if (lane == 0) results.maximum[row] = maximum[head], results.denominator[row] = denominator[head];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int d = 2 * (lane + kWarp * chunk);
      if (d >= p.head_dim) continue;
      results.sums[row * results.stride + d] = sums[head][chunk].first;
      results.sums[row * results.stride + d + 1] = sums[head][chunk].second;
    }
  }
  finish(p, w, results, shared);
}

template <class KV, int kChunks>
__global__ void __launch_bounds__(kWarps* kWarp, kChunks == 4 ? 2 : 3) cuda_core_kernel(DecodeAttention p) {
  let_next_start();
  Walk walk;
  wait_for_previous();
  for (Work w; walk.next(p, w);) {
    if (w.begin < w.end)
      attend_unit<KV, kChunks>(p, w);
    else
      write_zeros(p, w);
  }
}

template <class KV>
void launch_cuda_core(const DecodeAttention& p, void* stream) {
  const auto kernel = p.head_dim <= 64    ? cuda_core_kernel<KV, 1>
                      : p.head_dim <= 128 ? cuda_core_kernel<KV, 2>
                                          : cuda_core_kernel<KV, 4>;
  constexpr int kThreads = kWarps * kWarp;
  const size_t shared = work_bytes(0, p.head_dim) + query_bytes(p.head_dim, sizeof(float));
  const unsigned blocks = blocks_of(p, resident_blocks(kernel, kThreads, shared, kResident));
  launch(kernel, {blocks, kThreads, shared, stream, p.overlap}, p);
}

// Instantiated in decode_attention_fp32.cu.
void cuda_core(const DecodeAttention& p, void* stream);

}  // namespace minimind::attention
