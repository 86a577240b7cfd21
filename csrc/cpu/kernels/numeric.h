// Vectors of floats for every kernel: loads that widen to fp32, stores that round to nearest even,
// dot products, exp. GCC vector extensions, so one source serves each instruction set (isa.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "layout.h"

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

// In front of helpers whose vector arguments must stay in registers.
#define SHADOWKV_INLINE inline __attribute__((always_inline))
#define SHADOWKV_INLINE_LAMBDA __attribute__((always_inline))

namespace shadowkv::SHADOWKV_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// A multiple of every ISA's kLanes that divides every head size and every page's token count.
constexpr int kMaxLanes = 16;

typedef float FloatV __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntV __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintV __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Uint16V __attribute__((vector_size(kLanes * 2)));
typedef int8_t Int8V __attribute__((vector_size(kLanes)));
typedef int16_t Int16V __attribute__((vector_size(kLanes * 4)));  // 2 * kLanes elements

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SHADOWKV_INLINE FloatV splat(float x) { return x - FloatV{}; }  // x - 0 keeps -0

// kLanes elements at p, of any alignment, as fp32.
SHADOWKV_INLINE FloatV load(const float* p) {
  FloatV x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// The plain AVX-512 intrinsics have an undefined operand that GCC 12 warns of; the masked have not.
SHADOWKV_INLINE FloatV load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatV)((UintV)_mm512_maskz_cvtepu16_epi32(0xffff, x) << 16);
#else
  Uint16V x;
  std::memcpy(&x, p, sizeof x);
  return (FloatV)(__builtin_convertvector(x, UintV) << 16);
#endif
}

SHADOWKV_INLINE FloatV load(const Half* p) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_maskz_cvtph_ps(0xffff,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (FloatV)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Uint16V x;
  std::memcpy(&x, p, sizeof x);
  const UintV bits = __builtin_convertvector(x, UintV);
  // The half's exponent in a float's place is 112 too small; the product also scales subnormals.
  const FloatV magnitude = (FloatV)((bits & 0x7fff) << 13) * 0x1p112f;
  const UintV special = (UintV)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (FloatV)((UintV)magnitude | special | ((bits & 0x8000) << 16));
#endif
}

SHADOWKV_INLINE FloatV load(const int8_t* p) {
  // GCC 12 spends five instructions on converting a vector of int8 that it should spend one on.
#if defined(__AVX512F__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector((IntV)_mm512_maskz_cvtepi8_epi32(0xffff, x), FloatV);
#elif defined(__AVX2__)
  int64_t x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector((IntV)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(x)), FloatV);
#elif defined(__SSE4_1__)
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector((IntV)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(x)), FloatV);
#else
  Int8V x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, IntV), FloatV);
#endif
}

// One element as fp32.
SHADOWKV_INLINE float to_float(float x) { return x; }
SHADOWKV_INLINE float to_float(int8_t x) { return x; }
SHADOWKV_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
SHADOWKV_INLINE float to_float(Half x) {
  Half lanes[kLanes] = {x};
  return load(lanes)[0];
}

// Writes kLanes elements at p, of any alignment, rounded to nearest even.
SHADOWKV_INLINE void store(float* p, FloatV x) { std::memcpy(p, &x, sizeof x); }

SHADOWKV_INLINE void store(BFloat16* p, FloatV x) {
  const UintV bits = (UintV)x;
  const UintV rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintV nan = (UintV)(x != x);  // rounding could carry a NaN's bits over to -0
  const Uint16V y = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Uint16V);
  std::memcpy(p, &y, sizeof y);
}

SHADOWKV_INLINE void store(Half* p, FloatV x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const UintV bits = (UintV)x & 0x7fffffff;
  const UintV sign = ((UintV)x >> 16) & 0x8000;
  // Normal halves: round at bit 13 and rebias. Subnormal ones: adding 0.5 leaves them in the low
  // mantissa bits, rounded. From 65520 on: infinity.
  const UintV normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  const UintV subnormal = (UintV)((FloatV)bits + 0.5f) - 0x3f000000;
  UintV y = bits < 0x38800000 ? subnormal : normal;
  y = bits >= 0x477ff000 ? (UintV{} + 0x7c00) : y;
  y = bits > 0x7f800000 ? (UintV{} + 0x7e00) : y;
  const Uint16V z = __builtin_convertvector(y | sign, Uint16V);
  std::memcpy(p, &z, sizeof z);
#endif
}

// One value, rounded to nearest even.
SHADOWKV_INLINE BFloat16 to_bfloat16(float x) {
  BFloat16 lanes[kLanes];
  store(lanes, splat(x));
  return lanes[0];
}

SHADOWKV_INLINE float sum(FloatV x) {
  float total[kLanes];
  std::memcpy(total, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) total[i] += total[i + width];
  }
  return total[0];
}

// The larger of each pair of lanes; a NaN on either side stays.
SHADOWKV_INLINE FloatV max_or_nan(FloatV x, FloatV y) { return (y > x) | (y != y) ? y : x; }
SHADOWKV_INLINE float max_or_nan(float x, float y) { return y > x || y != y ? y : x; }

SHADOWKV_INLINE float max_or_nan(FloatV x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = max_or_nan(result, x[i]);
  return result;
}

// Nearest integer, halves to even; |x| < 2^22.
SHADOWKV_INLINE FloatV round_even(FloatV x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// e^x for x <= 0 within 2 ulp; below -87 it is 0. NaN stays.
SHADOWKV_INLINE FloatV exp_negative(FloatV x) {
  const FloatV clamped = x < -88.0f ? splat(-88.0f) : x;
  const FloatV n = round_even(clamped * 0x1.715476p0f);
  FloatV r = clamped - n * 0x1.62e4p-1f;  // ln 2 in two parts
  r -= n * 0x1.7f7d1cp-20f;
  FloatV p = splat(0x1.6c16c2p-10f);  // 1 / 6!
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // NaN: the integer means nothing, and p is NaN.
  const IntV exponent = __builtin_convertvector(n != n ? FloatV{} : n, IntV) + 127;
  return x < -87.0f ? FloatV{} : p * (FloatV)(exponent << 23);
}

// Within each 128-bit part: the low (high) halves of x and y, interleaved. V: FloatV or IntV.
template <typename V>
SHADOWKV_INLINE V interleave_low(V x, V y) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return __builtin_shufflevector(x, y, 0, 4, 1, 5);
#endif
}
template <typename V>
SHADOWKV_INLINE V interleave_high(V x, V y) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}
#if defined(__AVX512F__)
// Of each pair of neighbouring 128-bit parts, the first (the second): x's, then y's.
template <typename V>
SHADOWKV_INLINE V even_parts(V x, V y) {
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
template <typename V>
SHADOWKV_INLINE V odd_parts(V x, V y) {
  return __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif defined(__AVX2__)
template <typename V>
SHADOWKV_INLINE V even_parts(V x, V y) {
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11);
}
template <typename V>
SHADOWKV_INLINE V odd_parts(V x, V y) {
  return __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

// Lane i of the result is the sum of x[i]'s lanes. V: FloatV or IntV.
template <typename V>
SHADOWKV_INLINE V sum_each(const V (&x)[kLanes]) {
  V four[kLanes / 4];  // in each 128-bit part, that part's sums of four vectors
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const V a = x[4 * i], b = x[4 * i + 1], c = x[4 * i + 2], d = x[4 * i + 3];
    const V ac = interleave_low(a, c) + interleave_high(a, c);
    const V bd = interleave_low(b, d) + interleave_high(b, d);
    four[i] = interleave_low(ac, bd) + interleave_high(ac, bd);
  }
#if defined(__AVX512F__)
  const V ab = even_parts(four[0], four[1]) + odd_parts(four[0], four[1]);
  const V cd = even_parts(four[2], four[3]) + odd_parts(four[2], four[3]);
  return even_parts(ab, cd) + odd_parts(ab, cd);
#elif defined(__AVX2__)
  return even_parts(four[0], four[1]) + odd_parts(four[0], four[1]);
#else
  return four[0];
#endif
}

// Covers num_queries x num_rows with calls of tile.operator()<kQueries>(query, row, rows_left); a
// tile takes kQueries queries and kLanes / kQueries rows, or the rows_left that there are. Rows go
// in strips that stay in the first-level cache while the queries pass over them.
template <typename Tile>
SHADOWKV_INLINE void for_each_tile(int64_t num_queries, int64_t num_rows, const Tile& tile) {
  for (int64_t first = 0; first < num_rows; first += kLanes) {
    const int64_t end = num_rows - first < kLanes ? num_rows : first + kLanes;
    int64_t q = 0;
    const auto queries = [&]<int kQueries>() {
      for (; q + kQueries <= num_queries; q += kQueries) {
        for (int64_t r = first; r < end; r += kLanes / kQueries) {
          tile.template operator()<kQueries>(q, r, end - r);
        }
      }
    };
    queries.template operator()<4>();
    queries.template operator()<2>();
    queries.template operator()<1>();
  }
}

// out[q * out_stride + r] = totals[q * kRows + r], of the rows that are there.
template <int kQueries, typename V>
SHADOWKV_INLINE void store_tile(V totals, int64_t num_rows, float* out, int64_t out_stride) {
  constexpr int kRows = kLanes / kQueries;
  float flat[kLanes];
  store(flat, __builtin_convertvector(totals, FloatV));
  if (num_rows >= kRows) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      std::memcpy(out + q * out_stride, flat + q * kRows, sizeof(float) * kRows);
    }
  } else {
    for (int q = 0; q < kQueries; ++q) {
      for (int r = 0; r < num_rows; ++r) out[q * out_stride + r] = flat[q * kRows + r];
    }
  }
}

// to[i] = from[i * stride] as fp32, for i < size (a multiple of kMaxLanes).
template <typename T>
inline void widen(const T* from, int64_t stride, int64_t size, float* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(from + i));
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i * stride]);
  }
}

// Calls function(T{}) with the kernel type of a dtype.
template <typename Function>
SHADOWKV_INLINE void dispatch_dtype(int64_t dtype_index, const Function& function) {
  switch (static_cast<DType>(dtype_index)) {
    case DType::kFloat:
      return function(float{});
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace shadowkv::SHADOWKV_ISA
