// Runs CUDA kernels on a CPU, thread by thread, so that their index arithmetic, barriers and masks are executed where no
// GPU is. A block's threads are fibers, switched only at barriers and warp-wide operations, in an order that
// EMULATOR_ORDER chooses (0: ascending, 1: descending, otherwise the seed of a random one). Stricter than a GPU: a
// barrier that not all threads of the block reach, lanes of a warp in different operations, copies of 16 bytes that are
// not aligned, shared memory that a launch does not ask for, more of it than every card gives, and a kernel that may
// overlap the one before it and ends without having waited for it are errors; shared memory starts as NaN; cp.async
// arrives only when it is waited for, or at once with EMULATOR_EAGER=1. Blocks run one after another, in the same kind of
// order as threads; EMULATOR_RESIDENT: as many as a kernel is told that the device holds. Under ThreadSanitizer each fiber is a thread, and only
// __syncthreads and __syncwarp order memory, as in CUDA: shuffles, votes and tensor-core operations do not.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kLanes = 32;

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* dynamic_shared();
int lane();
[[noreturn]] void fail(const char* message);

// Runs body(argument) for every thread of every block.
void run(const minimind::Launch& how, void (*body)(void*), void* argument);
unsigned resident_blocks();
void wait_for_previous();

void sync_block();
bool sync_block_or(bool mine);
void sync_warp();

// What a lane shows the others in a warp-wide operation.
struct Slot {
  uint64_t words[4];
};
using Slots = std::array<Slot, kLanes>;
// The slots of all lanes; `operation`: the same for all of them.
Slots exchange(const Slot& mine, const char* operation);

template <class T>
Slot slot_of(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Slot slot = {};
  auto* to = reinterpret_cast<unsigned char*>(slot.words);
  for (std::size_t i = 0; i < sizeof(T); ++i) to[i] = reinterpret_cast<const unsigned char*>(&x)[i];
  return slot;
}
template <class T>
T value_of(const Slot& slot) {
  T x;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    reinterpret_cast<unsigned char*>(&x)[i] = reinterpret_cast<const unsigned char*>(slot.words)[i];
  return x;
}

void cp_async_16(void* shared, const void* global, bool wanted);
void cp_async_commit();
void cp_async_wait_for(int pending);
template <int kPending>
void cp_async_wait() {
  cp_async_wait_for(kPending);
}

void ldmatrix(uint32_t* d, int matrices, bool transposed, const void* row);
inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) { ldmatrix(d, 4, false, row); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) { ldmatrix(d, 4, true, row); }
inline void ldmatrix_x2(uint32_t (&d)[2], const void* row) { ldmatrix(d, 2, false, row); }
inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) { ldmatrix(d, 2, true, row); }
uint32_t movmatrix_trans(uint32_t x);
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t));

inline void full(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp-wide operation of less than the whole warp");
}

}  // namespace emulator

extern "C" {
long emulator_bank_conflicts();  // of all ldmatrix so far: rows that had to wait for another
long emulator_last_threads();    // of a block of the last launch
long emulator_last_shared();     // bytes of its shared memory
long emulator_last_blocks();     // of it
long emulator_launches();        // so far
}

inline void __syncthreads() { emulator::sync_block(); }
inline int __syncthreads_or(int mine) { return emulator::sync_block_or(mine != 0); }
inline void __syncwarp() { emulator::sync_warp(); }
inline void __threadfence() {}

// The number before; it becomes one more, or 0 after `last`.
inline unsigned atomicInc(unsigned* to, unsigned last) {
  const unsigned before = __atomic_load_n(to, __ATOMIC_ACQUIRE);
  __atomic_store_n(to, before >= last ? 0 : before + 1, __ATOMIC_RELEASE);
  return before;
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source) {
  emulator::full(mask);
  return emulator::value_of<T>(emulator::exchange(emulator::slot_of(x), "shfl")[source & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  emulator::full(mask);
  return emulator::value_of<T>(emulator::exchange(emulator::slot_of(x), "shfl_xor")[emulator::lane() ^ distance]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  emulator::full(mask);
  const auto all = emulator::exchange(emulator::slot_of(x), "shfl_up");
  const int lane = emulator::lane();
  return emulator::value_of<T>(all[lane < distance ? lane : lane - distance]);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  emulator::full(mask);
  const auto all = emulator::exchange(emulator::slot_of(x), "ballot");
  unsigned result = 0;
  for (int i = 0; i < emulator::kLanes; ++i) result |= static_cast<unsigned>(emulator::value_of<bool>(all[i])) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __reduce_add_sync(unsigned mask, int x) {
  emulator::full(mask);
  int sum = 0;
  for (const auto& slot : emulator::exchange(emulator::slot_of(x), "reduce_add")) sum += emulator::value_of<int>(slot);
  return sum;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace minimind {

using emulator::dynamic_shared;
using std::max;
using std::min;

inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void let_next_start() {}

template <class... Parameters>
unsigned resident_blocks(void (*)(Parameters...), int, std::size_t, int) {
  return emulator::resident_blocks();
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, Parameters... args) {
  auto body = [&] { kernel(args...); };
  emulator::run(how, [](void* call) { (*static_cast<decltype(body)*>(call))(); }, &body);
}

inline void fill_with_zeros(void* memory, std::size_t bytes, void*) { std::memset(memory, 0, bytes); }

}  // namespace minimind
