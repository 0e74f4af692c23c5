// Where a kernel runs: on a GPU, or thread by thread on a CPU under tests/csrc/emulator (MINIMIND_EMULATE), so that its
// index arithmetic, barriers and masks are executed and checked on a machine without a GPU. Kernels are written against
// this header, numeric.cuh and warp.cuh alone; PTX is only in the latter two, and the emulator has a C++ body for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef MINIMIND_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

namespace minimind {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Enqueues kernel<<<grid, block, shared, stream>>>(args...); shared: bytes of dynamic shared memory.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared, void* stream, Parameters... args) {
  if (shared > 48 * 1024)  // more has to be asked for, on each device
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               "shared memory of a kernel");
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launch of a kernel");
}

}  // namespace minimind
#endif
