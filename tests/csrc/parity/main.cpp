// The CPU kernels of every form that this processor runs beside float64, and beside generic where bits must agree:
// a program without torch, which an emulator of another processor runs too. Prints what differs; its status is 1 then.
#include <thread>

#include "reference.h"

// Threads in place of OpenMP's, which csrc/cpu/threads.cpp finds by these names.
namespace {
thread_local int rank_here = 0, size_here = 1;
}
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  const auto run = [=](int rank) {
    rank_here = rank, size_here = static_cast<int>(threads);
    function(data);
    rank_here = 0, size_here = 1;
  };
  for (int rank = 1; rank < static_cast<int>(threads); ++rank) others.emplace_back(run, rank);
  run(0);
  for (std::thread& other : others) other.join();
}
int omp_get_thread_num() { return rank_here; }
int omp_get_num_threads() { return size_here; }
int omp_get_max_threads() { return 1; }
}

namespace parity {

std::vector<Form>& forms() {
  static std::vector<Form> all;
  return all;
}

}  // namespace parity

int main() {
  using namespace parity;
  products();
  integers();
  sampling();
  rotations();
  attention();
  steps();
  documents();
  for (const Form& form : usable()) std::printf("%s ", form.table->name);
  std::printf(": %ld comparisons, %d failed\n", checks(), failures());
  return failures() > 0;
}
