// Chooses the kernels of the best instruction set that this processor has.
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "amx.h"
#include "args.h"

namespace minimind::cpu {

#define MINIMIND_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
MINIMIND_DECLARE(generic)
#ifdef MINIMIND_AVX2
MINIMIND_DECLARE(avx2)
#endif
#ifdef MINIMIND_AVX2_VNNI
MINIMIND_DECLARE(avx2_vnni)
#endif
#ifdef MINIMIND_AVX512
MINIMIND_DECLARE(avx512)
#endif
#ifdef MINIMIND_AVX512_VNNI
MINIMIND_DECLARE(avx512_vnni)
#endif
#ifdef MINIMIND_AVX512_BF16
MINIMIND_DECLARE(avx512_bf16)
#endif
#ifdef MINIMIND_AMX
MINIMIND_DECLARE(amx)
#endif
#ifdef MINIMIND_NEON
MINIMIND_DECLARE(neon)
#endif
#ifdef MINIMIND_NEON_DOTPROD
MINIMIND_DECLARE(neon_dotprod)
#endif
#ifdef MINIMIND_NEON_BF16
MINIMIND_DECLARE(neon_bf16)
#endif

#if defined(__x86_64__)
// Not every compiler has a name for it. AVX2 itself says that the system keeps the registers.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(__aarch64__)
struct Arm {  // NEON itself belongs to the architecture
  bool dotprod = false, i8mm = false, bf16 = false;

  Arm() {
#if defined(__linux__)  // the bits of the kernel's documentation, "ARM64 ELF hwcaps"; old headers lack the names
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    dotprod = first >> 20 & 1, i8mm = second >> 13 & 1, bf16 = second >> 14 & 1;
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
      int value = 0;
      size_t size = sizeof(value);
      return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    dotprod = has("hw.optional.arm.FEAT_DotProd"), i8mm = has("hw.optional.arm.FEAT_I8MM");
    bf16 = has("hw.optional.arm.FEAT_BF16");
#endif
  }
};
#endif

struct Usable {
  const Kernels* tables[8] = {};

  Usable() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    [[maybe_unused]] const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    [[maybe_unused]] const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#ifdef MINIMIND_AMX
    if (bf16 && amx_state() == Amx::usable) tables[count++] = &amx::table;
#endif
#ifdef MINIMIND_AVX512_BF16
    if (bf16) tables[count++] = &avx512_bf16::table;
#endif
#ifdef MINIMIND_AVX512_VNNI
    if (vnni) tables[count++] = &avx512_vnni::table;
#endif
#ifdef MINIMIND_AVX512
    if (avx512) tables[count++] = &avx512::table;
#endif
#ifdef MINIMIND_AVX2_VNNI
    if (avx2 && has_avx_vnni()) tables[count++] = &avx2_vnni::table;
#endif
#ifdef MINIMIND_AVX2
    if (avx2) tables[count++] = &avx2::table;
#endif
#elif defined(__aarch64__)
    [[maybe_unused]] const Arm arm;
#ifdef MINIMIND_NEON_BF16
    if (arm.dotprod && arm.i8mm && arm.bf16) tables[count++] = &neon_bf16::table;
#endif
#ifdef MINIMIND_NEON_DOTPROD
    if (arm.dotprod) tables[count++] = &neon_dotprod::table;
#endif
#ifdef MINIMIND_NEON
    tables[count++] = &neon::table;
#endif
#endif
    tables[count] = &generic::table;
  }
};

const Kernels* const* all_kernels() {
  static const Usable usable;
  return usable.tables;
}

}  // namespace minimind::cpu
