// vllm_shadowkv/codes.py: int8 with one fp32 scale per row, `quantise`: absmax / 127, halves to
// even; a zero row has scale 0. And `quantise_coefficients` and `quantise_landmarks`.
#pragma once

#include "cuda/include/warp.cuh"
#include "layout.h"

namespace shadowkv::cuda {

// The code of a value; what has none (NaN, or beside an infinity) gets 0 or the ends.
template <int kLargest = 127>
__device__ __forceinline__ int8_t quantise(float value, float inverse) {
  float code = value * inverse;
  code = code == code ? code : 0.0f;
  return static_cast<int8_t>(round_even(fminf(fmaxf(code, -kLargest), kLargest)));
}

// The byte of two values of a run of nibbles.
__device__ __forceinline__ uint8_t quantise_nibbles(float low, float high, float inverse) {
  const int low_code = quantise<kNibbleCode>(low, inverse) + kNibbleOffset;
  const int high_code = quantise<kNibbleCode>(high, inverse) + kNibbleOffset;
  return static_cast<uint8_t>(low_code | high_code << 4);
}

// The largest magnitude of a row, to every lane of a warp; NaN where the row has one.
template <typename Value>
__device__ __forceinline__ float largest_of(int size, const Value& value) {
  // Without its sign bit a float orders as an integer, NaN above all.
  uint32_t largest = 0;
  for (int d = threadIdx.x % kWarp; d < size; d += kWarp) {
    const uint32_t bits = float_bits(value(d)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return bits_float(warp_max(largest));
}

// A warp quantises a row of fp32 values, `value(d)`. Returns the scale (NaN where the row has one)
// to every lane.
template <int kSize, typename Value>
__device__ __forceinline__ float quantise_row(const Value& value, int8_t* codes) {
  const float scale = largest_of(kSize, value) / 127.0f;
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int d = threadIdx.x % kWarp; d < kSize; d += kWarp) codes[d] = quantise(value(d), inverse);
  return scale;
}

// A warp writes a landmark's bytes, of its offset from the block's mean key, `value(d)`. Returns
// the scale (NaN where the offset has one) to every lane.
template <int kHeadSize, typename Value>
__device__ __forceinline__ float quantise_landmark(const Value& value, uint8_t* bytes) {
  const float scale = largest_of(kHeadSize, value) / static_cast<float>(kNibbleCode);
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  constexpr int kHalf = kHeadSize / 2;
  for (int i = threadIdx.x % kWarp; i < kHalf; i += kWarp) {
    bytes[i] = quantise_nibbles(value(i), value(i + kHalf), inverse);
  }
  return scale;
}

// A warp writes one token's coefficients to a page.
__device__ __forceinline__ void quantise_coefficients(const PageLayout& layout, const float* row,
                                                      int token, uint8_t* page) {
  const int lane = threadIdx.x % kWarp;
  const int leading = static_cast<int>(layout.leading_rank);
  const int tail = static_cast<int>(layout.rank) - leading;
  const float head_size = largest_of(leading, [&](int d) { return row[d]; });
  const float tail_size = largest_of(tail, [&](int d) { return row[leading + d]; });
  const BFloat16 scale = from_float<BFloat16>(
      max_or_nan(head_size / 127.0f, tail_size / static_cast<float>(kNibbleCode * kTailStep)));
  const float unit = to_float(scale), inverse = unit > 0 ? 1.0f / unit : 0.0f;
  float step = tail_size / static_cast<float>(kNibbleCode) * inverse;
  step = step >= 1.0f ? round_even(fminf(step, kTailStep)) : 1.0f;
  const float tail_inverse = unit > 0 ? 1.0f / (step * unit) : 0.0f;

  auto* codes = reinterpret_cast<int8_t*>(page + layout.coefficients) + token * leading;
  for (int d = lane; d < leading; d += kWarp) codes[d] = quantise(row[d], inverse);
  uint8_t* bytes = page + layout.tail_coefficients + token * (tail / 2);
  constexpr int kHalf = kTailGroup / 2;
  for (int i = lane; i < tail / 2; i += kWarp) {
    const float* pair = row + leading + i / kHalf * kTailGroup + i % kHalf;
    bytes[i] = quantise_nibbles(pair[0], pair[kHalf], tail_inverse);
  }
  if (lane == 0) {
    page[layout.tail_steps + token] = static_cast<uint8_t>(step);
    reinterpret_cast<BFloat16*>(page + layout.coefficient_scales)[token] = scale;
  }
}

}  // namespace shadowkv::cuda
