// Chooses the kernels of the best instruction set that this processor has.
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
#ifdef MINIMIND_AVX512
MINIMIND_DECLARE(avx512)
#endif
#ifdef MINIMIND_AVX512_BF16
MINIMIND_DECLARE(avx512_bf16)
#endif

struct Usable {
  const Kernels* tables[5] = {};

  Usable() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef MINIMIND_AVX512_BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16::table;
#endif
#ifdef MINIMIND_AVX512
    if (avx512) tables[count++] = &avx512::table;
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
