// vllm_shadowkv/codes.py: int8 with one fp32 scale per row, `quantise`: absmax / 127, halves to
// even; a zero row has scale 0. And `quantise_coefficients` and `quantise_landmarks`.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/kernels/numeric.h"
#include "layout.h"

namespace shadowkv::SHADOWKV_ISA {

// The largest magnitude of a row; NaN where the row has one.
inline float largest_of(const float* row, int64_t size) {
  // Without its sign bit a float orders as an integer, NaN above all: unlike a maximum of floats,
  // that is exact in any order, so it becomes vector instructions.
  int32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<int32_t>(row[i]) & 0x7fffffff);
  }
  return std::bit_cast<float>(largest);
}

// The scale of a row; NaN where the row has one.
inline float quantisation_scale(const float* row, int64_t size) {
  return largest_of(row, size) / 127.0f;
}

// The codes of a row times a factor. What has no code (NaN, or beside an infinity) gets 0 or the
// ends.
template <int kLargest = 127>
inline void round_row(const float* __restrict row, int64_t size, float factor,
                      int8_t* __restrict codes) {
  for (int64_t i = 0; i < size; ++i) {
    float code = row[i] * factor;
    code = code == code ? code : 0.0f;
    code = code < kLargest ? code : kLargest;
    code = code > -kLargest ? code : -kLargest;
    // Rounds to nearest even, as nearbyintf does, which is a call for every element.
    code = (code + 0x1.8p23f) - 0x1.8p23f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(code));
  }
}

// The codes of a row at a scale.
inline void quantise_row(const float* row, int64_t size, float scale, int8_t* codes) {
  round_row(row, size, scale > 0 ? 1.0f / scale : 0.0f, codes);
}

// A run of nibbles: the codes of a row times a factor.
template <int kSize>
inline void round_nibbles(const float* row, float factor, uint8_t* bytes) {
  int8_t codes[kSize];
  round_row<kNibbleCode>(row, kSize, factor, codes);
  for (int i = 0; i < kSize / 2; ++i) {
    const int low = codes[i] + kNibbleOffset, high = codes[i + kSize / 2] + kNibbleOffset;
    bytes[i] = static_cast<uint8_t>(low | high << 4);
  }
}

// A token's coefficients: the leading ones, the tail's bytes, its step and the scale.
inline void quantise_coefficients(const PageLayout& layout, const float* row, int8_t* codes,
                                  uint8_t* tail_bytes, uint8_t* tail_step, BFloat16* scale) {
  const int64_t leading = layout.leading_rank, tail = layout.rank - leading;
  const float tail_size = largest_of(row + leading, tail);
  *scale = to_bfloat16(max_or_nan(largest_of(row, leading) / 127.0f,
                                  tail_size / static_cast<float>(kNibbleCode * kTailStep)));
  const float unit = to_float(*scale), inverse = unit > 0 ? 1.0f / unit : 0.0f;
  round_row(row, leading, inverse, codes);
  float step = tail_size / static_cast<float>(kNibbleCode) * inverse;
  step = step >= 1.0f ? std::nearbyintf(std::min(step, static_cast<float>(kTailStep))) : 1.0f;
  *tail_step = static_cast<uint8_t>(step);
  const float tail_inverse = unit > 0 ? 1.0f / (step * unit) : 0.0f;
  for (int64_t first = 0; first < tail; first += kTailGroup) {
    round_nibbles<kTailGroup>(row + leading + first, tail_inverse, tail_bytes + first / 2);
  }
}

// A landmark's bytes and scale: its offset from the block's mean key.
template <int kHeadSize>
inline float quantise_landmark(const float* offset, uint8_t* bytes) {
  const float scale = largest_of(offset, kHeadSize) / static_cast<float>(kNibbleCode);
  round_nibbles<kHeadSize>(offset, scale > 0 ? 1.0f / scale : 0.0f, bytes);
  return scale;
}

typedef uint8_t TailBytes __attribute__((vector_size(kTailGroup)));
typedef uint64_t TailHalves __attribute__((vector_size(kTailGroup)));

// A token's tail as int8, codes times step: products are looked up, two groups at a time.
inline void read_tail(const uint8_t* tail, int64_t size, int step, int8_t* out) {
  constexpr TailBytes kCodes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const TailBytes products = (kCodes - kNibbleOffset) * static_cast<uint8_t>(step);
  for (int64_t i = 0; i < size; i += kTailGroup) {
    const bool two = size - i >= kTailGroup;
    TailBytes both{};
    std::memcpy(&both, tail + i, two ? kTailGroup : kTailGroup / 2);
    const auto low = (TailHalves)__builtin_shuffle(products, both & 15);
    const auto high = (TailHalves)__builtin_shuffle(products, both >> 4);
    const TailHalves first = __builtin_shuffle(low, high, TailHalves{0, 2});
    const TailHalves second = __builtin_shuffle(low, high, TailHalves{1, 3});
    std::memcpy(out + 2 * i, &first, sizeof first);
    if (two) std::memcpy(out + 2 * i + kTailGroup, &second, sizeof second);
  }
}

// The coefficients of tokens [token, token + kTokens) as int8 [kTokens, rank].
template <int kTokens>
inline void read_coefficients(const PageLayout& layout, const uint8_t* page, int64_t token,
                              int8_t* out) {
  const int64_t leading = layout.leading_rank, size = layout.tail_bytes();
  const uint8_t* codes = page + layout.coefficients + token * leading;
  const uint8_t* tail = page + layout.tail_coefficients + token * size;
  for (int t = 0; t < kTokens; ++t) {
    std::memcpy(out + t * layout.rank, codes + t * leading, leading);
    read_tail(tail + t * size, size, page[layout.tail_steps + token + t],
              out + t * layout.rank + leading);
  }
}

}  // namespace shadowkv::SHADOWKV_ISA
