// The functions that GCC's `#pragma omp parallel` becomes, called by name: libgomp and LLVM's libomp both have them, and
// what answers is the runtime that torch has loaded. Linking an OpenMP runtime of our own would bring a second pool, which
// knows nothing of torch.set_num_threads and fights torch's for the processors.
#include "threads.h"

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_max_threads();
}

namespace minimind::cpu {

int max_threads() { return GOMP_parallel != nullptr && omp_get_max_threads != nullptr ? omp_get_max_threads() : 1; }

void run_parallel(int threads, void* data, void (*function)(void* data, int rank, int size)) {
  if (threads <= 1 || GOMP_parallel == nullptr) return function(data, 0, 1);
  struct Call {
    void* data;
    void (*function)(void*, int, int);
  } call{data, function};
  GOMP_parallel(
      [](void* region) {
        const Call& c = *static_cast<Call*>(region);
        c.function(c.data, omp_get_thread_num(), omp_get_num_threads());
      },
      &call, static_cast<unsigned>(threads), 0);
}

}  // namespace minimind::cpu
