// How Team::divide gives out the items of successive phases, with threads of its own. Prints what is wrong; its status is 1 then.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../../csrc/cpu/team.h"

using namespace minimind::cpu::MINIMIND_ISA;

namespace {

std::atomic<int> failures{0};

void expect(bool right, const char* what, int threads, int64_t n, int64_t piece) {
  if (!right && ++failures < 20)
    std::printf("%s: %d threads, %lld items, pieces of %lld\n", what, threads, (long long)n, (long long)piece);
}

template <class F>
void on_team(int threads, F f) {
  Barrier barrier;
  std::vector<std::thread> all;
  for (int rank = 0; rank < threads; ++rank) all.emplace_back([&, rank] { f(Team{rank, threads, &barrier}); });
  for (std::thread& thread : all) thread.join();
}

// Plain counts: with two threads at one item, the thread sanitizer speaks up.
void every_item_once(int threads, int64_t n, int64_t piece) {
  constexpr int kPhases = 20;
  std::vector<GivenOut> given(static_cast<size_t>(kPhases * threads));
  std::vector<std::vector<int>> times(kPhases, std::vector<int>(static_cast<size_t>(n)));
  on_team(threads, [&](const Team& team) {
    for (int phase = 0; phase < kPhases; ++phase) {
      team.divide(n, piece, given.data() + phase * threads, [&](Range range) {
        expect(range.begin < range.end && 0 <= range.begin && range.end <= n, "bad range", threads, n, piece);
        for (int64_t i = range.begin; i < range.end; ++i) ++times[static_cast<size_t>(phase)][static_cast<size_t>(i)];
      });
      team.sync();
    }
  });
  for (const auto& phase : times)
    for (int each : phase) expect(each == 1, "an item not given out once", threads, n, piece);
}

// A thread that stays in its first piece until all the others are computed: nobody waits for its share but it.
void a_thread_that_is_stuck(int threads, int stuck, int64_t n, int64_t piece) {
  std::vector<GivenOut> given(static_cast<size_t>(threads));
  std::atomic<int64_t> left{n};
  std::atomic<bool> entered{false};
  on_team(threads, [&](const Team& team) {
    const Range own = team.share(n);
    if (team.rank != stuck)
      while (!entered) std::this_thread::yield();
    int64_t after = own.begin - 1;
    team.divide(n, piece, given.data(), [&](Range range) {
      const bool mine = own.begin <= range.begin && range.begin < own.end;
      expect(!mine || range.begin > after, "own pieces out of order", threads, n, piece);
      expect(range.end - range.begin <= piece, "a large piece", threads, n, piece);
      if (mine) after = range.begin, expect((range.begin - own.begin) % piece == 0, "a torn piece", threads, n, piece);
      if (team.rank == stuck && !entered) {
        expect(mine && range.begin == own.begin, "does not begin with its own share", threads, n, piece);
        entered = true;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (left > range.end - range.begin && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        expect(left == range.end - range.begin, "the share of a slow thread was left to it", threads, n, piece);
      }
      left -= range.end - range.begin;
    });
  });
  expect(left == 0, "items left", threads, n, piece);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 5, 8})
    for (int64_t n : {0, 1, 7, 20, 101, 400})
      for (int64_t piece : {2, 4, 24}) every_item_once(threads, n, piece);
  for (int threads : {2, 3, 5, 8})
    for (int stuck = 0; stuck < threads && failures == 0; ++stuck) a_thread_that_is_stuck(threads, stuck, 403, 4);
  // a single thread, and shares too small to be cut, are one range
  for (int threads : {1, 4}) {
    std::atomic<int> ranges{0};
    std::vector<GivenOut> given(static_cast<size_t>(threads));
    on_team(threads, [&](const Team& team) { team.divide(32, threads == 1 ? 2 : 4, given.data(), [&](Range) { ++ranges; }); });
    expect(ranges == threads, "a share was cut", threads, 32, 4);
  }
  return failures > 0;
}
