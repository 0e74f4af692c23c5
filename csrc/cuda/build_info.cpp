// What the CUDA operators were built for, as minimind/ops/native.py reads it: "CUDA version|architectures".
extern "C" __attribute__((visibility("default"))) const char* minimind_cuda_build_info() {
  return MINIMIND_CUDA_VERSION "|" MINIMIND_CUDA_ARCHS;
}
