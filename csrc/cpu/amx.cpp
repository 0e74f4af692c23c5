// Processor and system must both know AMX's registers, and Linux (5.16 and later) lets a process use them only after it has
// asked, since they make its signal frames 8 KiB larger (Linux's Documentation/arch/x86/xstate.rst).
#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minimind::cpu {

#if defined(__x86_64__) && defined(__linux__)
namespace {

constexpr int kTileConfig = 17, kTileData = 18;  // parts of the extended state
constexpr long kRequestPermission = 0x1023;      // ARCH_REQ_XCOMP_PERM; old headers lack the name

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;  // OSXSAVE, which xgetbv needs
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> kTileConfig & low >> kTileData & 1) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return d >> 22 & d >> 24 & d >> 25 & 1;  // AMX-BF16, AMX-TILE, AMX-INT8
}

}  // namespace
#endif

extern "C" int minimind_amx() {
#if defined(__x86_64__) && defined(__linux__)
  if (!has_amx()) return static_cast<int>(Amx::absent);
  const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return static_cast<int>(granted ? Amx::usable : Amx::refused);
#else
  return static_cast<int>(Amx::absent);
#endif
}

}  // namespace minimind::cpu
