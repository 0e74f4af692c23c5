// Intel AMX for processors that have none. Each of its instructions is an invalid one there; the handler of that signal does
// what Intel's Software Developer's Manual (volume 2, "TDPBF16PS" and so on) says, in tiles of this thread kept in memory, and
// continues behind the instruction. An instruction that the manual does not allow, such as one with tiles whose shapes do
// not fit, ends the process. A library: it works as soon as it is loaded, and answers csrc/cpu/amx.cpp's question in its
// place if it is preloaded or linked instead of that.
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {  // as ldtilecfg reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct State {
  Config config;  // palette 0: not configured
  alignas(64) uint8_t tiles[kTiles][kRows][kRowBytes];
};
thread_local State state;
enum Count {  // of instructions
   kLoads, kStores, kBf16, kInt8, kConfigured, kReleased, kCounts
};
long counts[kCounts];
struct sigaction before;

void count(Count what) { __atomic_fetch_add(&counts[what], 1, __ATOMIC_RELAXED); }

[[noreturn]] void fail(const char* why) {
  const char start[] = "AMX emulator: ";
  if (write(2, start, sizeof(start) - 1) < 0 || write(2, why, strlen(why)) < 0 || write(2, "\n", 1) < 0) _exit(4);
  _exit(3);
}
void demand(bool right, const char* why) {
  if (!right) fail(why);
}

struct Instruction {
  int prefix, opcode, reg, rm, third;  // prefix: 0 none, 1 66, 2 F3, 3 F2; reg, rm, third: tiles
  bool memory;
  uint8_t* base;  // of a memory operand
  int64_t stride;
  const uint8_t* next;
};

// False: none of AMX.
bool decode(const uint8_t* at, const greg_t* registers, Instruction& i) {
  static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;  // VEX of three bytes, opcodes 0F 38
  const int b = at[1] & 0x20 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8;
  if ((at[1] & 0x80) == 0 || at[2] & 0x84) return false;  // R; W and L
  i.prefix = at[2] & 3, i.opcode = at[3], i.third = ~at[2] >> 3 & 15;
  if (i.opcode != 0x49 && i.opcode != 0x4b && i.opcode != 0x5c && i.opcode != 0x5e) return false;
  const int mod = at[4] >> 6, rm = at[4] & 7;
  i.reg = at[4] >> 3 & 7, i.rm = rm, i.memory = mod != 3;
  at += 5;
  if (!i.memory) {
    i.next = at;
    return true;
  }
  int64_t base = 0;
  i.stride = 0;
  bool relative = false, wide = mod == 2;
  if (rm == 4) {
    const int sib = *at++, index = (sib >> 3 & 7) + x, low = sib & 7;
    if (index != 4) i.stride = static_cast<int64_t>(static_cast<uint64_t>(registers[kOrder[index]]) << (sib >> 6));
    if (low == 5 && mod == 0)
      wide = true;
    else
      base = registers[kOrder[low + b]];
  } else if (rm == 5 && mod == 0) {
    relative = wide = true;
  } else {
    base = registers[kOrder[rm + b]];
  }
  if (wide) {
    int32_t offset;
    memcpy(&offset, at, 4);
    at += 4, base += offset;
  } else if (mod == 1) {
    base += static_cast<int8_t>(*at++);
  }
  if (relative) base += reinterpret_cast<int64_t>(at);
  i.base = reinterpret_cast<uint8_t*>(base), i.next = at;
  return true;
}

int rows_of(int tile) { return state.config.rows[tile]; }
int bytes_of(int tile) { return state.config.row_bytes[tile]; }

void need(int tile) {
  demand(state.config.palette == 1, "a tile is used, but none is configured");
  demand(tile < kTiles && rows_of(tile) > 0 && bytes_of(tile) > 0, "a tile without a shape is used");
}

void configure(const Instruction& i) {
  Config config;
  memcpy(&config, i.base, sizeof(config));
  memset(&state, 0, sizeof(state));
  if (config.palette == 0) return;
  demand(config.palette == 1, "ldtilecfg: no such palette");
  for (uint8_t byte : config.reserved) demand(byte == 0, "ldtilecfg: a reserved byte is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    demand(rows <= kRows && bytes <= kRowBytes, "ldtilecfg: a tile is too large");
    demand((rows > 0) == (bytes > 0), "ldtilecfg: a tile has rows without bytes, or bytes without rows");
    demand(tile < kTiles || rows == 0, "ldtilecfg: there are eight tiles");
  }
  state.config = config;
  count(kConfigured);
}

void release() {
  demand(state.config.palette == 1, "tilerelease: nothing is configured (allowed, but not meant)");
  memset(&state, 0, sizeof(state));
  count(kReleased);
}

void move(const Instruction& i) {
  need(i.reg);
  for (int row = 0; row < rows_of(i.reg); ++row) {
    uint8_t *memory = i.base + row * i.stride, *tile = state.tiles[i.reg][row];
    if (i.prefix == 2)
      memcpy(memory, tile, static_cast<size_t>(bytes_of(i.reg)));
    else
      memset(tile, 0, kRowBytes), memcpy(tile, memory, static_cast<size_t>(bytes_of(i.reg)));
  }
  count(i.prefix == 2 ? kStores : kLoads);
}

void need_product(const Instruction& i) {
  need(i.reg), need(i.rm), need(i.third);
  demand(i.reg != i.rm && i.reg != i.third && i.rm != i.third, "a product of one tile twice");
  demand(rows_of(i.reg) == rows_of(i.rm) && bytes_of(i.reg) == bytes_of(i.third) &&
             bytes_of(i.rm) == 4 * rows_of(i.third) && bytes_of(i.reg) % 4 == 0,
         "a product of tiles whose shapes do not fit");
}

__attribute__((noinline)) void multiply_bf16(const Instruction& i) {
  need_product(i);
  const int columns = bytes_of(i.reg) / 4, pairs = bytes_of(i.rm) / 4;
  for (int m = 0; m < rows_of(i.reg); ++m) {
    float sums[2][16] = {}, out[16];
    for (int k = 0; k < pairs; ++k) {
      uint32_t x, w[16];
      memcpy(&x, state.tiles[i.rm][m] + 4 * k, 4), memcpy(w, state.tiles[i.third][k], sizeof(w));
      for (int part = 0; part < 2; ++part) {
        const uint32_t bits = part == 0 ? x << 16 : x & 0xffff0000u;
        float factor;
        memcpy(&factor, &bits, 4);
        for (int n = 0; n < 16; ++n) {
          const uint32_t of = part == 0 ? w[n] << 16 : w[n] & 0xffff0000u;
          float weight;
          memcpy(&weight, &of, 4);
          sums[part][n] = __builtin_fmaf(factor, weight, sums[part][n]);
        }
      }
    }
    memcpy(out, state.tiles[i.reg][m], sizeof(out));
    for (int n = 0; n < columns; ++n) out[n] = out[n] + (sums[0][n] + sums[1][n]);
    memcpy(state.tiles[i.reg][m], out, sizeof(out));
  }
  count(kBf16);
}

void multiply_int8(const Instruction& i) {
  need_product(i);
  const bool x_signed = i.prefix >= 2, w_signed = i.prefix % 2 == 1;  // buud, busd 66, bsud F3, bssd F2
  const int columns = bytes_of(i.reg) / 4, words = bytes_of(i.rm) / 4;
  for (int m = 0; m < rows_of(i.reg); ++m) {
    uint32_t out[16];
    memcpy(out, state.tiles[i.reg][m], sizeof(out));
    for (int k = 0; k < words; ++k)
      for (int n = 0; n < columns; ++n)
        for (int byte = 0; byte < 4; ++byte) {
          const uint8_t x = state.tiles[i.rm][m][4 * k + byte], w = state.tiles[i.third][k][4 * n + byte];
          out[n] += static_cast<uint32_t>((x_signed ? static_cast<int8_t>(x) : x) * (w_signed ? static_cast<int8_t>(w) : w));
        }
    memcpy(state.tiles[i.reg][m], out, sizeof(out));
  }
  count(kInt8);
}

bool execute(const Instruction& i) {
  if (i.opcode == 0x49 && i.memory && i.prefix == 0 && i.reg == 0) return configure(i), true;
  if (i.opcode == 0x49 && i.memory && i.prefix == 1 && i.reg == 0) return memcpy(i.base, &state.config, 64), true;
  if (i.opcode == 0x49 && !i.memory && i.prefix == 0 && i.reg == 0 && i.rm == 0) return release(), true;
  if (i.opcode == 0x49 && !i.memory && i.prefix == 3 && i.rm == 0)
    return need(i.reg), memset(state.tiles[i.reg], 0, sizeof(state.tiles[i.reg])), true;
  if (i.opcode == 0x4b && i.memory && i.prefix != 0) return move(i), true;  // tileloadd, tileloaddt1, tilestored
  if (i.opcode == 0x5c && !i.memory && i.prefix == 2) return multiply_bf16(i), true;
  if (i.opcode == 0x5e && !i.memory) return multiply_int8(i), true;
  return false;
}

void handle(int signal, siginfo_t*, void* data) {
  auto& context = *static_cast<ucontext_t*>(data);
  greg_t* registers = context.uc_mcontext.gregs;
  Instruction i{};
  _mm_setcsr((_mm_getcsr() | 0x8040) & ~0x6000u);  // denormals are zero, round to nearest; returning restores it
  if (decode(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers, i) && execute(i)) {
    registers[REG_RIP] = reinterpret_cast<greg_t>(i.next);
    return;
  }
  sigaction(signal, &before, nullptr);  // the instruction runs again, into what handled it before
}

__attribute__((constructor)) void start() {
  struct sigaction action {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}

}  // namespace

extern "C" {
void amx_emulator_stop() { sigaction(SIGILL, &before, nullptr); }

const long* amx_emulator_counts() { return counts; }  // as `Count` names them

int amx_emulator_configured() { return state.config.palette; }  // whether tiles of this thread are in use

// csrc/cpu/amx.h: 2 usable; with AMX_EMULATOR_REFUSES set 1, refused by the system.
int minimind_amx() { return getenv("AMX_EMULATOR_REFUSES") == nullptr ? 2 : 1; }
}
