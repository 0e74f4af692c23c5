// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a random number is a function of
// a key and a counter, so it is the same whatever the batch, the device or the order of the draws.
#pragma once

#include "platform.cuh"

namespace minimind {

// Uniform in [0, 1), a multiple of 2^-24: the top bits of the first word for key `seed` and counter (offset, 0, 0).
__host__ __device__ __forceinline__ float philox_uniform(uint64_t seed, uint64_t offset) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t counter[4] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter[0], second = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return static_cast<float>(counter[0] >> 8) * 0x1p-24f;
}

}  // namespace minimind
