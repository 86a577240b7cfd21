// Writes a block's shadow page in two kernels. `keys`: a CTA per block and KV head; it adds up the
// block's mean key, then its warps find the chunks' landmarks and lowest cosines, then it ranks the
// chunks and copies the worst (rank 0: all keys). `factors`: a warp per row of coefficients or of
// the basis.
//
// A block reads block_size * num_kv_heads * head_size keys and (block_size + num_kv_heads *
// head_size) * rank * 4 bytes of factors from memory (keys and coefficients again from the cache),
// and writes its shadow page.
#include "arguments/pack_block.h"

#include <cmath>

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/quantise.cuh"
#include "cuda/include/softmax.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The page of packed block i, or nullptr for an invalid id.
__device__ __forceinline__ uint8_t* page_of(const PackBlockParams& p, int64_t i) {
  const int64_t block = p.block_ids[i];
  return block > 0 && block < p.num_blocks ? p.pages + block * p.page_stride : nullptr;
}

// Lane l has dimensions 2l and 2l + 1 of every 64 of a head.
template <int kHeadSize>
constexpr int kPairsOf = (kHeadSize + 2 * kWarp - 1) / (2 * kWarp);

// Pair i of a key that this lane has; zeros beyond the head.
template <typename T, int kHeadSize>
__device__ __forceinline__ void load_pair(const T* key, int i, float& low, float& high) {
  const int d = 2 * (i * kWarp + threadIdx.x % kWarp);
  if (d >= kHeadSize) {
    low = high = 0;
    return;
  }
  const uint32_t both = *reinterpret_cast<const uint32_t*>(key + d);
  low = to_float(T{static_cast<uint16_t>(both)});
  high = to_float(T{static_cast<uint16_t>(both >> 16)});
}

// The sum of a warp's share of a block's keys, of what is finite in them, to shared memory.
template <typename T, int kHeadSize>
__device__ __forceinline__ void sum_keys(const T* keys, int64_t stride, int tokens,
                                         float* shared_sum) {
  constexpr int kRun = 8;  // divides a block's tokens; short sums lose less
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float total[kPairsOf<kHeadSize>][2] = {};
  for (int first = warp * kRun; first < tokens; first += kWarps * kRun) {
    float part[kPairsOf<kHeadSize>][2] = {};
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
#pragma unroll
      for (int i = 0; i < kPairsOf<kHeadSize>; ++i) {
        float low, high;
        load_pair<T, kHeadSize>(keys + (first + t) * stride, i, low, high);
        part[i][0] += fabsf(low) < infinity() ? low : 0.0f;
        part[i][1] += fabsf(high) < infinity() ? high : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kPairsOf<kHeadSize>; ++i) {
      total[i][0] += part[i][0];
      total[i][1] += part[i][1];
    }
  }
#pragma unroll
  for (int i = 0; i < kPairsOf<kHeadSize>; ++i) {
    const int d = 2 * (i * kWarp + lane);
    if (d < kHeadSize) shared_sum[d] = total[i][0], shared_sum[d + 1] = total[i][1];
  }
}

// A warp's chunk of `size` keys that are `stride` elements apart: writes its landmark to shared
// memory (halfway between the mean of the keys and their mean by the fourth power of their distance
// from that, as queries see it) and returns the lowest cosine between it and a key, NaN where one
// is NaN.
template <typename T, int kHeadSize>
__device__ __forceinline__ float lowest_cosine(const T* keys, int64_t stride, int size,
                                               const float* shared_scales, float* shared_landmark) {
  constexpr int kPairs = kPairsOf<kHeadSize>;
  const int lane = threadIdx.x % kWarp;
  const auto pair = [&](int t, int i, float& low, float& high) {
    load_pair<T, kHeadSize>(keys + t * stride, i, low, high);
  };

  float mean[kPairs][2] = {};
  for (int t = 0; t < size; ++t) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float low, high;
      pair(t, i, low, high);
      mean[i][0] += low;
      mean[i][1] += high;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    mean[i][0] /= static_cast<float>(size);
    mean[i][1] /= static_cast<float>(size);
  }
  const auto distance = [&](int t) {  // squared, from the mean
    float square = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float low, high;
      pair(t, i, low, high);
      low -= mean[i][0], high -= mean[i][1];
      const int d = 2 * (i * kWarp + lane);
      if (d < kHeadSize) low *= shared_scales[d], high *= shared_scales[d + 1];
      square += low * low + high * high;
    }
    return warp_sum(square);
  };
  float largest = 0;
  for (int t = 0; t < size; ++t) {
    const float square = distance(t);
    if (!(square <= largest)) largest = square;
  }
  const bool pulled = largest > 0 && largest < infinity();  // else all keys count alike
  float landmark[kPairs][2] = {}, total = 0;
  for (int t = 0; t < size; ++t) {
    const float ratio = pulled ? distance(t) / largest : 1.0f, weight = ratio * ratio;
    total += weight;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float low, high;
      pair(t, i, low, high);
      landmark[i][0] += weight * low;
      landmark[i][1] += weight * high;
    }
  }
  float square = 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      landmark[i][j] = (mean[i][j] + landmark[i][j] / total) * 0.5f;
      square += landmark[i][j] * landmark[i][j];
      const int d = 2 * (i * kWarp + lane) + j;
      if (d < kHeadSize) shared_landmark[d] = landmark[i][j];
    }
  }
  const float norm = sqrtf(warp_sum(square));
  float lowest = 2.0f;  // above every cosine
  for (int t = 0; t < size; ++t) {
    float dot = 0, key_square = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float low, high;
      pair(t, i, low, high);
      dot += low * landmark[i][0] + high * landmark[i][1];
      key_square += low * low + high * high;
    }
    const float product = sqrtf(warp_sum(key_square)) * norm;
    const float cosine = warp_sum(dot) / (product < 1e-12f ? 1e-12f : product);
    if (!(cosine >= lowest)) lowest = cosine;  // a NaN stays
  }
  return lowest;
}

// Whether chunk a is a worse fit than chunk b: the lower cosine, NaN last, ties to the lower chunk.
__device__ __forceinline__ bool is_worse(float a, int chunk_a, float b, int chunk_b) {
  const bool a_is_nan = a != a, b_is_nan = b != b;
  if (a_is_nan != b_is_nan) return b_is_nan;
  return a < b || (!(b < a) && chunk_a < chunk_b);
}

// grid: blocks, KV heads.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads, 4) pack_keys_kernel(const PackBlockParams p) {
  const PageLayout& layout = p.layout;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i = blockIdx.x, head = blockIdx.y;
  uint8_t* page = page_of(p, i);
  if (page == nullptr) return;

  __shared__ float shared_landmarks[kWarps][kHeadSize];  // first the warps' sums of keys
  __shared__ float shared_mean[kHeadSize];
  __shared__ float shared_scales[kHeadSize];
  auto* cosines = reinterpret_cast<float*>(dynamic_shared_memory());  // [chunks]
  const int size = static_cast<int>(layout.chunk_size);
  const int chunks = static_cast<int>(layout.chunks());
  auto* outliers = reinterpret_cast<int32_t*>(cosines + chunks);  // [num_outliers]
  const int num_outliers = static_cast<int>(layout.num_outliers);
  const int64_t stride = layout.width();
  const T* keys = static_cast<const T*>(p.keys) + i * layout.block_size * stride + head * kHeadSize;

  sum_keys<T, kHeadSize>(keys, stride, static_cast<int>(layout.block_size), shared_landmarks[warp]);
  sync_threads();
  auto* mean = reinterpret_cast<float*>(page + layout.landmark_mean) + head * kHeadSize;
  for (int d = threadIdx.x; d < kHeadSize; d += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared_landmarks[w][d];
    mean[d] = shared_mean[d] = sum / static_cast<float>(layout.block_size);
    shared_scales[d] = p.query_scales[head * kHeadSize + d];
  }
  sync_threads();

  uint8_t* landmarks = page + layout.landmarks + head * chunks * (kHeadSize / 2);
  auto* scales = reinterpret_cast<float*>(page + layout.landmark_scales) + head * chunks;
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    float* landmark = shared_landmarks[warp];
    const float cosine = lowest_cosine<T, kHeadSize>(keys + chunk * size * stride, stride, size,
                                                     shared_scales, landmark);
    sync_warp();
    const float scale = quantise_landmark<kHeadSize>(
        [&](int d) { return landmark[d] - shared_mean[d]; }, landmarks + chunk * (kHeadSize / 2));
    if (lane == 0) {
      scales[chunk] = scale;
      cosines[chunk] = cosine;
    }
    sync_warp();
  }
  sync_threads();

  if (num_outliers > 0) {
    auto* ids = reinterpret_cast<int32_t*>(page + layout.outlier_ids) + head * num_outliers;
    auto* lowest = reinterpret_cast<float*>(page + layout.outlier_cosines) + head * num_outliers;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
      int rank = 0;
      for (int other = 0; other < chunks; ++other) {
        rank += is_worse(cosines[other], other, cosines[chunk], chunk);
      }
      if (rank >= num_outliers) continue;
      outliers[rank] = ids[rank] = chunk;
      lowest[rank] = cosines[chunk];
    }
    sync_threads();
  }

  constexpr int kVectors = kHeadSize * sizeof(T) / sizeof(uint4);
  const bool exact = layout.rank == 0;
  const int64_t tokens = exact ? layout.block_size : num_outliers * size;
  auto* to = reinterpret_cast<uint4*>(page + (exact ? layout.exact_keys : layout.outlier_keys)) +
             head * tokens * kVectors;
  for (int64_t v = threadIdx.x; v < tokens * kVectors; v += kThreads) {
    int64_t token = v / kVectors;
    if (!exact) token = static_cast<int64_t>(outliers[token / size]) * size + token % size;
    to[v] = reinterpret_cast<const uint4*>(keys + token * stride)[v % kVectors];
  }
}

// grid: blocks, (coefficient rows + basis rows + 1, the mean) / kWarps.
template <int kHeadSize>
__global__ void __launch_bounds__(kThreads) pack_factors_kernel(const PackBlockParams p) {
  const PageLayout& layout = p.layout;
  const int lane = threadIdx.x % kWarp;
  const int64_t i = blockIdx.x;
  uint8_t* page = page_of(p, i);
  if (page == nullptr) return;

  const int width = static_cast<int>(layout.width());
  const int rank = static_cast<int>(layout.rank);
  const int tokens = static_cast<int>(layout.block_size);
  const int row = blockIdx.y * kWarps + threadIdx.x / kWarp;
  if (row < tokens) {
    quantise_coefficients(layout, p.coefficients + (i * tokens + row) * rank, row, page);
  } else if (row < tokens + rank) {
    const int r = row - tokens;
    const float* from = p.basis + (i * rank + r) * width;
    auto* codes = reinterpret_cast<int8_t*>(page + layout.basis);
    for (int d = lane; d < width; d += kWarp) {
      codes[(d / kHeadSize * rank + r) * kHeadSize + d % kHeadSize] = quantise(from[d], 1.0f);
    }
  } else if (row == tokens + rank) {
    auto* mean = reinterpret_cast<float*>(page + layout.mean);
    for (int d = lane; d < width; d += kWarp) mean[d] = p.mean[i * width + d];
  }
}

}  // namespace

void pack_block(const Tensor& block_ids, const Tensor& keys, const Tensor& query_scales,
                const Tensor& mean, const Tensor& coefficients, const Tensor& basis,
                const Tensor& pages, const std::vector<int64_t>& layout_ints) {
  const PackBlockParams p = read_pack_block(block_ids, keys, query_scales, mean, coefficients,
                                            basis, pages, layout_ints, kDevice);
  check_vectors(keys, "keys");
  check_vector_rows(pages, "pages");
  const PageLayout& layout = p.layout;
  const int64_t copies = layout.rank == 0 ? layout.exact_keys : layout.outlier_keys;
  SHADOWKV_CHECK(copies % 16 == 0, "layout: exact_keys and outlier_keys must be multiples of 16, ",
                 "got ", copies);
  const int64_t shared_bytes = 4 * (layout.chunks() + layout.num_outliers);
  constexpr int64_t kMaxSharedBytes = 80 << 10;
  SHADOWKV_CHECK(shared_bytes <= kMaxSharedBytes, "layout: the CUDA kernel takes at most ",
                 kMaxSharedBytes / 4, " chunks and outliers in a block, got ", shared_bytes / 4);

  const Launcher launch(block_ids);
  const auto n = static_cast<unsigned>(p.num_packed);
  dispatch_layout(layout, [&]<typename T, int kHeadSize>() {
    launch("pack_block keys", pack_keys_kernel<T, kHeadSize>, dim3(n, layout.num_kv_heads),
           kThreads, shared_bytes, p);
    if (layout.rank == 0) return;
    const int64_t rows = layout.block_size + layout.rank + 1;
    launch("pack_block factors", pack_factors_kernel<kHeadSize>,
           dim3(n, (rows + kWarps - 1) / kWarps), kThreads, 0, p);
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(pack_block)
