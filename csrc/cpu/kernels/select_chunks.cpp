// Scores the landmarks of one row and KV head, picks its chunks, and attends to the rest as a
// whole.
//
// Logits: reads num_blocks * (chunks * (head_size / 2 + 4) + head_size * 4) bytes of landmarks,
// scales and mean keys once, for all query heads of the group; this is what the op costs. Writes
// group fp32 logits per chunk. Products are of integers: see select_landmarks.h.
// Pick: reads the logits twice and their exponentials once (they fit the second-level cache), the
// outliers of each block, writes `columns` ids. A chunk's score is its share of the softmax, summed
// over the group; those below 1e-38 are equal. Groups of scores have maxima, and the k-th best of
// these is a bound that the k-th best score reaches: only the few scores above it are sorted. One
// more pass then emits ids in ascending order.
// Rest: the softmax of the pick has left every chunk's weight. Those of the picked chunks become 0,
// so what is summed is the rest itself, and no difference of large sums. Reads the mean value of
// each block.
#include "cpu/kernels/select_chunks.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/numeric.h"
#include "cpu/kernels/select_landmarks.h"
#include "cpu/kernels/select_rest.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

// A chunk's place in the order: a larger key is picked first.
constexpr uint32_t kUnusable = 0;
constexpr uint32_t kForced = 0xffffffff;
constexpr uint32_t kNan = 0xfffffffe;  // above every number, where torch's sort puts NaN too

// Floats per query head; a whole number of vectors.
int64_t logits_stride(const SelectChunksParams& p, int64_t num_blocks) {
  return (num_blocks * p.layout.chunks() + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
}

// Maps floats to integers of the same order.
SHADOWKV_INLINE UintV ordered(FloatV x) {
  const UintV bits = (UintV)(x + 0.0f);  // -0 becomes 0
  const UintV negative = (UintV)((IntV)bits >> 31);
  const UintV key = bits ^ (negative | 0x80000000);
  return x != x ? kNan + UintV{} : key;
}
SHADOWKV_INLINE uint32_t ordered(float x) { return ordered(splat(x))[0]; }

// Forces the outliers with the lowest cosines that are neither unusable nor forced already, as many
// as there is room for. Returns how many.
int64_t force_outliers(const SelectChunksParams& p, int64_t row, int64_t head, int64_t num_blocks,
                       uint32_t* keys) {
  const int64_t room = p.columns - p.budget_chunks - kSinkChunks - kLocalChunks;
  const int64_t per_block = p.layout.num_outliers;
  if (room <= 0 || per_block == 0) return 0;
  thread_local std::vector<uint64_t> candidates;  // cosine in the upper half, chunk in the lower
  candidates.clear();
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t block = block_at(p, row, i);
    if (block == 0) continue;
    const auto* ids = section<int32_t>(p, block, p.layout.outlier_ids, head * per_block);
    const auto* cosines = section<float>(p, block, p.layout.outlier_cosines, head * per_block);
    for (int64_t j = 0; j < per_block; ++j) {
      if (ids[j] < 0 || ids[j] >= p.layout.chunks()) continue;
      const uint64_t chunk = i * p.layout.chunks() + ids[j];
      if (keys[chunk] == kForced) continue;
      candidates.push_back(uint64_t{ordered(cosines[j])} << 32 | chunk);
    }
  }
  const int64_t taken = std::min<int64_t>(room, candidates.size());
  std::nth_element(candidates.begin(), candidates.begin() + taken, candidates.end());
  int64_t forced = 0;
  for (int64_t i = 0; i < taken; ++i) {
    uint32_t& key = keys[candidates[i] & 0xffffffff];
    forced += key != kForced;
    key = kForced;
  }
  return forced;
}

// The k-th largest of `values`, k from 1 to their number; their order is lost.
uint32_t kth_largest(std::vector<uint32_t>& values, int64_t k) {
  std::nth_element(values.begin(), values.begin() + k - 1, values.end(), std::greater<uint32_t>());
  return values[k - 1];
}

// Bit i: whether keys[i] >= bound, for kLanes keys.
SHADOWKV_INLINE uint32_t lanes_from(const uint32_t* keys, uint32_t bound) {
  UintV lanes;
  std::memcpy(&lanes, keys, sizeof lanes);
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)lanes, _mm512_set1_epi32(static_cast<int>(bound)));
#else
  const IntV reached = lanes >= bound;
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    bits |= static_cast<uint32_t>(reached[lane] & 1) << lane;
  return bits;
#endif
}

// Calls function(index) for every key that is at least `bound`, in ascending order, until it
// returns false. `size`: a multiple of kLanes.
template <typename Function>
SHADOWKV_INLINE void for_each_from(const uint32_t* keys, int64_t size, uint32_t bound,
                                   const Function& function) {
  for (int64_t i = 0; i < size; i += kLanes) {
    for (uint32_t bits = lanes_from(keys + i, bound); bits != 0; bits &= bits - 1) {
      if (!function(i + __builtin_ctz(bits))) return;
    }
  }
}

struct Threshold {
  uint32_t key;    // all larger keys are picked
  int64_t equals;  // and so many that equal it
};

// The threshold that picks `count` of the usable keys, or all of them if there are fewer.
// `size`: a multiple of kLanes.
Threshold find_threshold(const uint32_t* keys, int64_t size, int64_t count) {
  if (count <= 0) return {kForced, 0};
  if (count > size) return {kUnusable, 0};
  thread_local std::vector<uint32_t> maxima, candidates;
  // Large groups leave few maxima to sort, small ones few candidates.
  const int64_t group = std::clamp<int64_t>(size / (2 * count), 1, 16) * kLanes;
  maxima.clear();
  for (int64_t first = 0; first < size; first += group) {
    UintV largest{};
    for (int64_t i = first; i < std::min(size, first + group); i += kLanes) {
      UintV lanes;
      std::memcpy(&lanes, keys + i, sizeof lanes);
      largest = lanes > largest ? lanes : largest;
    }
    maxima.resize(maxima.size() + kLanes);
    std::memcpy(maxima.data() + maxima.size() - kLanes, &largest, sizeof largest);
  }
  const bool enough = count <= static_cast<int64_t>(maxima.size());
  const uint32_t bound = enough ? kth_largest(maxima, count) : kUnusable;
  candidates.clear();
  for_each_from(keys, size, std::max(bound, kUnusable + 1), [&](int64_t i) SHADOWKV_INLINE_LAMBDA {
    candidates.push_back(keys[i]);
    return true;
  });
  if (static_cast<int64_t>(candidates.size()) < count) return {kUnusable, 0};
  const uint32_t key = kth_largest(candidates, count);
  int64_t larger = 0;
  for (int64_t i = 0; i < count; ++i) larger += candidates[i] > key;
  return {key, count - larger};
}

// The logits of the chunks in blocks [begin, end), whatever the dtype of the query was.
template <int kHeadSize>
void score_landmarks(const SelectChunksParams& p, const QueryHeads<kHeadSize>& query, int64_t row,
                     int64_t head, int64_t begin, int64_t end, int64_t stride, float* logits) {
  constexpr int64_t kBytes = kHeadSize / 2;
  const int64_t chunks = p.layout.chunks();
  const int8_t* codes = query.codes.data();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = block_at(p, row, i);
    float* out = logits + i * chunks;
    if (block == 0) {
      for (int64_t g = 0; g < p.group; ++g) std::fill_n(out + g * stride, chunks, -kInfinity);
      continue;
    }
    const auto landmarks_of = [&](int64_t id) {
      return section<uint8_t>(p, id, p.layout.landmarks, head * chunks * kBytes);
    };
    const uint8_t* landmarks = landmarks_of(block);
    // Hardware prefetchers stop at the end of a block's landmarks.
    const int64_t next_block = i + 1 < end ? block_at(p, row, i + 1) : 0;
    const uint8_t* next = landmarks_of(next_block);
    for_each_tile(p.group, chunks, [&]<int kQueries>(int64_t g, int64_t r, int64_t rows_left) {
      if (g == 0 && next_block != 0) {
        const int64_t bytes = std::min<int64_t>(kLanes / kQueries, rows_left) * kBytes;
        for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(next + r * kBytes + j, 0, 2);
      }
      QueryHeads<kHeadSize>::template multiply<kQueries>(
          codes + g * 2 * QueryHeads<kHeadSize>::kStride, landmarks + r * kBytes, rows_left,
          out + g * stride + r, stride);
    });
    const auto* scales = section<float>(p, block, p.layout.landmark_scales, head * chunks);
    const auto* mean = section<float>(p, block, p.layout.landmark_mean, head * kHeadSize);
    for (int64_t g = 0; g < p.group; ++g) {
      const float scale = query.scales[g] * p.scale, offset = query.offset_products[g];
      const float of_mean =
          multiply_mean<kHeadSize>(query.values.data() + g * kHeadSize, mean) * p.scale;
      float* of_head = out + g * stride;
      for (int64_t c = 0; c < chunks; ++c) {
        of_head[c] = (of_head[c] - offset) * (scales[c] * scale) + of_mean;
      }
    }
  }
}

}  // namespace

int64_t select_num_blocks(const SelectChunksParams& p, int64_t row) {
  if (p.seq_lens[row] <= 0 || p.exact_start[row] <= 0) return 0;
  return std::min(p.exact_start[row] / p.layout.block_size, p.table_width);
}

int64_t select_logits_size(const SelectChunksParams& p, int64_t row) {
  return p.group * logits_stride(p, select_num_blocks(p, row));
}

void select_logits_kernel(const SelectChunksParams& p, int64_t row, int64_t head, int64_t begin,
                          int64_t end, float* logits) {
  const int64_t stride = logits_stride(p, select_num_blocks(p, row));
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    thread_local QueryHeads<kHeadSize> query;
    query.read(static_cast<const T*>(p.query) + row * p.query_row_stride +
                   head * p.group * p.query_head_stride,
               p.group, p.query_head_stride);
    score_landmarks<kHeadSize>(p, query, row, head, begin, end, stride, logits);
  });
}

void select_pick_kernel(const SelectChunksParams& p, int64_t row, int64_t head, float* logits) {
  int32_t* ids = p.chunk_ids + (row * p.layout.num_kv_heads + head) * p.columns;
  std::fill_n(ids, p.columns, -1);
  const int64_t num_blocks = select_num_blocks(p, row);
  const int64_t chunks = p.layout.chunks(), count = num_blocks * chunks;
  const int64_t stride = logits_stride(p, num_blocks);

  thread_local std::vector<uint32_t> key_memory;
  key_memory.resize(stride);
  uint32_t* keys = key_memory.data();
  thread_local std::vector<float> weights;
  weights.resize(p.group * stride);
  thread_local std::vector<Softmax> softmaxes;  // of each query head
  softmaxes.resize(p.group);
  for (int64_t g = 0; g < p.group; ++g) {
    std::fill(logits + g * stride + count, logits + (g + 1) * stride, -kInfinity);
    softmaxes[g] = softmax(logits + g * stride, stride, weights.data() + g * stride);
  }
  for (int64_t i = 0; i < stride; i += kLanes) {
    FloatV score{};
    for (int64_t g = 0; g < p.group; ++g) {
      score += load(weights.data() + g * stride + i) * softmaxes[g].share;
    }
    const UintV key = ordered(score);
    std::memcpy(keys + i, &key, sizeof key);
  }
  std::fill(keys + count, keys + stride, kUnusable);
  int64_t forced = 0;
  const int64_t local = p.seq_lens[row] - kLocalChunks * p.layout.chunk_size;
  const int64_t newest = local > 0 ? local / p.layout.chunk_size : 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    uint32_t* block_keys = keys + i * chunks;
    if (block_at(p, row, i) == 0) {
      std::fill_n(block_keys, chunks, kUnusable);
      continue;
    }
    for (int64_t c = i == 0 ? 0 : std::max<int64_t>(newest - i * chunks, 0); c < chunks; ++c) {
      if (i * chunks + c >= kSinkChunks && i * chunks + c < newest) continue;
      block_keys[c] = kForced;
      ++forced;
    }
  }
  forced += force_outliers(p, row, head, num_blocks, keys);

  const Threshold threshold = find_threshold(keys, stride, forced + p.budget_chunks);
  int64_t equals = threshold.equals, written = 0;
  const uint32_t lowest = std::max(threshold.key, kUnusable + 1);
  for_each_from(keys, stride, lowest, [&](int64_t id) SHADOWKV_INLINE_LAMBDA {
    if (keys[id] == threshold.key && equals-- <= 0) return true;
    ids[written++] = static_cast<int32_t>(id);
    return written < p.columns;
  });

  for (int64_t g = 0; g < p.group; ++g) {
    for (int64_t i = 0; i < written; ++i) weights[g * stride + ids[i]] = 0.0f;
  }
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    attend_rest<T, kHeadSize>(p, row, head, num_blocks, weights.data(), stride, softmaxes.data());
  });
}

void select_chunks_kernel(const SelectChunksParams& p, int64_t row, int64_t head) {
  thread_local std::vector<float> logits;
  logits.resize(std::max<int64_t>(logits.size(), select_logits_size(p, row)));
  select_logits_kernel(p, row, head, 0, select_num_blocks(p, row), logits.data());
  select_pick_kernel(p, row, head, logits.data());
}

}  // namespace shadowkv::SHADOWKV_ISA
