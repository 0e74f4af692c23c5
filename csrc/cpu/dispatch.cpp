// Chooses the kernels of the best instruction set that this processor has.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

#if defined(__x86_64__)
// Not every compiler has a name for it. AVX2 itself says that the system keeps the registers.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

struct Usable {
  const Kernels* tables[7] = {};

  Usable() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    [[maybe_unused]] const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#ifdef MINIMIND_AVX512_BF16
    if (vnni && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16::table;
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
#endif
    tables[count] = &generic::table;
  }
};

const Kernels* const* all_kernels() {
  static const Usable usable;
  return usable.tables;
}

}  // namespace minimind::cpu
