// Turns keys to their position. The table's rows come from the L2 cache.
#pragma once

#include "cuda/include/intrinsics.cuh"
#include "params/rotary_table.h"

namespace shadowkv::cuda {

__device__ __forceinline__ float4 quad(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

// Dimension d of `key`, turned with a row of the table.
__device__ __forceinline__ float turned(const RotaryTable& rotary, const float* row,
                                        const float* key, int d) {
  const int dims = static_cast<int>(rotary.rotary_dim), half = dims / 2;
  if (d >= dims) return key[d];
  const bool first = rotary.is_neox ? d < half : d % 2 == 0;
  const int i = rotary.is_neox ? (first ? d : d - half) : d / 2;
  const int partner = rotary.is_neox ? (first ? d + half : d - half) : d ^ 1;
  const float other = first ? -key[partner] : key[partner];
  return fmaf(other, row[half + i], key[d] * row[i]);
}

// Dimensions d to d + 3, where pairs do not straddle them and rows are aligned to 16 bytes.
__device__ __forceinline__ float4 turned_quad(const RotaryTable& rotary, const float* row,
                                              const float* key, int d) {
  const int dims = static_cast<int>(rotary.rotary_dim), half = dims / 2;
  const float4 x = quad(key + d);
  if (d >= dims) return x;
  if (!rotary.is_neox) {
    const float2 cos = *reinterpret_cast<const float2*>(row + d / 2);
    const float2 sin = *reinterpret_cast<const float2*>(row + half + d / 2);
    return {fmaf(-x.y, sin.x, x.x * cos.x), fmaf(x.x, sin.x, x.y * cos.x),
            fmaf(-x.w, sin.y, x.z * cos.y), fmaf(x.z, sin.y, x.w * cos.y)};
  }
  const bool first = d < half;
  const int i = first ? d : d - half;
  const float sign = first ? -1.0f : 1.0f;
  const float4 y = quad(key + (first ? d + half : d - half));
  const float4 cos = quad(row + i), sin = quad(row + half + i);
  return {fmaf(sign * y.x, sin.x, x.x * cos.x), fmaf(sign * y.y, sin.y, x.y * cos.y),
          fmaf(sign * y.z, sin.z, x.z * cos.z), fmaf(sign * y.w, sin.w, x.w * cos.w)};
}

// Dimensions d to d + 7 of a key in shared memory, turned and rounded to T.
template <typename T>
__device__ __forceinline__ uint4 turn(const RotaryTable& rotary, int64_t position, const float* key,
                                      int d) {
  const float* row = rotary.cos_sin + position * rotary.rotary_dim;
  float x[8];
  if (rotary.rotary_dim % 8 == 0 && reinterpret_cast<uintptr_t>(rotary.cos_sin) % 16 == 0) {
    const float4 low = turned_quad(rotary, row, key, d);
    const float4 high = turned_quad(rotary, row, key, d + 4);
    return {pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y),
            pack<T>(high.z, high.w)};
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = turned(rotary, row, key, d + i);
  return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

}  // namespace shadowkv::cuda
