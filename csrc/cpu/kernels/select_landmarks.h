// Products of query heads with landmarks, in integers. A landmark's offset from its block's mean
// key is nibbles, so a query head is rounded to int8 with one scale, as a row of values is: 2^-8 of
// its largest element, where an offset has 2^-4. The mean key meets the query head as it is.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernels/numeric.h"
#include "cpu/kernels/quantise.h"

namespace shadowkv::SHADOWKV_ISA {

constexpr int kVectorBytes = 4 * kLanes;

typedef uint8_t NibblesV __attribute__((vector_size(kVectorBytes)));  // a nibble in each byte
typedef int8_t CodesV __attribute__((vector_size(kVectorBytes)));

// Sums of products; each lane's are those of its own bytes. A product of a nibble is at most 15 *
// 127, so that a lane of int16 holds the 16 of kMaxHeadSize.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef Int16V ProductsV;
constexpr int kMaxHeadSize = 256;
static_assert(2 * kMaxHeadSize / kVectorBytes * 15 * 127 <= INT16_MAX);
#else
typedef IntV ProductsV;
#endif

SHADOWKV_INLINE ProductsV add_products(ProductsV sum, NibblesV x, CodesV y) {
#if defined(__AVX512VNNI__)
  return (IntV)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return sum + (Int16V)_mm256_maddubs_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE4_1__)
  const __m128i pairs = _mm_maddubs_epi16((__m128i)x, (__m128i)y);
  return sum + (IntV)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
#else
  const IntV a = (IntV)x, b = (IntV)y;  // four elements in each lane
  for (int shift = 0; shift < 32; shift += 8) {
    sum += ((a >> shift) & 15) * ((b << (24 - shift)) >> 24);
  }
  return sum;
#endif
}

SHADOWKV_INLINE IntV totals(ProductsV sum) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  return (IntV)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#else
  return sum;
#endif
}

// `kSize` bytes at p, at most kVectorBytes, and zeros.
template <int kSize>
SHADOWKV_INLINE NibblesV load_bytes(const uint8_t* p) {
  NibblesV x{};
#if defined(__AVX512BW__)
  x = (NibblesV)_mm512_maskz_loadu_epi8(~0ull >> (64 - kSize), p);
#else
  std::memcpy(&x, p, kSize);
#endif
  return x;
}

// The query heads of a group.
template <int kHeadSize>
struct QueryHeads {
  static constexpr int kBytes = kHeadSize / 2;  // of a landmark
  static constexpr int kStride = (kBytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;

  std::vector<float> values;           // [group, kHeadSize]
  std::vector<float> scales;           // [group]; NaN where a head is not finite
  std::vector<int8_t> codes;           // [group, 2, kStride]: of the halves of a head, and zeros
  std::vector<float> offset_products;  // [group]: what kNibbleOffset in every nibble adds

  template <typename T>
  void read(const T* rows, int64_t group, int64_t row_stride) {
    values.resize(group * kHeadSize);
    scales.resize(group);
    offset_products.resize(group);
    codes.assign(group * 2 * kStride, 0);
    for (int64_t g = 0; g < group; ++g) {
      float* row = values.data() + g * kHeadSize;
      widen(rows + g * row_stride, 1, kHeadSize, row);
      scales[g] = quantisation_scale(row, kHeadSize);
      int8_t rounded[kHeadSize];
      quantise_row(row, kHeadSize, scales[g], rounded);
      if (!(scales[g] < kInfinity)) scales[g] = std::nanf("");
      for (int half = 0; half < 2; ++half) {
        std::memcpy(codes.data() + (2 * g + half) * kStride, rounded + half * kBytes, kBytes);
      }
      int32_t sum = 0;
      for (int i = 0; i < kHeadSize; ++i) sum += rounded[i];
      offset_products[g] = static_cast<float>(sum * kNibbleOffset);
    }
  }

  // One tile of for_each_tile: `num_rows` landmarks at `rows`, and the codes of kQueries heads.
  template <int kQueries>
  static SHADOWKV_INLINE void multiply(const int8_t* of_queries, const uint8_t* rows,
                                       int64_t num_rows, float* out, int64_t out_stride) {
    constexpr int kRows = kLanes / kQueries;
    IntV each[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* row = rows + (r < num_rows ? r : num_rows - 1) * kBytes;
      ProductsV sums[kQueries] = {};
      // Another pointer in the compiler's eyes: else it keeps the codes of all query heads in
      // registers from row to row, and spills the sums.
      asm("" : "+r"(of_queries));
      const auto add = [&]<int kSize>(int i) SHADOWKV_INLINE_LAMBDA {
        const NibblesV bytes = load_bytes<kSize>(row + i);
        const NibblesV low = bytes & 15;
        const NibblesV high = (NibblesV)((Uint16Pairs)bytes >> 4) & 15;
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          const int8_t* query = of_queries + q * 2 * kStride + i;
          CodesV first, second;
          std::memcpy(&first, query, sizeof first);
          std::memcpy(&second, query + kStride, sizeof second);
          sums[q] = add_products(add_products(sums[q], low, first), high, second);
        }
      };
#pragma GCC unroll 8
      for (int i = 0; i + kVectorBytes <= kBytes; i += kVectorBytes) {
        add.template operator()<kVectorBytes>(i);
      }
      constexpr int kLeft = kBytes % kVectorBytes;
      if constexpr (kLeft != 0) add.template operator()<kLeft>(kBytes - kLeft);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) each[q * kRows + r] = totals(sums[q]);
    }
    store_tile<kQueries>(sum_each(each), num_rows, out, out_stride);
  }

 private:
  typedef uint16_t Uint16Pairs
      __attribute__((vector_size(kVectorBytes)));  // shifts of bytes cost more
};

// The product of a query head and a mean key.
template <int kHeadSize>
SHADOWKV_INLINE float multiply_mean(const float* query, const float* mean) {
  FloatV total{};
  for (int i = 0; i < kHeadSize; i += kLanes) total += load(query + i) * load(mean + i);
  return sum(total);
}

}  // namespace shadowkv::SHADOWKV_ISA
