// A part is one head of one block: its landmarks, outliers and (rank 0) exact keys, and an even
// share of the rows that belong to all heads, so that parts cost the same.
//
// A block reads block_size * num_kv_heads * head_size keys and (block_size + num_kv_heads *
// head_size) * rank * 4 bytes of factors (the coefficients a second time from the cache), and
// writes its shadow page.
#include "cpu/kernels/pack_block.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/numeric.h"
#include "cpu/kernels/quantise.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

constexpr int kMaxChunkSize = 16;

// The landmark of a chunk: halfway between the mean of its keys and their mean by the fourth power
// of their distance from that, as queries see it. NaN where a key has one.
template <int kHeadSize>
void make_landmark(const float* keys, int64_t size, const float* query_scales, float* landmark) {
  constexpr int kVectors = kHeadSize / kLanes;
  FloatV mean[kVectors] = {};
  for (int64_t t = 0; t < size; ++t) {
    for (int v = 0; v < kVectors; ++v) mean[v] += load(keys + t * kHeadSize + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) mean[v] /= static_cast<float>(size);
  float squares[kMaxChunkSize];
  float largest = 0;
  for (int64_t t = 0; t < size; ++t) {
    FloatV square = {};
    for (int v = 0; v < kVectors; ++v) {
      const FloatV apart = load(keys + t * kHeadSize + v * kLanes) - mean[v];
      const FloatV distance = apart * load(query_scales + v * kLanes);
      square += distance * distance;
    }
    squares[t] = sum(square);
    if (!(squares[t] <= largest)) largest = squares[t];
  }
  const bool pulled = largest > 0 && largest < kInfinity;  // else all keys count alike
  FloatV weighted[kVectors] = {};
  float total = 0;
  for (int64_t t = 0; t < size; ++t) {
    const float ratio = pulled ? squares[t] / largest : 1.0f;
    const float weight = ratio * ratio;
    total += weight;
    for (int v = 0; v < kVectors; ++v) {
      weighted[v] += weight * load(keys + t * kHeadSize + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(landmark + v * kLanes, (mean[v] + weighted[v] / total) * 0.5f);
  }
}

// The mean of a block's keys, of what is finite in them.
template <typename T, int kHeadSize>
void make_mean(const T* keys, int64_t tokens, int64_t stride, float* mean) {
  constexpr int kVectors = kHeadSize / kLanes;
  FloatV total[kVectors] = {};
  for (int64_t first = 0; first < tokens; first += 8) {  // short sums lose less
    FloatV part[kVectors] = {};
    for (int64_t t = first; t < first + 8; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        const FloatV x = load(keys + t * stride + v * kLanes);
        const FloatV zero = x - x;  // or NaN
        part[v] += zero == zero ? x : FloatV{};
      }
    }
    for (int v = 0; v < kVectors; ++v) total[v] += part[v];
  }
  for (int v = 0; v < kVectors; ++v) {
    store(mean + v * kLanes, total[v] / static_cast<float>(tokens));
  }
}

// Lowest cosine between a chunk's keys and its landmark; NaN where one has a NaN.
template <int kHeadSize>
float lowest_cosine(const float* keys, int64_t size, const float* landmark) {
  constexpr int kVectors = kHeadSize / kLanes;
  FloatV square = {};
  for (int v = 0; v < kVectors; ++v) {
    const FloatV x = load(landmark + v * kLanes);
    square += x * x;
  }
  const float norm = std::sqrt(sum(square));
  float lowest = 2.0f;  // above every cosine
  for (int64_t t = 0; t < size; ++t) {
    FloatV dot = {};
    FloatV key_square = {};
    for (int v = 0; v < kVectors; ++v) {
      const FloatV key = load(keys + t * kHeadSize + v * kLanes);
      dot += key * load(landmark + v * kLanes);
      key_square += key * key;
    }
    const float product = std::sqrt(sum(key_square)) * norm;
    const float cosine = sum(dot) / (product < 1e-12f ? 1e-12f : product);
    if (!(cosine >= lowest)) lowest = cosine;  // a NaN stays
  }
  return lowest;
}

// Keeps a head's outliers sorted, worst first, ties to the lower chunk; NaN is the best of cosines.
void insert_outlier(int32_t chunk, float cosine, int64_t capacity, int64_t* count, int32_t* ids,
                    float* cosines) {
  int64_t place = *count;
  while (place > 0 &&
         (cosine < cosines[place - 1] || (std::isnan(cosines[place - 1]) && !std::isnan(cosine)))) {
    --place;
  }
  if (place == capacity) return;
  *count = std::min(*count + 1, capacity);
  for (int64_t i = *count - 1; i > place; --i) {
    ids[i] = ids[i - 1];
    cosines[i] = cosines[i - 1];
  }
  ids[place] = chunk;
  cosines[place] = cosine;
}

// Landmarks and outliers of one head, and its exact keys.
template <typename T, int kHeadSize>
void pack_head(const PackBlockParams& p, int64_t i, int64_t head, uint8_t* page) {
  const PageLayout& layout = p.layout;
  const int64_t size = layout.chunk_size;
  const int64_t chunks = layout.chunks();
  const int64_t stride = layout.width();
  const T* keys = static_cast<const T*>(p.keys) + i * layout.block_size * stride + head * kHeadSize;
  uint8_t* landmarks = page + layout.landmarks + head * chunks * (kHeadSize / 2);
  auto* scales = reinterpret_cast<float*>(page + layout.landmark_scales) + head * chunks;
  auto* outliers =
      reinterpret_cast<int32_t*>(page + layout.outlier_ids) + head * layout.num_outliers;
  auto* cosines =
      reinterpret_cast<float*>(page + layout.outlier_cosines) + head * layout.num_outliers;

  auto* mean = reinterpret_cast<float*>(page + layout.landmark_mean) + head * kHeadSize;
  make_mean<T, kHeadSize>(keys, layout.block_size, stride, mean);
  int64_t found = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) float rows[kMaxChunkSize * kHeadSize];
    alignas(64) float landmark[kHeadSize];
    for (int64_t t = 0; t < size; ++t) {
      widen(keys + (chunk * size + t) * stride, 1, kHeadSize, rows + t * kHeadSize);
    }
    make_landmark<kHeadSize>(rows, size, p.query_scales + head * kHeadSize, landmark);
    const float cosine = lowest_cosine<kHeadSize>(rows, size, landmark);
    for (int i = 0; i < kHeadSize; ++i) landmark[i] -= mean[i];
    scales[chunk] = quantise_landmark<kHeadSize>(landmark, landmarks + chunk * (kHeadSize / 2));
    insert_outlier(static_cast<int32_t>(chunk), cosine, layout.num_outliers, &found, outliers,
                   cosines);
  }

  if (layout.rank == 0) {
    T* exact =
        reinterpret_cast<T*>(page + layout.exact_keys) + head * layout.block_size * kHeadSize;
    for (int64_t t = 0; t < layout.block_size; ++t) {
      std::copy_n(keys + t * stride, kHeadSize, exact + t * kHeadSize);
    }
    return;
  }
  T* exact = reinterpret_cast<T*>(page + layout.outlier_keys) +
             head * layout.num_outliers * size * kHeadSize;
  for (int64_t o = 0; o < layout.num_outliers; ++o) {
    for (int64_t t = 0; t < size; ++t) {
      std::copy_n(keys + (outliers[o] * size + t) * stride, kHeadSize,
                  exact + (o * size + t) * kHeadSize);
    }
  }
}

// One head's share of the block's coefficient and basis rows, and its mean key.
template <int kHeadSize>
void pack_factors(const PackBlockParams& p, int64_t i, int64_t head, uint8_t* page) {
  const PageLayout& layout = p.layout;
  const int64_t rank = layout.rank;
  const int64_t heads = layout.num_kv_heads;
  const int64_t width = layout.width();

  const float* coefficients = p.coefficients + i * layout.block_size * rank;
  auto* codes = reinterpret_cast<int8_t*>(page + layout.coefficients);
  auto* scales = reinterpret_cast<BFloat16*>(page + layout.coefficient_scales);
  const int64_t last_token = (head + 1) * layout.block_size / heads;
  for (int64_t t = head * layout.block_size / heads; t < last_token; ++t) {
    quantise_coefficients(layout, coefficients + t * rank, codes + t * layout.leading_rank,
                          page + layout.tail_coefficients + t * layout.tail_bytes(),
                          page + layout.tail_steps + t, scales + t);
  }

  const float* basis = p.basis + i * rank * width;
  auto* basis_codes = reinterpret_cast<int8_t*>(page + layout.basis);
  const int64_t last_row = (head + 1) * rank / heads;
  for (int64_t r = head * rank / heads; r < last_row; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      round_row(basis + r * width + h * kHeadSize, kHeadSize, 1.0f,
                basis_codes + (h * rank + r) * kHeadSize);
    }
  }

  std::copy_n(p.mean + i * width + head * kHeadSize, kHeadSize,
              reinterpret_cast<float*>(page + layout.mean) + head * kHeadSize);
}

}  // namespace

void pack_block_kernel(const PackBlockParams& p, int64_t begin, int64_t end) {
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / p.layout.num_kv_heads;
      const int64_t head = part % p.layout.num_kv_heads;
      const int64_t block = p.block_ids[i];
      if (block <= 0 || block >= p.num_blocks) continue;
      uint8_t* page = p.pages + block * p.page_stride;
      pack_head<T, kHeadSize>(p, i, head, page);
      if (p.layout.rank != 0) pack_factors<kHeadSize>(p, i, head, page);
    }
  });
}

}  // namespace shadowkv::SHADOWKV_ISA
