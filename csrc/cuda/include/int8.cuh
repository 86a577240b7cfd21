// From int8 to the operands of tensor cores, exactly and without a conversion instruction.
#pragma once

#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {

// Four int8, the first in the lowest byte, as two pairs of T.
template <typename T>
__device__ __forceinline__ uint2 widen_int8(uint32_t bytes);

// 0x6400 | u is 1024 + u for a byte u; u = x + 128 is x with its sign bit inverted.
template <>
__device__ __forceinline__ uint2 widen_int8<Half>(uint32_t bytes) {
  bytes ^= 0x80808080u;
  const uint32_t low = pick_bytes(bytes, 0x64646464u, 0x4140);
  const uint32_t high = pick_bytes(bytes, 0x64646464u, 0x4342);
  constexpr uint32_t kOffset = 0x64806480u;  // 1024 + 128
  return {subtract_pairs<Half>(low, kOffset), subtract_pairs<Half>(high, kOffset)};
}

// 0x4300 | u is 128 + u for u < 128, and 0x4380 is 256: x = (128 + low seven bits) - (128 or 256).
template <>
__device__ __forceinline__ uint2 widen_int8<BFloat16>(uint32_t bytes) {
  const auto widen = [](uint32_t pair) {
    return subtract_pairs<BFloat16>(pair & 0xff7fff7fu, pair & 0xff80ff80u);
  };
  return {widen(pick_bytes(bytes, 0x43434343u, 0x4140)),
          widen(pick_bytes(bytes, 0x43434343u, 0x4342))};
}

// a - b of four bytes, each modulo 256.
__device__ __forceinline__ uint32_t subtract_bytes(uint32_t a, uint32_t b) {
  constexpr uint32_t kTops = 0x80808080u;
  return ((a | kTops) - (b & ~kTops)) ^ ((a ^ ~b) & kTops);
}

}  // namespace shadowkv::cuda
