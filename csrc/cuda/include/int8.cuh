// Arithmetic on four int8 in a register.
#pragma once

#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {

// a - b of four bytes, each modulo 256.
__device__ __forceinline__ uint32_t subtract_bytes(uint32_t a, uint32_t b) {
  constexpr uint32_t kTops = 0x80808080u;
  return ((a | kTops) - (b & ~kTops)) ^ ((a ^ ~b) & kTops);
}

}  // namespace shadowkv::cuda
