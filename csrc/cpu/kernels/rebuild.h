// Keys of a sealed block out of its shadow page: what fill_slots and expand_blocks share.
//
// A key is mean + scale[t] * sum over r of coefficient[t, r] * basis[r, :], turned to its position.
// The sum is one of integers, exact in int32 and in fp32. A call reads kRebuildTokens * rank bytes
// of coefficients and rank * head_size bytes of basis; the multiply-adds (kRebuildTokens * rank *
// head_size) bound it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/numeric.h"
#include "layout.h"
#include "params/rotary_table.h"

namespace shadowkv::SHADOWKV_ISA {

// Tokens rebuilt at once; every chunk size is a multiple of it.
constexpr int kRebuildTokens = 8;
// to[i] = from[i], rounded, for i < size (a multiple of kMaxLanes).
template <typename T>
inline void narrow(const float* from, int64_t size, T* to) {
  for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(from + i));
}

// Memory that is needed soon, brought to the second-level cache a few lines at a time: it arrives
// beside the computation, not before it.
class Ahead {
 public:
  void add(const void* from, int64_t size) {
    const auto* at = static_cast<const uint8_t*>(from);
    if (size > 0) ranges_[count_++] = {at, at + size};
  }
  SHADOWKV_INLINE void step() {
    if (current_ == count_) return;
    Range& range = ranges_[current_];
    for (int line = 0; line < 4; ++line) __builtin_prefetch(range.at + 64 * line, 0, 2);
    range.at += 4 * 64;
    current_ += range.at >= range.end;
  }
  void finish() {
    while (current_ < count_) step();
  }

 private:
  struct Range {
    const uint8_t *at, *end;
  };
  Range ranges_[5];
  int count_ = 0, current_ = 0;
};

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
  int32_t offsets[kRebuildTokens];
  for (int t = 0; t < kRebuildTokens; ++t) {
    offsets[t] = 0;
    for (int64_t r = 0; r < rank; ++r) offsets[t] -= 128 * coefficients[t * rank + r];
  }
  const auto part = [&]<bool kHigh>(int d, __mmask64 inside) SHADOWKV_INLINE_LAMBDA {
    __m512i sum[kRebuildTokens][2];
#pragma GCC unroll 8
    for (int t = 0; t < kRebuildTokens; ++t) sum[t][0] = sum[t][1] = _mm512_set1_epi32(offsets[t]);
    for (int64_t r = 0; r < rank; r += 4) {
      ahead.step();
      __m512i row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t place = (r + i) * kHeadSize + d;
        row[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, basis + place), flip);
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
        sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], first, codes);
        sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], second, codes);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kRebuildTokens; ++t) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const FloatV x = __builtin_convertvector((IntV)sum[t][j], FloatV);
        for (int q = 0; q < 4 && d + 16 * q < kHeadSize; ++q) {
          std::memcpy(sums + t * kHeadSize + d + 16 * q + 8 * kHigh + 4 * j,
                      reinterpret_cast<const float*>(&x) + 4 * q, 4 * sizeof(float));
        }
      }
    }
  };
  for (int d = 0; d < kHeadSize; d += kBytes) {
    const __mmask64 inside =
        kHeadSize - d < kBytes ? (1ull << (kHeadSize - d) % kBytes) - 1 : ~0ull;
    part.template operator()<false>(d, inside);
    part.template operator()<true>(d, inside);
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
        for (int i = 0; i < 4; ++i) ahead.step();
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

// keys[t][:] of kRebuildTokens tokens from `token` on, before RoPE.
template <int kHeadSize>
inline void low_rank_keys(const PageLayout& layout, const uint8_t* page, int64_t head,
                          int64_t token, Ahead& ahead, float* keys) {
  const auto* coefficients =
      reinterpret_cast<const int8_t*>(page + layout.coefficients) + token * layout.rank;
  const auto* scales = reinterpret_cast<const float*>(page + layout.coefficient_scales) + token;
  const auto* mean = reinterpret_cast<const float*>(page + layout.mean) + head * kHeadSize;
  factor_products<kHeadSize>(coefficients, head_basis(layout, page, head), layout.rank, ahead,
                             keys);
  for (int t = 0; t < kRebuildTokens; ++t) {
    float* key = keys + t * kHeadSize;
    for (int d = 0; d < kHeadSize; d += kLanes) {
      store(key + d, load(mean + d) + scales[t] * load(key + d));
    }
  }
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
      std::copy_n(exact + t * kHeadSize, kHeadSize, out + t * stride);
    }
    return;
  }
  for (int64_t first = 0; first < size; first += kRebuildTokens) {
    alignas(64) float keys[kRebuildTokens * kHeadSize];
    low_rank_keys<kHeadSize>(layout, page, head, chunk * size + first, ahead, keys);
    for (int t = 0; t < kRebuildTokens; ++t) {
      float* key = keys + t * kHeadSize;
      turn(rotary, position + first + t, key);
      narrow(key, kHeadSize, out + (first + t) * stride);
    }
  }
}

// Writes one chunk's values from its record in the host pool: T [chunk_size, kHeadSize], token rows
// `stride` elements apart.
template <typename T, int kHeadSize>
inline void fetch_chunk(const PageLayout& layout, const uint8_t* record, T* out, int64_t stride) {
  const int64_t size = layout.chunk_size;
  if (!layout.value_int8) {
    const T* values = reinterpret_cast<const T*>(record);
    for (int64_t t = 0; t < size; ++t) {
      std::copy_n(values + t * kHeadSize, kHeadSize, out + t * stride);
    }
    return;
  }
  const auto* scales = reinterpret_cast<const float*>(record);
  const auto* codes = reinterpret_cast<const int8_t*>(record + 4 * size);
  for (int64_t t = 0; t < size; ++t) {
    alignas(64) float row[kHeadSize];
    for (int d = 0; d < kHeadSize; ++d) row[d] = codes[t * kHeadSize + d] * scales[t];
    narrow(row, kHeadSize, out + t * stride);
  }
}

}  // namespace shadowkv::SHADOWKV_ISA
