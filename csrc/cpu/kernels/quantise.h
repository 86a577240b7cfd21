// int8 with one fp32 scale per row: absmax / 127, halves to even; a zero row has scale 0.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace shadowkv::SHADOWKV_ISA {

// The scale of a row; NaN where the row has one.
inline float quantisation_scale(const float* row, int64_t size) {
  // Without its sign bit a float orders as an integer, NaN above all: unlike a maximum of floats,
  // that is exact in any order, so it becomes vector instructions.
  int32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<int32_t>(row[i]) & 0x7fffffff);
  }
  return std::bit_cast<float>(largest) / 127.0f;
}

// The codes of a row times a factor. What has no code (NaN, or beside an infinity) gets 0 or the
// ends.
inline void round_row(const float* __restrict row, int64_t size, float factor,
                      int8_t* __restrict codes) {
  for (int64_t i = 0; i < size; ++i) {
    float code = row[i] * factor;
    code = code == code ? code : 0.0f;
    code = code < 127.0f ? code : 127.0f;
    code = code > -127.0f ? code : -127.0f;
    // Rounds to nearest even, as nearbyintf does, which is a call for every element.
    code = (code + 0x1.8p23f) - 0x1.8p23f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(code));
  }
}

// The codes of a row at a scale.
inline void quantise_row(const float* row, int64_t size, float scale, int8_t* codes) {
  round_row(row, size, scale > 0 ? 1.0f / scale : 0.0f, codes);
}

}  // namespace shadowkv::SHADOWKV_ISA
