// The arithmetic of attention over a tile of tokens, in registers, for all query heads of a group.
#pragma once

#include <cstdint>

#include "cpu/kernels/ahead.h"
#include "cpu/kernels/numeric.h"

namespace shadowkv::SHADOWKV_ISA {

constexpr int64_t kTile = 64;  // tokens; also the stride of logits and weights
static_assert(kTile % kMaxLanes == 0);

// A tile of dot_products: a row is read once, all sums stay in registers. Where rows are missing,
// the last one stands in for them.
template <int kQueries, typename T>
SHADOWKV_INLINE void dot_tile(const float* queries, int64_t query_stride, const T* rows,
                              int64_t num_rows, int64_t row_stride, int64_t size, float* out,
                              int64_t out_stride) {
  constexpr int kRows = kLanes / kQueries;
  FloatV sums[kLanes] = {};
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows + (r < num_rows ? r : num_rows - 1) * row_stride;
  for (int64_t i = 0; i < size; i += kLanes) {
    FloatV query[kQueries];
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * query_stride + i);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const FloatV x = load(row[r] + i);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) sums[q * kRows + r] += query[q] * x;
    }
  }
  store_tile<kQueries>(sum_each(sums), num_rows, out, out_stride);
}

// out[q * out_stride + r] = dot(queries + q * query_stride, rows + r * row_stride), in fp32.
// size: a multiple of kMaxLanes. The sum's order depends on nothing but the ISA.
template <typename T>
inline void dot_products(const float* queries, int64_t num_queries, int64_t query_stride,
                         const T* rows, int64_t num_rows, int64_t row_stride, int64_t size,
                         Ahead& ahead, float* out, int64_t out_stride) {
  for_each_tile(num_queries, num_rows, [&]<int kQueries>(int64_t q, int64_t r, int64_t rows_left) {
    ahead.step();
    dot_tile<kQueries>(queries + q * query_stride, query_stride, rows + r * row_stride, rows_left,
                       row_stride, size, out + q * out_stride + r, out_stride);
  });
}

// logits[q * kTile + t] = sum over d of queries[q * size + d] * keys[d * stride + t], for kVectors
// vectors of tokens; the keys are read once for kQueries queries.
template <int kQueries, int kVectors, typename T>
SHADOWKV_INLINE void column_tile(const float* queries, const T* keys, int64_t stride, int64_t size,
                                 Ahead& ahead, float* logits) {
  FloatV sums[kQueries][kVectors] = {};
  for (int64_t d = 0; d < size; ++d) {
    ahead.step();
    FloatV key[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) key[v] = load(keys + d * stride + v * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const FloatV query = splat(queries[q * size + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[q][v] += query * key[v];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) store(logits + q * kTile + v * kLanes, sums[q][v]);
  }
}

// The same for num_tokens tokens, a multiple of kMaxLanes, and any number of queries.
template <typename T>
void column_products(const float* queries, int64_t num_queries, const T* keys, int64_t stride,
                     int64_t num_tokens, int64_t size, Ahead& ahead, float* logits) {
  const auto tiles = [&]<int kVectors>(int64_t t) {
    int64_t q = 0;
    const auto heads = [&]<int kQueries>() {
      for (; q + kQueries <= num_queries; q += kQueries) {
        column_tile<kQueries, kVectors>(queries + q * size, keys + t, stride, size, ahead,
                                        logits + q * kTile + t);
      }
    };
    heads.template operator()<4>();
    heads.template operator()<2>();
    heads.template operator()<1>();
  };
  int64_t t = 0;
  for (; t + 2 * kLanes <= num_tokens; t += 2 * kLanes) tiles.template operator()<2>(t);
  for (; t < num_tokens; t += kLanes) tiles.template operator()<1>(t);
}

// sums[q * size + d] = decay[q] * sums[q * size + d] + sum over t of weights[q * kTile + t] *
// values[t][d], for kVectors vectors of dimensions.
template <int kQueries, int kVectors, typename T>
SHADOWKV_INLINE void value_tile(const float* weights, const float* decay, const T* const* values,
                                int64_t num_tokens, int64_t dim, int64_t size, Ahead& ahead,
                                float* sums) {
  FloatV sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[q][v] = load(sums + q * size + dim + v * kLanes) * decay[q];
    }
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    ahead.step();
    FloatV value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load(values[t] + dim + v * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const FloatV weight = splat(weights[q * kTile + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[q][v] += weight * value[v];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(sums + q * size + dim + v * kLanes, sum[q][v]);
    }
  }
}

// The same for any number of queries and dimensions; what is ahead arrives meanwhile.
template <typename T>
void add_values(const float* weights, const float* decay, int64_t num_queries,
                const T* const* values, int64_t num_tokens, int64_t size, Ahead& ahead,
                float* sums) {
  ahead.spread((num_queries + 3) / 4 * ((size + 2 * kLanes - 1) / (2 * kLanes)) * num_tokens);
  int64_t q = 0;
  const auto heads = [&]<int kQueries>() {
    for (; q + kQueries <= num_queries; q += kQueries) {
      const auto tile = [&]<int kVectors>(int64_t dim) {
        value_tile<kQueries, kVectors>(weights + q * kTile, decay + q, values, num_tokens, dim,
                                       size, ahead, sums + q * size);
      };
      int64_t dim = 0;
      for (; dim + 2 * kLanes <= size; dim += 2 * kLanes) tile.template operator()<2>(dim);
      for (; dim < size; dim += kLanes) tile.template operator()<1>(dim);
    }
  };
  heads.template operator()<4>();
  heads.template operator()<2>();
  heads.template operator()<1>();
  ahead.finish();
}

}  // namespace shadowkv::SHADOWKV_ISA
