// The rest of select_chunks: the usable chunks of a row and KV head that are not picked. A chunk's
// landmark is its key, the mean of its block's values its value, and it counts as chunk_size
// tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels/numeric.h"
#include "params/select_chunks.h"

namespace shadowkv::SHADOWKV_ISA {

template <typename T>
inline const T* section(const SelectChunksParams& p, int64_t block, int64_t offset, int64_t index) {
  return reinterpret_cast<const T*>(p.pages + block * p.page_stride + offset) + index;
}

// The physical id in a column of a row's block table, 0 where it is invalid.
inline int64_t block_at(const SelectChunksParams& p, int64_t row, int64_t column) {
  const int64_t block = p.block_table[row * p.table_stride + column];
  return block > 0 && block < p.num_pages ? block : 0;
}

struct Softmax {
  float share;  // of a weight of 1; NaN where an x is NaN, or none is finite
  float top;    // the largest finite x; -infinity where there is none
};

// Of `size` values, a multiple of kLanes. Writes weights: exp(x - top), 0 for an x that is not
// finite.
inline Softmax softmax(const float* x, int64_t size, float* weights) {
  FloatV largest = splat(-kInfinity);
  for (int64_t i = 0; i < size; i += kLanes) largest = max_or_nan(largest, load(x + i));
  const float top = max_or_nan(largest);
  if (std::isfinite(top)) {
    FloatV total{};
    for (int64_t i = 0; i < size; i += kLanes) {
      const FloatV weight = exp_negative(load(x + i) - top);
      store(weights + i, weight);
      total += weight;
    }
    return {1.0f / sum(total), top};
  }
  const auto finite = [&](int64_t i) SHADOWKV_INLINE_LAMBDA {
    const FloatV y = load(x + i);
    return y < kInfinity ? y : splat(-kInfinity);  // NaN too
  };
  largest = splat(-kInfinity);
  for (int64_t i = 0; i < size; i += kLanes) largest = max_or_nan(largest, finite(i));
  const float base = max_or_nan(largest);
  for (int64_t i = 0; i < size; i += kLanes) {
    const FloatV y = finite(i);
    store(weights + i, y > -kInfinity ? exp_negative(y - base) : FloatV{});
  }
  return {std::nanf(""), base};
}

// Attention to the rest of a row and KV head. `weights`: [group, stride], 0 for every other chunk.
template <typename T, int kHeadSize>
inline void attend_rest(const SelectChunksParams& p, int64_t row, int64_t head, int64_t num_blocks,
                        const float* weights, int64_t stride, const Softmax* softmaxes) {
  constexpr int64_t kAhead = 4;  // mean values lie in scattered pages
  const int64_t chunks = p.layout.chunks();
  const int64_t padded = (num_blocks + kLanes - 1) / kLanes * kLanes;
  thread_local std::vector<float> sums;  // of the weights in each block, [group, padded]
  sums.resize(p.group * padded);
  for (int64_t g = 0; g < p.group; ++g) {
    for (int64_t first = 0; first < num_blocks; first += kLanes) {
      FloatV lanes[kLanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, num_blocks - first); ++i) {
        const float* of_block = weights + g * stride + (first + i) * chunks;
        int64_t c = 0;
        for (; c + kLanes <= chunks; c += kLanes) lanes[i] += load(of_block + c);
        for (; c < chunks; ++c) lanes[i][0] += of_block[c];
      }
      store(sums.data() + g * padded + first, sum_each(lanes));
    }
  }
  const auto mean_of = [&](int64_t i) {
    return section<T>(p, block_at(p, row, i), p.layout.mean_values, head * kHeadSize);
  };
  const int64_t first_head = (row * p.layout.num_kv_heads + head) * p.group;
  for (int64_t g = 0; g < p.group; ++g) {
    FloatV values[kHeadSize / kLanes] = {};
    float total = 0;
    for (int64_t i = 0; i < num_blocks; ++i) {
      if (g == 0 && i + kAhead < num_blocks) {
        const auto* next = reinterpret_cast<const uint8_t*>(mean_of(i + kAhead));
        for (size_t j = 0; j < kHeadSize * sizeof(T); j += 64) __builtin_prefetch(next + j);
      }
      const float weight = sums[g * padded + i];
      if (weight == 0.0f) continue;  // an invalid block, too
      total += weight;
      const T* mean = mean_of(i);
      for (int d = 0; d < kHeadSize / kLanes; ++d) values[d] += weight * load(mean + d * kLanes);
    }
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    float* out = p.rest_values + (first_head + g) * kHeadSize;
    for (int d = 0; d < kHeadSize / kLanes; ++d) store(out + d * kLanes, values[d] * inverse);
    const float tokens = total * static_cast<float>(p.layout.chunk_size);
    p.rest_lse[first_head + g] = total > 0 ? softmaxes[g].top + std::log(tokens) : -kInfinity;
  }
}

}  // namespace shadowkv::SHADOWKV_ISA
