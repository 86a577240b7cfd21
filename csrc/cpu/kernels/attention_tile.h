// The arithmetic of attention over a tile of tokens, in registers, for all query heads of a group.
#pragma once

#include <cstdint>

#include "cpu/kernels/numeric.h"

namespace shadowkv::SHADOWKV_ISA {

constexpr int64_t kTile = 64;  // tokens; also the stride of logits and weights
static_assert(kTile % kMaxLanes == 0);

// logits[q * kTile + t] = sum over d of queries[q * size + d] * keys[d * stride + t], for kVectors
// vectors of tokens; the keys are read once for kQueries queries.
template <int kQueries, int kVectors, typename T>
SHADOWKV_INLINE void column_tile(const float* queries, const T* keys, int64_t stride, int64_t size,
                                 float* logits) {
  FloatV sums[kQueries][kVectors] = {};
  for (int64_t d = 0; d < size; ++d) {
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
                     int64_t num_tokens, int64_t size, float* logits) {
  const auto tiles = [&]<int kVectors>(int64_t t) {
    int64_t q = 0;
    const auto heads = [&]<int kQueries>() {
      for (; q + kQueries <= num_queries; q += kQueries) {
        column_tile<kQueries, kVectors>(queries + q * size, keys + t, stride, size,
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
                                int64_t num_tokens, int64_t dim, int64_t size, float* sums) {
  FloatV sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[q][v] = load(sums + q * size + dim + v * kLanes) * decay[q];
    }
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
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

template <typename T>
void add_values(const float* weights, const float* decay, int64_t num_queries,
                const T* const* values, int64_t num_tokens, int64_t size, float* sums) {
  int64_t q = 0;
  const auto heads = [&]<int kQueries>() {
    for (; q + kQueries <= num_queries; q += kQueries) {
      const auto tile = [&]<int kVectors>(int64_t dim) {
        value_tile<kQueries, kVectors>(weights + q * kTile, decay + q, values, num_tokens, dim,
                                       size, sums + q * size);
      };
      int64_t dim = 0;
      for (; dim + 2 * kLanes <= size; dim += 2 * kLanes) tile.template operator()<2>(dim);
      for (; dim < size; dim += kLanes) tile.template operator()<1>(dim);
    }
  };
  heads.template operator()<4>();
  heads.template operator()<2>();
  heads.template operator()<1>();
}

}  // namespace shadowkv::SHADOWKV_ISA
