// The threads of one parallel region and the barrier between its phases.
#pragma once

#include "threads.h"
#include "vec.h"

extern "C" int sched_yield();

namespace minimind::cpu::MINIMIND_ISA {

// A decode step has some 70 phases of tens of microseconds: entering an OpenMP region for each would cost as much as the
// work of a small one, while a thread that is already there waits by looking at a counter.
struct Barrier {
  alignas(64) uint32_t arrived = 0;
  alignas(64) uint32_t generation = 0;

  void wait(uint32_t size) {
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == now; ++spins)
      if (spins < 4096)
        pause();
      else
        sched_yield();  // somebody else has the processor that the last thread needs
  }
};

struct Range {
  int64_t begin, end;
};

// Items of a thread's share that are given out, in a cache line of its own.
struct alignas(64) GivenOut {
  int64_t items;
};

struct Team {
  int rank, size;
  Barrier* barrier;

  void sync() const {
    if (size > 1) barrier->wait(static_cast<uint32_t>(size));
  }
  // This thread's share of n.
  Range share(int64_t n) const { return share_of(rank, n); }
  Range share_of(int thread, int64_t n) const { return {n * thread / size, n * (thread + 1) / size}; }
  // Calls f(range) for all of [0, n), which threads of different speed finish at about the same time: a thread takes its own
  // share in pieces, in order, and then pieces of the shares of the threads 1, 2, 4, ... after it, so that a thread that is
  // done looks at few others. given: one for each thread, 0 before the first.
  template <class F>
  void divide(int64_t n, int64_t piece, GivenOut* given, F f) const {
    if (size == 1 || n <= 2 * piece * size) {  // hardly anything would be left for another thread
      const Range mine = share(n);
      if (mine.begin < mine.end) f(mine);
      return;
    }
    take_from(rank, n, piece, given, f);
    for (int step = 1; step < size; step *= 2) take_from((rank + step) % size, n, piece, given, f);
  }
  // The next task that nobody has taken; counter: shared, 0 before the first.
  static int64_t next(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

 private:
  template <class F>
  void take_from(int thread, int64_t n, int64_t piece, GivenOut* given, F f) const {
    const Range all = share_of(thread, n);
    int64_t* items = &given[thread].items;
    while (__atomic_load_n(items, __ATOMIC_RELAXED) < all.end - all.begin) {
      const int64_t begin = all.begin + __atomic_fetch_add(items, piece, __ATOMIC_RELAXED);
      if (begin < all.end) f(Range{begin, begin + piece < all.end ? begin + piece : all.end});
    }
  }
};

// f(team) on `threads` threads.
template <class F>
inline void parallel(int threads, F f) {
  struct Call {
    F& f;
    Barrier barrier;
  } call{f, {}};
  run_parallel(threads, &call, [](void* data, int rank, int size) {
    auto* c = static_cast<Call*>(data);
    c->f(Team{rank, size, &c->barrier});
  });
}

}  // namespace minimind::cpu::MINIMIND_ISA
