// A matrix times one to eight rows of activations, with all that surrounds it in a decoding step: one launch.
//
//   y = W n(x)        n: RMSNorm, or nothing; x: activations, or rows of the embedding
//   out = y,   out += y,   or   out[i] = silu(y[i]) y[I + i]
//
// Each weight is read once and used for every row, so what counts is to have many bytes of W under way. A warp takes
// kOf rows of W, a lane 16 bytes of each at a time, kDepth of them at once: with one row of activations 2 * 6 * 512
// bytes a warp, which is all that it needs of a matrix of up to 1536 columns. Those loads leave before the kernel waits
// for the one ahead (Launch::overlap), so that a matrix is on its way while the step is still at the layer before.
// Activations lie in shared memory in float32, in the order in which lanes read them. With eight rows a 16-byte load of
// weights meets 8 * 32 bytes of them, which four rows of W share: 8 cycles for 32 multiply-adds of a warp, which take as
// long; on an H100 that is twice the rate at which the memory delivers. Registers hold weights as they are stored; they
// become float32 four at a time, and all arithmetic is in it.
//
// Weights of 8 bits are integers with one scale per row, which multiplies the finished sum. Half of the bytes of bf16 meet
// the same arithmetic, so with eight rows an H100 computes as long as it reads.
//
// An output is a sum in one order, whatever else is computed: a row gives the same bits in any batch of up to eight.
#pragma once

#include <type_traits>

#include "warp.cuh"

namespace minimind {

struct MatVec {
  const void* weight;      // [N, K]; with swiglu [2 N, K]; q8 if there are scales, K padded to a multiple of 16
  const float* scales;     // [N], with swiglu [2 N]; null: weight is of dtype
  const float* x;          // [B, K]; null: rows `tokens` of `embedding`
  const void* embedding;   // [V, K] of dtype
  const int64_t* tokens;   // [B]; one that V does not have takes the nearest
  float* embedded;         // [B, K]: receives them
  const void* norm;        // [K] of norm_dtype; null: no norm
  float* out;              // [B, N]
  const int32_t* lengths;  // [B]: a row of length 0 gives zeros; or null
  uint32_t* zeros;         // `num_zeros` numbers to set to 0, or null
  int64_t vocabulary;
  int batch, k, n, num_zeros;
  Number dtype, norm_dtype;
  float eps;
  bool swiglu, accumulate, overlap;
};

namespace matvec {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxRows = 8;
constexpr size_t kMaxShared = 96 * 1024;  // of the 99 KB that every card gives a block

template <class W>
constexpr int kEach = 16 / static_cast<int>(sizeof(W));  // numbers of a load
template <class W>
constexpr int kChunk = kWarp * kEach<W>;  // of a warp's
template <int kRows>
constexpr int kOf = kRows <= 2 ? 2 : 4;  // rows of W in a warp
template <int kRows>
constexpr int kDepth = 12 / kOf<kRows>;

template <class W>
__host__ __device__ constexpr int padded(int k) {
  return (k + kChunk<W> - 1) / kChunk<W> * kChunk<W>;
}
template <class W>
constexpr size_t shared_bytes(int rows, int k) {
  return sizeof(float) * (static_cast<size_t>(rows + 1) * padded<W>(k) + kWarps * rows);
}

// Where four numbers of x lie that a lane multiplies with the `part`-th four of its weights: what lanes read at once are
// neighbours. Of q8, what they write at once are four parts for two lanes; without the turn all parts were in the same
// banks.
template <class W>
__device__ __forceinline__ int place(int lane, int part) {
  constexpr int kTurn = std::is_same_v<W, q8> ? 2 : 0;
  return (part * kWarp + (lane ^ part * kTurn)) * 4;
}

// Where x[k] lies, k a multiple of 4.
template <class W>
__device__ __forceinline__ int position(int k) {
  const int in_chunk = k % kChunk<W>;
  return k - in_chunk + place<W>(in_chunk / kEach<W>, in_chunk % kEach<W> / 4);
}

struct Shared {
  float* x;     // [rows, padded]
  float* gain;  // [padded]: the norm's weights
  float* sums;  // [kWarps, rows]
  int stride;
};

// The thread's share of x, four neighbours at a time, is its own in every pass over it.
template <class Function>
__device__ __forceinline__ void for_own_fours(int padded, Function function) {
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * kThreads) function(k);
}

__device__ __forceinline__ void load_gains(const MatVec& p, const Shared& s) {
  for_own_fours(s.stride, [&](int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.gain[k + i] = k + i < p.k ? load_number(p.norm, p.norm_dtype, k + i) : 0.0f;
  });
}

template <class W>
__device__ __forceinline__ Four load_embedding(const MatVec& p, int64_t at) {
  if constexpr (std::is_same_v<W, q8>) {
    if (p.dtype == Number::bf16) return load_four(static_cast<const bf16*>(p.embedding) + at);
    if (p.dtype == Number::fp16) return load_four(static_cast<const fp16*>(p.embedding) + at);
    return load_four(static_cast<const float*>(p.embedding) + at);
  } else {
    return load_four(static_cast<const W*>(p.embedding) + at);
  }
}

template <class W>
__device__ __forceinline__ Four load_x(const MatVec& p, int row, int k) {
  if (k >= p.k || row >= p.batch) return {};
  if (p.x != nullptr) return *reinterpret_cast<const Four*>(p.x + static_cast<int64_t>(row) * p.k + k);
  const int64_t token = min(max(p.tokens[row], int64_t{0}), p.vocabulary - 1);
  const Four x = load_embedding<W>(p, token * p.k + k);
  if (blockIdx.x == 0) *reinterpret_cast<Four*>(p.embedded + static_cast<int64_t>(row) * p.k + k) = x;
  return x;
}

// All of n(x) into shared memory. The block synchronises afterwards.
template <class W, int kRows>
__device__ __forceinline__ void fill(const MatVec& p, const Shared& s) {
  float squares[kRows] = {};
  for_own_fours(s.stride, [&](int k) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Four x = load_x<W>(p, row, k);
      *reinterpret_cast<Four*>(s.x + row * s.stride + position<W>(k)) = x;
#pragma unroll
      for (int i = 0; i < 4; ++i) squares[row] = fmaf(x.x[i], x.x[i], squares[row]);
    }
  });
  if (p.norm == nullptr) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = warp_sum(squares[row]);
    if (lane == 0) s.sums[warp * kRows + row] = sum;
  }
  __syncthreads();
  float scale[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += s.sums[i * kRows + row];
    scale[row] = rsqrtf(sum / static_cast<float>(p.k) + p.eps);
  }
  for_own_fours(s.stride, [&](int k) {
    const Four gain = *reinterpret_cast<const Four*>(s.gain + k);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      Four& x = *reinterpret_cast<Four*>(s.x + row * s.stride + position<W>(k));
#pragma unroll
      for (int i = 0; i < 4; ++i) x.x[i] *= scale[row] * gain.x[i];
    }
  });
}

// The i-th row of W that a warp takes whose first output is `first`; of rows beyond the last one, the last.
template <int kRows>
__device__ __forceinline__ int64_t row_of_weight(const MatVec& p, int first, int i) {
  constexpr int kHalf = kOf<kRows> / 2;
  const int n = p.swiglu && i >= kHalf ? first + i - kHalf : first + i;
  return min(n, p.n - 1) + (p.swiglu && i >= kHalf ? p.n : 0);
}

// These rows, and what is under way of them.
template <class W, int kRows>
struct Rows {
  const W* row[kOf<kRows>];
  Words ring[kDepth<kRows>][kOf<kRows>];

  __device__ __forceinline__ Rows(const MatVec& p, int first) {
    const int stride = std::is_same_v<W, q8> ? (p.k + kEach<W> - 1) / kEach<W> * kEach<W> : p.k;
#pragma unroll
    for (int i = 0; i < kOf<kRows>; ++i)
      row[i] = static_cast<const W*>(p.weight) + row_of_weight<kRows>(p, first, i) * stride;
  }

  __device__ __forceinline__ void load(int slot, int chunk, int lane, int k) {
    const int at = chunk * kChunk<W> + lane * kEach<W>;
#pragma unroll
    for (int i = 0; i < kOf<kRows>; ++i) ring[slot][i] = at < k ? load_words(row[i] + at) : Words{};
  }

  // Their products with a chunk of x, one after the other in k, added to `sums` [rows of x, rows of W].
  __device__ __forceinline__ void multiply(float (&sums)[kRows * kOf<kRows>], int slot, const float* x, int stride,
                                           int lane) const {
#pragma unroll
    for (int part = 0; part < kEach<W> / 4; ++part) {
      Four weights[kOf<kRows>];
#pragma unroll
      for (int i = 0; i < kOf<kRows>; ++i) weights[i] = unpack_four<W>(ring[slot][i], part);
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const Four mine = *reinterpret_cast<const Four*>(x + b * stride + place<W>(lane, part));
#pragma unroll
        for (int i = 0; i < kOf<kRows>; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[b * kOf<kRows> + i] = fmaf(weights[i].x[j], mine.x[j], sums[b * kOf<kRows> + i]);
      }
    }
  }
};

template <class W, int kRows>  // with four rows ptxas spills rather than take 130 registers, unless it is told to
__global__ void __launch_bounds__(kThreads, kRows == 4 ? 3 : 1) matvec_kernel(MatVec p) {
  let_next_start();
  constexpr int kSums = kRows * kOf<kRows>, kLanes = kWarp / kSums;  // lanes that hold a sum at the end
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int of_warp = p.swiglu ? kOf<kRows> / 2 : kOf<kRows>;
  const int first = (static_cast<int>(blockIdx.x) * kWarps + warp) * of_warp;
  const int chunks = padded<W>(p.k) / kChunk<W>;
  Rows<W, kRows> rows(p, first);
#pragma unroll
  for (int i = 0; i < kDepth<kRows>; ++i) rows.load(i, i, lane, p.k);
  Shared s;
  s.stride = padded<W>(p.k);
  s.x = reinterpret_cast<float*>(dynamic_shared());
  s.gain = s.x + kRows * s.stride;
  s.sums = s.gain + s.stride;
  if (p.norm != nullptr) load_gains(p, s);
  const int b = lane / kLanes / kOf<kRows>, i = lane / kLanes % kOf<kRows>;
  float scale = 1.0f;
  if constexpr (std::is_same_v<W, q8>) scale = p.scales[row_of_weight<kRows>(p, first, i)];
  wait_for_previous();

  const bool writes = lane % kLanes == 0 && i < of_warp && first + i < p.n && b < p.batch;
  float* const to = p.out + static_cast<int64_t>(b) * p.n + first + i;
  const float before = writes && p.accumulate ? *to : 0.0f;
  if (blockIdx.x == 0)
    for (int j = threadIdx.x; j < p.num_zeros; j += kThreads) p.zeros[j] = 0;
  fill<W, kRows>(p, s);
  __syncthreads();

  float sums[kSums] = {};
  for (int chunk = 0; chunk < chunks; chunk += kDepth<kRows>) {
#pragma unroll
    for (int slot = 0; slot < kDepth<kRows>; ++slot) {
      if (chunk + slot >= chunks) break;
      rows.multiply(sums, slot, s.x + (chunk + slot) * kChunk<W>, s.stride, lane);
      rows.load(slot, chunk + slot + kDepth<kRows>, lane, p.k);
    }
  }
  float y = warp_sums(sums, lane);
  if constexpr (std::is_same_v<W, q8>) {
    // one rounding, written out: the compiler may fuse product and sum in the kernel of one batch and not of another
    y = p.swiglu ? y * scale : fmaf(y, scale, before);
  } else if (!p.swiglu) {
    y = before + y;
  }
  if (p.swiglu) {
    const float up = __shfl_sync(kAll, y, (lane + kOf<kRows> / 2 * kLanes) % kWarp);
    y = y / (1.0f + expf(-y)) * up;
  }
  if (writes) *to = p.lengths != nullptr && p.lengths[b] <= 0 ? 0.0f : y;
}

template <class W, int kRows>
void launch_matvec(const MatVec& p, void* stream) {
  const int of_block = kWarps * (p.swiglu ? kOf<kRows> / 2 : kOf<kRows>);
  const auto blocks = static_cast<unsigned>((p.n + of_block - 1) / of_block);
  launch(matvec_kernel<W, kRows>, {blocks, kThreads, shared_bytes<W>(kRows, p.k), stream, p.overlap}, p);
}

template <class W>
void launch_matvec(const MatVec& p, void* stream) {
  if (p.batch <= 1) return launch_matvec<W, 1>(p, stream);
  if (p.batch <= 2) return launch_matvec<W, 2>(p, stream);
  if (p.batch <= 4) return launch_matvec<W, 4>(p, stream);
  return launch_matvec<W, 8>(p, stream);
}

}  // namespace matvec

// The batch from 1 to 8; rows of weight, x, embedding, out and embedded begin at multiples of 16 bytes.
inline void multiply(const MatVec& p, void* stream) {
  if (p.scales != nullptr) return matvec::launch_matvec<q8>(p, stream);
  if (p.dtype == Number::bf16) return matvec::launch_matvec<bf16>(p, stream);
  if (p.dtype == Number::fp16) return matvec::launch_matvec<fp16>(p, stream);
  matvec::launch_matvec<float>(p, stream);
}

// Whether a batch's activations of k columns fit the shared memory of a block. scaled: of weights of 8 bits.
inline bool multiply_fits(Number dtype, bool scaled, int batch, int k) {
  int rows = 1;
  while (rows < batch) rows *= 2;
  const size_t shared = scaled                    ? matvec::shared_bytes<q8>(rows, k)
                        : dtype == Number::fp32 ? matvec::shared_bytes<float>(rows, k)
                                                : matvec::shared_bytes<bf16>(rows, k);
  return batch <= matvec::kMaxRows && shared <= matvec::kMaxShared;
}

}  // namespace minimind
