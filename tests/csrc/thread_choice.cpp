// Steps with a pretended clock: what two threads and one take in each phase -> how they were chosen. A second argument is
// the number of steps before the first trial.
#include "../../csrc/cpu/thread_choice.h"

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  using minimind::cpu::ThreadChoice;
  ThreadChoice choice(std::atoi(arguments[1]), count > 2 ? std::atoi(arguments[2]) : ThreadChoice::kFirst);
  struct Phase {
    int steps;
    double one, all;
  } const phases[] = {{2000, 1.6, 1.0}, {20000, 1.0, 100.0}, {20000, 1.6, 1.0}};
  for (const Phase& phase : phases) {
    double total = 0;
    int alone = 0, first = -1;
    for (int step = 0; step < phase.steps; ++step) {
      const int threads = choice.threads();
      if (threads == 1 && first < 0) first = step;
      alone += threads == 1;
      const double seconds = threads == 1 ? phase.one : phase.all;
      total += seconds;
      choice.took(seconds);
    }
    std::printf("%d %d %.3f\n", alone, first, total / phase.steps);
  }
}
