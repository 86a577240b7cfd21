// Reductions over a warp; every lane gets the result.
#pragma once

#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {

template <typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T value, const Operation& operation) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = operation(value, shuffle_xor(value, mask));
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  return warp_reduce(value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

}  // namespace shadowkv::cuda
