// int8 with one fp32 scale per row, as vllm_shadowkv/reference.py's `quantise`: absmax / 127,
// halves to even; a zero row has scale 0.
#pragma once

#include "cuda/include/warp.cuh"

namespace shadowkv::cuda {

// The code of a value; what has none (NaN, or beside an infinity) gets 0 or the ends.
__device__ __forceinline__ int8_t quantise(float value, float inverse) {
  float code = value * inverse;
  code = code == code ? code : 0.0f;
  return static_cast<int8_t>(round_even(fminf(fmaxf(code, -127.0f), 127.0f)));
}

// A warp quantises a row: `value(d)` for d in [0, size) is fp32, `code(d)` where its code goes.
// Returns the scale (NaN where the row has one) to every lane.
template <typename Value, typename Code>
__device__ __forceinline__ float quantise_row(int size, const Value& value, const Code& code) {
  const int lane = threadIdx.x % kWarp;
  // Without its sign bit a float orders as an integer, NaN above all.
  uint32_t largest = 0;
  for (int d = lane; d < size; d += kWarp) {
    const uint32_t bits = float_bits(value(d)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float scale = bits_float(warp_max(largest)) / 127.0f;
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int d = lane; d < size; d += kWarp) *code(d) = quantise(value(d), inverse);
  return scale;
}

// The same for a row whose codes are adjacent.
template <int kSize, typename Value>
__device__ __forceinline__ float quantise_row(const Value& value, int8_t* codes) {
  return quantise_row(kSize, value, [&](int d) { return codes + d; });
}

}  // namespace shadowkv::cuda
