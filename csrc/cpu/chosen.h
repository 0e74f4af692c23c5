// What the operators of all files share.
#pragma once

#include "args.h"

namespace minimind::cpu {

// Which of all_kernels() runs: MINIMIND_CPU_KERNELS=avx2 takes others than the best, to test and to compare.
const Kernels& kernels();

// Memory of this thread, kept between calls; aligned to a cache line.
char* scratch(size_t bytes);

}  // namespace minimind::cpu
