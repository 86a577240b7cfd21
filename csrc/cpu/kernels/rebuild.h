// Keys of a sealed block out of its shadow page: what fill_slots and expand_blocks share.
//
// A key is mean + scale[t] * sum over r of coefficient[t, r] * basis[r, :], turned to its position.
// The sum is one of integers, exact in int32 and in fp32. A call reads kRebuildTokens * (rank +
// leading_rank) / 2 bytes of coefficients and rank * head_size bytes of basis; the multiply-adds
// (kRebuildTokens * rank * head_size) bound it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernels/ahead.h"
#include "cpu/kernels/numeric.h"
#include "cpu/kernels/quantise.h"
#include "layout.h"
#include "params/rotary_table.h"

namespace shadowkv::SHADOWKV_ISA {

// Tokens rebuilt at once; every chunk size is a multiple of it.
constexpr int kRebuildTokens = 8;

// One token's row; a call of memcpy would cost more.
template <int kHeadSize, typename T>
inline void copy_row(const T* from, T* to) {
  for (int d = 0; d < kHeadSize; d += kMaxLanes) {
    std::memcpy(to + d, from + d, kMaxLanes * sizeof(T));
  }
}

#if defined(__AVX512VNNI__)

// sums[t][:] of kRebuildTokens tokens = coefficients[t, :] * basis, by instructions that add four
// products of bytes to a lane.
//
// One operand of these is unsigned: it is basis + 128, so 128 times a token's coefficients is taken
// off beforehand. Four rows are interleaved, byte by byte, so that a lane's four bytes are one
// dimension; in each 128-bit part the low bytes first, then the high ones: 16 sums fit the
// registers.
template <int kHeadSize>
inline void factor_products(const int8_t* coefficients, const int8_t* basis, int64_t rank,
                            Ahead& ahead, float* sums) {
  constexpr int kBytes = 64;
  const __m512i flip = _mm512_set1_epi8(-128);
  ahead.spread((rank + 3) / 4 * 2 * ((kHeadSize + kBytes - 1) / kBytes));
  const auto bytes = [](const int8_t* from, int64_t count) SHADOWKV_INLINE_LAMBDA {
    return count < kBytes ? _mm512_maskz_loadu_epi8((1ull << count) - 1, from)
                          : _mm512_loadu_si512(from);
  };
  IntV totals[kLanes] = {};
#pragma GCC unroll 8
  for (int t = 0; t < kRebuildTokens; ++t) {
    for (int64_t r = 0; r < rank; r += kBytes) {
      const __m512i codes = bytes(coefficients + t * rank + r, rank - r);
      totals[t] = (IntV)_mm512_dpbusd_epi32((__m512i)totals[t], _mm512_set1_epi8(1), codes);
    }
  }
  const IntV offsets = -128 * sum_each(totals);
  // Of 64 dimensions: i has dimensions 4 * i to 4 * i + 3 of each sixteen.
  alignas(64) float fours[kRebuildTokens][4][kLanes];
  const auto part = [&]<bool kHigh>(int d) SHADOWKV_INLINE_LAMBDA {
    IntV sum[kRebuildTokens][2];
#pragma GCC unroll 8
    for (int t = 0; t < kRebuildTokens; ++t) sum[t][0] = sum[t][1] = offsets[t] - IntV{};
    for (int64_t r = 0; r < rank; r += 4) {
      ahead.step();
      __m512i row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        row[i] = _mm512_xor_si512(bytes(basis + (r + i) * kHeadSize + d, kHeadSize - d), flip);
      }
      const auto interleave = [](__m512i x, __m512i y) SHADOWKV_INLINE_LAMBDA {
        return kHigh ? _mm512_maskz_unpackhi_epi8(~0ull, x, y)
                     : _mm512_maskz_unpacklo_epi8(~0ull, x, y);
      };
      const __m512i low = interleave(row[0], row[1]), high = interleave(row[2], row[3]);
      const __m512i first = _mm512_maskz_unpacklo_epi16(~0u, low, high);
      const __m512i second = _mm512_maskz_unpackhi_epi16(~0u, low, high);
#pragma GCC unroll 8
      for (int t = 0; t < kRebuildTokens; ++t) {
        int32_t four;
        std::memcpy(&four, coefficients + t * rank + r, sizeof four);
        const __m512i codes = _mm512_set1_epi32(four);
        sum[t][0] = (IntV)_mm512_dpbusd_epi32((__m512i)sum[t][0], first, codes);
        sum[t][1] = (IntV)_mm512_dpbusd_epi32((__m512i)sum[t][1], second, codes);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kRebuildTokens; ++t) {
      store(fours[t][2 * kHigh], __builtin_convertvector(sum[t][0], FloatV));
      store(fours[t][2 * kHigh + 1], __builtin_convertvector(sum[t][1], FloatV));
    }
  };
#pragma GCC unroll 4
  for (int d = 0; d < kHeadSize; d += kBytes) {
    part.template operator()<false>(d);
    part.template operator()<true>(d);
    for (int t = 0; t < kRebuildTokens; ++t) {
      const auto& four = fours[t];
      const FloatV even[] = {even_parts(load(four[0]), load(four[1])),
                             even_parts(load(four[2]), load(four[3]))};
      const FloatV odd[] = {odd_parts(load(four[0]), load(four[1])),
                            odd_parts(load(four[2]), load(four[3]))};
      float* to = sums + t * kHeadSize + d;
      store(to, even_parts(even[0], even[1]));
      if (d + 16 < kHeadSize) store(to + 16, even_parts(odd[0], odd[1]));
      if (d + 32 < kHeadSize) store(to + 32, odd_parts(even[0], even[1]));
      if (d + 48 < kHeadSize) store(to + 48, odd_parts(odd[0], odd[1]));
    }
  }
}

#else

// Weights of so many basis rows are made at once; they and the sums stay in the L1 cache.
constexpr int kRebuildPanel = 64;

// sums[t][0 : kVectors * kLanes] += weights[t][r] * basis[r][...] over `rows` rows, for kTokens
// tokens. kTokens * kVectors sums are in registers.
template <int kTokens, int kVectors, int kHeadSize>
inline void add_basis_rows(const int8_t* basis, const float (*weights)[kRebuildPanel], int64_t rows,
                           float* sums) {
  FloatV sum[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) sum[t][v] = load(sums + t * kHeadSize + v * kLanes);
  }
  for (int64_t r = 0; r < rows; ++r, basis += kHeadSize) {
    FloatV row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(basis + v * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) sum[t][v] += weights[t][r] * row[v];
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) store(sums + t * kHeadSize + v * kLanes, sum[t][v]);
  }
}

// sums[t][:] of kRebuildTokens tokens = coefficients[t, :] * basis.
template <int kHeadSize>
inline void factor_products(const int8_t* coefficients, const int8_t* basis, int64_t rank,
                            Ahead& ahead, float* sums) {
  // 8 registers of sums hide the latency of an add; AVX-512 has twice the registers.
  constexpr int kTile = kLanes >= 16 ? 8 : 4;
  const int64_t panels = (rank + kRebuildPanel - 1) / kRebuildPanel;
  ahead.spread(panels * (kHeadSize / (2 * kLanes)) * (kRebuildTokens / kTile));
  std::fill_n(sums, kRebuildTokens * kHeadSize, 0.0f);
  float weights[kRebuildTokens][kRebuildPanel];
  for (int64_t first = 0; first < rank; first += kRebuildPanel) {
    const int64_t rows = std::min<int64_t>(kRebuildPanel, rank - first);
    for (int t = 0; t < kRebuildTokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) weights[t][r] = coefficients[t * rank + first + r];
    }
    const int8_t* panel = basis + first * kHeadSize;
    for (int d = 0; d < kHeadSize / (2 * kLanes) * (2 * kLanes); d += 2 * kLanes) {
      for (int t = 0; t < kRebuildTokens; t += kTile) {
        ahead.step();
        add_basis_rows<kTile, 2, kHeadSize>(panel + d, weights + t, rows, sums + t * kHeadSize + d);
      }
    }
    if constexpr (kHeadSize % (2 * kLanes) != 0) {
      constexpr int d = kHeadSize - kLanes;
      for (int t = 0; t < kRebuildTokens; t += kTile) {
        add_basis_rows<kTile, 1, kHeadSize>(panel + d, weights + t, rows, sums + t * kHeadSize + d);
      }
    }
  }
}

#endif

// One head's basis: int8 [rank, head_size].
inline const int8_t* head_basis(const PageLayout& layout, const uint8_t* page, int64_t head) {
  return reinterpret_cast<const int8_t*>(page + layout.basis) +
         head * layout.rank * layout.head_size;
}

// Turns one key to its position.
inline void turn(const RotaryTable& rotary, int64_t position, float* __restrict key) {
  const int64_t half = rotary.rotary_dim / 2;
  const float* __restrict cos = rotary.cos_sin + position * rotary.rotary_dim;
  const float* __restrict sin = cos + half;
  if (rotary.is_neox) {
    float* __restrict first = key;
    float* __restrict second = key + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = first[i];
      const float b = second[i];
      first[i] = a * cos[i] - b * sin[i];
      second[i] = b * cos[i] + a * sin[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float a = key[2 * i];
      const float b = key[2 * i + 1];
      key[2 * i] = a * cos[i] - b * sin[i];
      key[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }
}

// out[:] = one key: mean + scale * sums, turned to its position.
template <typename T, int kHeadSize>
inline void finish_key(const float* mean, float scale, float* sums, const RotaryTable& rotary,
                       int64_t position, T* out) {
  const auto key = [&](int64_t d)
                       SHADOWKV_INLINE_LAMBDA { return load(mean + d) + scale * load(sums + d); };
  const int64_t half = rotary.rotary_dim / 2;
  if (rotary.is_neox && half % kLanes == 0) {  // as most models have it: all in registers
    const float* cos = rotary.cos_sin + position * rotary.rotary_dim;
    const float* sin = cos + half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const FloatV a = key(i), b = key(half + i), c = load(cos + i), s = load(sin + i);
      store(out + i, a * c - b * s);
      store(out + half + i, b * c + a * s);
    }
    for (int64_t d = 2 * half; d < kHeadSize; d += kLanes) store(out + d, key(d));
    return;
  }
  for (int64_t d = 0; d < kHeadSize; d += kLanes) store(sums + d, key(d));
  turn(rotary, position, sums);
  for (int64_t d = 0; d < kHeadSize; d += kLanes) store(out + d, load(sums + d));
}

// Keys of kRebuildTokens tokens from `token` of the block on, the first of them at `position`.
template <typename T, int kHeadSize>
inline void low_rank_keys(const PageLayout& layout, const uint8_t* page, int64_t head,
                          int64_t token, int64_t position, const RotaryTable& rotary, Ahead& ahead,
                          T* out, int64_t stride) {
  thread_local std::vector<int8_t> coefficients;
  coefficients.resize(kRebuildTokens * layout.rank);
  read_coefficients<kRebuildTokens>(layout, page, token, coefficients.data());
  const auto* scales = reinterpret_cast<const BFloat16*>(page + layout.coefficient_scales) + token;
  const auto* mean = reinterpret_cast<const float*>(page + layout.mean) + head * kHeadSize;
  alignas(64) float sums[kRebuildTokens * kHeadSize];
  factor_products<kHeadSize>(coefficients.data(), head_basis(layout, page, head), layout.rank,
                             ahead, sums);
  for (int t = 0; t < kRebuildTokens; ++t) {
    finish_key<T, kHeadSize>(mean, to_float(scales[t]), sums + t * kHeadSize, rotary, position + t,
                             out + t * stride);
  }
}

// The outlier of this head that chunk `chunk` of the block is, or -1.
inline int64_t outlier_of(const PageLayout& layout, const uint8_t* page, int64_t head,
                          int64_t chunk) {
  const auto* ids =
      reinterpret_cast<const int32_t*>(page + layout.outlier_ids) + head * layout.num_outliers;
  for (int64_t i = 0; i < layout.num_outliers; ++i) {
    if (ids[i] == chunk) return i;
  }
  return -1;
}

// Writes one chunk's keys, `position` its first token's: T [chunk_size, kHeadSize], token rows
// `stride` elements apart. Keys that a page holds exactly are copied.
template <typename T, int kHeadSize>
inline void rebuild_chunk(const PageLayout& layout, const uint8_t* page, int64_t head,
                          int64_t chunk, int64_t position, const RotaryTable& rotary, Ahead& ahead,
                          T* out, int64_t stride) {
  const int64_t size = layout.chunk_size;
  const int64_t outlier = layout.rank == 0 ? -1 : outlier_of(layout, page, head, chunk);
  if (layout.rank == 0 || outlier >= 0) {
    const T* exact = layout.rank == 0
                         ? reinterpret_cast<const T*>(page + layout.exact_keys) +
                               (head * layout.chunks() + chunk) * size * kHeadSize
                         : reinterpret_cast<const T*>(page + layout.outlier_keys) +
                               (head * layout.num_outliers + outlier) * size * kHeadSize;
    for (int64_t t = 0; t < size; ++t) {
      copy_row<kHeadSize>(exact + t * kHeadSize, out + t * stride);
    }
    return;
  }
  for (int64_t first = 0; first < size; first += kRebuildTokens) {
    low_rank_keys<T, kHeadSize>(layout, page, head, chunk * size + first, position + first, rotary,
                                ahead, out + first * stride, stride);
  }
}

// A chunk's values in its block's row of the host pool.
inline const uint8_t* value_record(const PageLayout& layout, const uint8_t* row, int64_t head,
                                   int64_t chunk) {
  return row + (head * layout.chunks() + chunk) * layout.value_record_bytes;
}

// Their scales, where they are int8.
inline const float* value_scales(const PageLayout& layout, const uint8_t* row, int64_t head,
                                 int64_t chunk) {
  return reinterpret_cast<const float*>(row + layout.value_scales()) + head * layout.block_size +
         chunk * layout.chunk_size;
}

// Writes one chunk's values from its block's row of the host pool: T [chunk_size, kHeadSize], token
// rows `stride` elements apart.
template <typename T, int kHeadSize>
inline void fetch_chunk(const PageLayout& layout, const uint8_t* row, int64_t head, int64_t chunk,
                        T* out, int64_t stride) {
  const int64_t size = layout.chunk_size;
  const uint8_t* record = value_record(layout, row, head, chunk);
  if (!layout.value_int8) {
    const T* values = reinterpret_cast<const T*>(record);
    for (int64_t t = 0; t < size; ++t) {
      copy_row<kHeadSize>(values + t * kHeadSize, out + t * stride);
    }
    return;
  }
  const float* scales = value_scales(layout, row, head, chunk);
  const auto* codes = reinterpret_cast<const int8_t*>(record);
  for (int64_t t = 0; t < size; ++t) {
    for (int d = 0; d < kHeadSize; d += kLanes) {
      store(out + t * stride + d, load(codes + t * kHeadSize + d) * scales[t]);
    }
  }
}

}  // namespace shadowkv::SHADOWKV_ISA
