// Threads of the pool that torch itself uses.
#pragma once

namespace minimind::cpu {

// function(data, rank, size) on up to `threads` threads at once; a call from inside a parallel region gets one.
void run_parallel(int threads, void* data, void (*function)(void* data, int rank, int size));

int max_threads();  // torch.get_num_threads()

}  // namespace minimind::cpu
