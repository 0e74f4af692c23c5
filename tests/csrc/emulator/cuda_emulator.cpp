#include "platform.cuh"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

// Fibers are threads of their own for ThreadSanitizer. What the emulator itself does between them is hidden from it, so
// that only the barriers that a kernel asks for order the kernel's memory.
#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define HIDDEN __attribute__((no_sanitize_thread, noinline))
constexpr unsigned kWithoutOrder = 1;
#else
static inline void* __tsan_get_current_fiber() { return nullptr; }
static inline void* __tsan_create_fiber(unsigned) { return nullptr; }
static inline void __tsan_destroy_fiber(void*) {}
static inline void __tsan_switch_to_fiber(void*, unsigned) {}
static inline void __tsan_acquire(void*) {}
static inline void __tsan_release(void*) {}
#define HIDDEN
constexpr unsigned kWithoutOrder = 0;
#endif

// swapcontext asks the kernel for the signal mask each time; sanitizers know it, and not a longjmp to another stack.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kJump = false;
#else
constexpr bool kJump = true;
#endif

namespace emulator {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr std::size_t kMaxShared = 99 * 1024;  // of sm_86 and sm_89, the least of the supported cards

struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
  const char* operation = nullptr;
  char order[2];  // addresses that stand for two generations in turn
};

struct Warp {
  Barrier barrier;
  Slots slots[2];
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool wanted;
};

struct Context {
  ucontext_t whole = {};
  jmp_buf jump;
  bool jumped = false;  // `jump` is where it goes on
};

struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  void* tsan = nullptr;
  int index = 0;
  bool done = false, waited = false, vote = false;
  const long* waits_for = nullptr;  // runnable once *waits_for != seen
  long seen = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  dim3 index, size;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<Fiber> fibers;
  unsigned char* shared = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  char start, end;
  int finished = 0;
  bool overlaps = false;  // the kernel before this one
};

Block block;
Fiber* current = nullptr;
long bank_conflicts = 0, last_threads = 0, last_shared = 0, last_blocks = 0, launches = 0;
bool eager = false;  // EMULATOR_EAGER
int order_kind = 0;  // EMULATOR_ORDER

HIDDEN void switch_context(Context& from, Context& to) {
  if (!kJump) {
    swapcontext(&from.whole, &to.whole);
  } else if (_setjmp(from.jump) == 0) {
    from.jumped = true;
    if (to.jumped) _longjmp(to.jump, 1);
    setcontext(&to.whole);
  }
}

HIDDEN void switch_to_scheduler() {
  __tsan_switch_to_fiber(block.scheduler_tsan, kWithoutOrder);
  switch_context(current->context, block.scheduler);
}

void finish_copies(int pending);

HIDDEN void finish() {
  current->done = true;
  ++block.finished;
  switch_to_scheduler();
}

HIDDEN void start() {
  __tsan_acquire(&block.start);
  block.body(block.argument);
  if (block.overlaps && !current->waited) fail("ended without having waited for the kernel before");
  finish_copies(0);
  __tsan_release(&block.end);
  finish();
}

// Returns the generation that this thread took part in.
HIDDEN long arrive(Barrier& barrier, const char* operation, bool orders_memory) {
  const long generation = barrier.generation;
  if (barrier.arrived == 0) barrier.operation = operation;
  if (barrier.operation != operation) fail("lanes of a warp are in different operations");
  void* order = &barrier.order[generation & 1];
  if (orders_memory) __tsan_release(order);
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    current->waits_for = &barrier.generation;
    current->seen = generation;
    switch_to_scheduler();
  }
  if (orders_memory) __tsan_acquire(order);
  return generation;
}

HIDDEN Warp& warp() { return block.warps[current->index / kLanes]; }

void put_in_order(std::vector<int>& order, std::mt19937& random) {
  const int n = static_cast<int>(order.size());
  for (int i = 0; i < n; ++i) order[i] = order_kind == 1 ? n - 1 - i : i;
  if (order_kind > 1) std::shuffle(order.begin(), order.end(), random);
}

HIDDEN void resume(Fiber& fiber) {
  fiber.waits_for = nullptr;
  current = &fiber;
  __tsan_switch_to_fiber(fiber.tsan, kWithoutOrder);
  switch_context(block.scheduler, fiber.context);
}

HIDDEN void run_block(int threads, std::size_t shared_bytes, std::mt19937& random) {
  // exactly as large as was asked for, so that AddressSanitizer sees a step beyond
  std::unique_ptr<unsigned char, void (*)(void*)> shared(
      static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)), std::free);
  for (std::size_t i = 0; i < shared_bytes; ++i) shared.get()[i] = 0xff;
  block.shared = shared.get();
  block.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  for (auto& each : block.warps) each.barrier.members = kLanes;
  block.barrier = Barrier{};
  block.barrier.members = threads;
  block.finished = 0;
  block.scheduler_tsan = __tsan_get_current_fiber();
  if (block.fibers.size() < static_cast<std::size_t>(threads)) block.fibers = std::vector<Fiber>(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.stack == nullptr) fiber.stack.reset(new unsigned char[kStack]);
    fiber.index = i;
    fiber.done = fiber.waited = false;
    fiber.waits_for = nullptr;
    fiber.tsan = __tsan_create_fiber(0);
    ucontext_t& context = fiber.context.whole;
    if (context.uc_stack.ss_sp == nullptr) getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
    fiber.context.jumped = false;
  }
  __tsan_release(&block.start);
  std::vector<int> order(threads);
  while (block.finished < threads) {
    bool moved = false;
    put_in_order(order, random);
    for (const int i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
      resume(fiber);
      moved = true;
    }
    if (!moved) fail("threads wait at a barrier that others never reach");
  }
  __tsan_acquire(&block.end);
  for (int i = 0; i < threads; ++i) __tsan_destroy_fiber(block.fibers[i].tsan);
}

void finish_copies(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front())
      for (int i = 0; i < 16; ++i) copy.to[i] = copy.wanted ? copy.from[i] : 0;
    groups.pop_front();
  }
}

// Of 8 rows of 16 bytes, read at once: those in the same four banks as another.
HIDDEN void count_conflicts(const Slots& rows, int first) {
  unsigned banks = 0;
  for (int i = first; i < first + 8; ++i) banks |= 1u << (value_of<uintptr_t>(rows[i]) / 16 % 8);
  bank_conflicts += 8 - __builtin_popcount(banks);
}

uint32_t half_of(uint32_t pair, int half) { return pair >> (16 * half) & 0xffff; }

}  // namespace

HIDDEN dim3 thread_index() { return dim3(current->index, 0, 0); }
HIDDEN dim3 block_index() { return block.index; }
HIDDEN dim3 block_size() { return block.size; }
HIDDEN dim3 grid_size() { return dim3(last_blocks); }
HIDDEN unsigned char* dynamic_shared() { return block.shared; }
HIDDEN int lane() { return current->index % kLanes; }

void fail(const char* message) {
  std::fprintf(stderr, "emulator: block (%u, %u, %u), thread %d: %s\n", block.index.x, block.index.y, block.index.z,
               current == nullptr ? -1 : current->index, message);
  std::abort();
}

void run(const minimind::Launch& how, void (*body)(void*), void* argument) {
  const int threads = how.threads;
  if (threads % kLanes != 0 || threads < 1 || threads > 1024) fail("a block must be whole warps, at most 1024 threads");
  if (how.shared > kMaxShared) fail("more shared memory than every supported card gives a block");
  if (how.blocks == 0) fail("a launch of no block");
  last_threads = threads, last_shared = static_cast<long>(how.shared), last_blocks = how.blocks;
  ++launches;
  block.size = dim3(threads);
  block.body = body;
  block.argument = argument;
  block.overlaps = how.overlap;
  const char* const order = std::getenv("EMULATOR_ORDER");
  order_kind = order == nullptr ? 0 : std::atoi(order);
  eager = std::getenv("EMULATOR_EAGER") != nullptr;
  std::mt19937 random(order_kind);
  std::vector<int> blocks(how.blocks);
  put_in_order(blocks, random);
  for (const int i : blocks) {
    block.index = dim3(i, 0, 0);
    run_block(threads, how.shared, random);
  }
}

unsigned resident_blocks() {
  const char* const given = std::getenv("EMULATOR_RESIDENT");
  return given == nullptr ? 7 : static_cast<unsigned>(std::atoi(given));
}

void wait_for_previous() { current->waited = true; }

HIDDEN bool sync_block_or(bool mine) {
  current->vote = mine;
  sync_block();
  bool any = false;
  for (unsigned i = 0; i < block.size.x; ++i) any |= block.fibers[i].vote;
  sync_block();  // nobody votes again before all have counted
  return any;
}

void sync_block() { arrive(block.barrier, "__syncthreads", true); }
void sync_warp() { arrive(warp().barrier, "__syncwarp", true); }

HIDDEN Slots exchange(const Slot& mine, const char* operation) {
  Warp& w = warp();
  Slots& slots = w.slots[w.barrier.generation & 1];  // the other set may still be read
  slots[lane()] = mine;
  arrive(w.barrier, operation, false);
  return slots;
}

void cp_async_16(void* shared, const void* global, bool wanted) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp.async of 16 bytes that are not aligned");
  current->open_group.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), wanted});
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
  if (eager) finish_copies(0);
}

void cp_async_wait_for(int pending) { finish_copies(pending); }

void ldmatrix(uint32_t* d, int matrices, bool transposed, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that is not aligned");
  const Slots rows = exchange(slot_of(row), "ldmatrix");
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    const auto at = [&](int i, int j) -> uint32_t {
      return value_of<const uint16_t*>(rows[8 * matrix + i])[j];
    };
    d[matrix] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    if (lane() == 0) count_conflicts(rows, 8 * matrix);
  }
}

uint32_t movmatrix_trans(uint32_t x) {
  const Slots all = exchange(slot_of(x), "movmatrix");
  const int g = lane() / 4, t = lane() % 4;
  const auto at = [&](int i, int j) { return half_of(value_of<uint32_t>(all[4 * i + j / 2]), j % 2); };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t)) {
  const auto words = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
  const Slots all = exchange({{words(a[0], a[1]), words(a[2], a[3]), words(b0, b1), 0}}, "mma");
  const auto word = [&](int lane, int i) { return static_cast<uint32_t>(all[lane].words[i / 2] >> (32 * (i % 2))); };
  const auto number = [&](int lane, int i, int half) {
    return to_float(static_cast<uint16_t>(half_of(word(lane, i), half)));
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = number(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
      const float right = number(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
      c[i] += left * right;
    }
  }
}

}  // namespace emulator

long emulator_bank_conflicts() { return emulator::bank_conflicts; }
long emulator_last_threads() { return emulator::last_threads; }
long emulator_last_shared() { return emulator::last_shared; }
long emulator_last_blocks() { return emulator::last_blocks; }
long emulator_launches() { return emulator::launches; }
