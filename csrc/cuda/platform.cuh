// Where a kernel runs: on a GPU, or thread by thread on a CPU under tests/csrc/emulator (MINIMIND_EMULATE), so that its
// index arithmetic, barriers and masks are executed and checked on a machine without a GPU. Kernels are written against
// this header, numeric.cuh and warp.cuh alone; PTX is only in these three, and the emulator has a C++ body for it.
//
// All shared memory of a kernel is dynamic: what a launch asks for is then all that there is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace minimind {

// overlap: the kernel may start while the one before it in the stream still runs, where the GPU can (sm_90 and later:
// programmatic dependent launch). It then calls wait_for_previous in every block, and reads nothing of the kernels
// before it, and writes nothing, until that returns.
struct Launch {
  unsigned blocks = 1;
  int threads = 0;
  size_t shared = 0;  // bytes
  void* stream = nullptr;
  bool overlap = false;
};

}  // namespace minimind

#ifdef MINIMIND_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

namespace minimind {

constexpr size_t kSharedUnasked = 48 * 1024;  // more has to be asked for, on each device

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Until all that kernels before this one have written can be read.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel after this one may start as soon as all blocks have said so.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
  return value;
}

// Whether Launch::overlap counts: captures into graphs know it from CUDA 12.3 on.
inline bool can_overlap() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "the driver's version");
  return CUDART_VERSION >= 12030 && driver >= 12030 && attribute_of_device(cudaDevAttrComputeCapabilityMajor) >= 9;
}

template <class... Parameters>
void ask_for_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= kSharedUnasked) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "shared memory of a kernel");
}

// How many blocks of the kernel the device holds at once, but no more than `most` on each multiprocessor.
template <class... Parameters>
unsigned resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared, int most) {
  ask_for_shared(kernel, shared);
  int fit = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, shared), "occupancy of a kernel");
  fit = fit < 1 ? 1 : fit > most ? most : fit;
  return static_cast<unsigned>(fit * attribute_of_device(cudaDevAttrMultiProcessorCount));
}

// Enqueues kernel(args...).
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, Parameters... args) {
  ask_for_shared(kernel, how.shared);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (how.overlap && can_overlap()) config.attrs = &overlap, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launch of a kernel");
}

inline void fill_with_zeros(void* memory, size_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "zeros");
}

}  // namespace minimind
#endif
